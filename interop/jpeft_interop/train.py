"""Training an adapter: one pure step, the loss it lowers, and a score for what was held out.

    state = train.start(adapter, optimizer, key)
    step  = train.step(forward, optimizer)
    for batch in batches:
        state, metrics = step(state, params, batch)

A batch is a mapping of arrays with `labels` among them, the rest being what `forward` takes by name. `labels` are at
the places of the logits: of a language model the next token, of a classifier the class; `IGNORE` (-100) where there is
nothing to learn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import Array

import jpeft
from jpeft_interop.data.rows import IGNORE
from jpeft_interop.models.chunked_loss import scored

Batch = Mapping[str, Any]
Forward = Callable[..., Any]
S = TypeVar("S")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """All that changes in training, a pytree.

    Attributes:
      adapter: as far as it has learnt.
      optimizer: the optimizer's state.
      step: steps done, an int32 scalar.
      key: a PRNG key; each step's dropout is drawn from it and the step's number.
    """

    adapter: jpeft.Adapter
    optimizer: optax.OptState
    step: Array
    key: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tally:
    """Sums over labels, a pytree: what batches add up to.

    Attributes:
      loss: the negative log-likelihoods, summed, fp32.
      right: how many labels were the likeliest.
      labels: how many there were.
    """

    loss: Array
    right: Array
    labels: Array

    def __add__(self, other: Tally) -> Tally:
        return jax.tree.map(jnp.add, self, other)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Metrics:
    """What one step tells: scalars.

    Attributes:
      loss: the mean over the batch's labels.
      accuracy: the share of labels that were the likeliest.
      grad_norm: the gradient's norm, before it is clipped.
      labels: how many labels there were.
      tokens: how many tokens were read, padding apart.
      rank: directions in use, all kernels together, where the method shares ranks out (AdaLoRA); else None.
    """

    loss: Array
    accuracy: Array
    grad_norm: Array
    labels: Array
    tokens: Array
    rank: Array | None = None


Loss = Callable[[Forward, Any, Batch], Tally]


@dataclass(frozen=True)
class Score:
    """Means over the labels of a data set."""

    loss: float
    accuracy: float
    labels: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def cross_entropy(logits: Array, labels: Array) -> Tally:
    """Softmax cross-entropy in fp32, summed over the labels that are not `IGNORE`.

    Args:
      logits: (..., classes).
      labels: (...), integers.

    Example:
      >>> cross_entropy(jnp.zeros((3, 2)), jnp.array([0, 1, IGNORE])).labels
      Array(2, dtype=int32)
    """
    return _summed(*scored(logits, labels), labels)


def loss_of_logits(forward: Forward, params: Any, batch: Batch) -> Tally:
    """The cross-entropy of what any model's forward gives as `.logits`: the loss of a step that is told no other."""
    return cross_entropy(forward(params, **_inputs(batch)).logits, batch["labels"])


def next_token_loss(forward: Forward, params: Any, batch: Batch) -> Tally:
    """The same of a language model of `jpeft_interop.models` that gets the labels as `next_tokens`.

    Its logits are never all there at once; where they are many, each is worked out once more in the backward pass.
    """
    output = forward(params, **_inputs(batch), next_tokens=batch["labels"])
    return _summed(output.losses, output.hits, batch["labels"])


def _summed(losses: Array, hits: Array, labels: Array) -> Tally:
    return Tally(jnp.sum(losses), jnp.sum(hits), jnp.sum(labels != IGNORE))


def _inputs(batch: Batch) -> dict[str, Any]:
    return {name: array for name, array in batch.items() if name != "labels"}


def adamw(
    lr: float, steps: int, *, warmup: float = 0.05, clip: float = 1.0, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """AdamW on clipped gradients; the rate rises over the `warmup` share of the steps and falls to 0 along a cosine.

    Example:
      >>> adamw(1e-3, 100).init({"a": jnp.zeros(2)}) is not None
      True
    """
    rising = max(1, round(warmup * steps))
    # From a first part of it, not from 0, which would make the first step none at all.
    rate = optax.warmup_cosine_decay_schedule(lr / rising, lr, rising, max(rising + 1, steps))
    return optax.chain(optax.clip_by_global_norm(clip), optax.adamw(rate, weight_decay=weight_decay))


def budgeted(optimizer: optax.GradientTransformation, adapter: jpeft.Adapter) -> optax.GradientTransformation:
    """The optimizer, with AdaLoRA's budget around it where the adapter is one."""
    return jpeft.adalora(optimizer, adapter) if isinstance(adapter.spec, jpeft.AdaLoRA) else optimizer


def start(
    adapter: jpeft.Adapter,
    optimizer: optax.GradientTransformation,
    key: Array,
    *,
    homes: Callable[[State], State] | None = None,
) -> State:
    """The state before the first step. It holds copies: a step gives its state's memory to the next one.

    Args:
      adapter: a new one.
      optimizer: of optax.
      key: a PRNG key.
      homes: on a mesh, the shardings of a state of such shapes.
    """

    def new(adapter: jpeft.Adapter, key: Array) -> State:
        adapter, key = jax.tree.map(jnp.copy, (adapter, key))
        return State(adapter, optimizer.init(adapter.trained), jnp.zeros((), jnp.int32), key)

    if homes is None:
        return new(adapter, key)
    return jax.jit(new, out_shardings=homes(jax.eval_shape(new, adapter, key)))(adapter, key)


def step(
    forward: Forward,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    remat: bool = False,
    loss: Loss = loss_of_logits,
    homes: Any = None,
    parts: Any = None,
) -> Callable[[State, Any, Batch], tuple[State, Metrics]]:
    """A compiled training step, `(state, params, batch) -> (state, metrics)`, that changes nothing but the adapter.

    The base is an argument, so that it is no constant of the program; the old state's memory is reused for the new one.

    Args:
      forward: a plain `forward(params, **inputs)` whose result `loss` can read; the step lifts it.
      optimizer: of optax.
      accumulate: split each batch into that many parts, one after the other; the same step in less memory.
      remat: compute again in the backward pass what is cheap (all but the matrix products); slower, in less memory.
      loss: what the lifted forward, params with an adapter attached, and a batch come to; summed over labels, not their
        mean. For a language model of ours with a large vocabulary, `next_token_loss` takes less memory.
      homes: on a mesh, `(State of shardings, that of the metrics)`, so that what comes out lives where it went in.
      parts: on a mesh, the sharding of a batch as `(parts, rows, ...)`.
    """
    lifted = jpeft.lift(forward)

    def total_loss(trained: Any, adapter: jpeft.Adapter, params: Any, batch: Batch, key: Array) -> tuple[Array, Tally]:
        attached = jpeft.attach(params, adapter.replace(trained=trained), dropout_key=key)
        tally = loss(lifted, attached, batch)
        return tally.loss, tally

    @partial(jax.jit, donate_argnums=0, out_shardings=homes)
    def run(state: State, params: Any, batch: Batch) -> tuple[State, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        again = (
            jax.checkpoint(total_loss, policy=_keeps(params, batch["labels"].size // accumulate))
            if remat
            else total_loss
        )
        gradient = lambda part, number: jax.grad(again, has_aux=True)(
            state.adapter.trained, state.adapter, params, part, jax.random.fold_in(key, number)
        )
        summed, tally = _accumulated(gradient, batch, accumulate, parts)
        return _updated(state, optimizer, summed, tally, _tokens(batch))

    return run


def _keeps(params: Any, labels: int) -> Callable[..., bool]:
    """The policy of `remat`: products are kept, but for logits that are worked out for some of the labels at a time.

    The policy sees each product alone; logits are told by their width, that of the widest parameter. Of a product with
    an adapter its result is kept, and so neither of the terms that it is the sum of.
    """
    widest = max(max(leaf.shape, default=0) for leaf in jax.tree.leaves(params))
    is_product = jax.checkpoint_policies.dots_with_no_batch_dims_saveable

    def keeps(primitive: Any, *inputs: Any, **settings: Any) -> bool:
        if jpeft.adapted_saveable(primitive, *inputs, **settings):
            shape = inputs[0].shape
        elif is_product(primitive, *inputs, **settings):
            shape = _shape_of(inputs, **settings)
        else:
            return False
        return widest not in shape or math.prod(shape) >= labels * widest

    return keeps


def _shape_of(inputs: Sequence[Any], *, dimension_numbers: Any, **_: Any) -> list[int]:
    """The shape of a product of two arrays."""
    summed = zip(inputs, dimension_numbers[0], strict=True)
    return [size for array, axes in summed for axis, size in enumerate(array.shape) if axis not in axes]


def _tokens(batch: Batch) -> Array:
    return jnp.sum(batch["attention_mask"]) if "attention_mask" in batch else jnp.asarray(batch["input_ids"].size)


def _accumulated(
    gradient: Callable[[Batch, Any], tuple[Any, Tally]], batch: Batch, parts: int, home: Any
) -> tuple[Any, Tally]:
    """The sum of `gradient(part, number)` over the parts of a batch."""
    if parts == 1:
        return gradient(batch, 0)
    split = jax.tree.map(lambda array: array.reshape(parts, -1, *array.shape[1:]), batch)
    split = split if home is None else jax.lax.with_sharding_constraint(split, home)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(lambda: gradient(_part(split, 0), 0)))
    add = lambda sums, part: jax.tree.map(jnp.add, sums, gradient(*part))
    return jax.lax.scan(lambda sums, part: (add(sums, part), None), zeros, (split, jnp.arange(parts)))[0]


def _part(split: Batch, number: int) -> Batch:
    return jax.tree.map(lambda array: array[number], split)


def _updated(
    state: State, optimizer: optax.GradientTransformation, summed: Any, tally: Tally, tokens: Array
) -> tuple[State, Metrics]:
    """The next state, from gradients of the summed loss: the mean over labels is taken once, over the whole batch."""
    labels = jnp.maximum(tally.labels, 1)
    penalty = jax.grad(lambda trained: jpeft.penalty(state.adapter.replace(trained=trained)))(state.adapter.trained)
    gradient = jax.tree.map(lambda g, p: g / labels.astype(g.dtype) + p, summed, penalty)
    updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.adapter.trained)
    trained = optax.apply_updates(state.adapter.trained, updates)
    adapter = state.adapter.replace(trained=trained)
    norm, rank = optax.tree.norm(gradient), _rank(adapter)
    metrics = Metrics(tally.loss / labels, tally.right / labels, norm, tally.labels, tokens, rank)
    return State(adapter, optimizer_state, state.step + 1, state.key), metrics


def _rank(adapter: jpeft.Adapter) -> Array | None:
    singular = [leaves["e"] for leaves in adapter.trained.values() if "e" in leaves]
    return sum(map(jnp.count_nonzero, singular), jnp.zeros((), jnp.int32)) if singular else None


def run(
    step: Callable[[S, Any, Batch], tuple[S, Metrics]], state: S, params: Any, batches: Iterable[Batch]
) -> Iterator[tuple[S, Metrics]]:
    """Step after step, as long as there are batches; each state, of whatever kind, is good until the next one."""
    for batch in batches:
        state, metrics = step(state, params, batch)
        yield state, metrics


def scorer(
    forward: Forward, *, loss: Loss = loss_of_logits, home: Any = None
) -> Callable[[Any, jpeft.Adapter, Iterable[Batch]], Score]:
    """A function `(params, adapter, batches) -> Score`, compiled once and good for any adapter of the same spec.

    Args:
      forward: a plain `forward(params, **inputs)`.
      loss: as in `step`.
      home: on a mesh, the sharding of what is on every device.
    """
    lifted = jpeft.lift(forward)

    @partial(jax.jit, out_shardings=home)
    def tally(params: Any, adapter: jpeft.Adapter, batch: Batch) -> Tally:
        return loss(lifted, jpeft.attach(params, adapter), batch)

    def score(params: Any, adapter: jpeft.Adapter, batches: Iterable[Batch]) -> Score:
        tallies = [jax.device_get(tally(params, adapter, batch)) for batch in batches]
        loss, labels = sum(float(t.loss) for t in tallies), sum(int(t.labels) for t in tallies)
        return Score(loss / max(labels, 1), sum(int(t.right) for t in tallies) / max(labels, 1), labels)

    return score
