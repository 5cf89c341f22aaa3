"""Training a mixture's classifier: one pure step, and the mean scalings on what was held out.

    state = start(mixture, optimizer, key)
    learn = step(forward, optimizer)
    for batch in batches:
        state, metrics = learn(state, params, batch)

A batch is as for `jpeft_interop.train`, of a language model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jpeft import xlora
from jpeft_interop.data.rows import IGNORE
from jpeft_interop.train import Metrics, Tally, cross_entropy

Batch = Mapping[str, Any]
Forward = Callable[..., Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MixtureState:
    """All that changes in training, a pytree.

    Attributes:
      mixture: as far as it has learnt.
      optimizer: the optimizer's state, for `mixture.trained`.
      step: steps done, an int32 scalar.
      key: a PRNG key; each step's dropout is drawn from it and the step's number.
    """

    mixture: xlora.Mixture
    optimizer: optax.OptState
    step: Array
    key: Array


@dataclass(frozen=True)
class Usage:
    """What a mixture does with texts.

    Attributes:
      loss: the mean over the labels.
      scalings: (layers, K), the mean over the tokens that have a label.
    """

    loss: float
    scalings: np.ndarray


def start(mixture: xlora.Mixture, optimizer: optax.GradientTransformation, key: Array) -> MixtureState:
    """The state before the first step. It holds copies: a step gives its state's memory to the next one."""
    mixture, key = jax.tree.map(jnp.copy, (mixture, key))
    return MixtureState(mixture, optimizer.init(mixture.trained), jnp.zeros((), jnp.int32), key)


def step(
    forward: Forward, optimizer: optax.GradientTransformation
) -> Callable[[MixtureState, Any, Batch], tuple[MixtureState, Metrics]]:
    """A compiled training step, `(state, params, batch) -> (state, metrics)`, of `mixture.trained` alone.

    Args:
      forward: a plain `forward(params, **inputs)` whose result has logits and hidden states; the step lifts it.
      optimizer: of optax.
    """
    mixed = xlora.lift(forward)

    def mean_loss(trained: Any, state: MixtureState, params: Any, batch: Batch, key: Array) -> tuple[Array, Tally]:
        output, _ = mixed(params, state.mixture.replace(trained=trained), **_inputs(batch), dropout_key=key)
        tally = cross_entropy(output.logits, batch["labels"])
        return tally.loss / jnp.maximum(tally.labels, 1), tally

    @partial(jax.jit, donate_argnums=0)
    def run(state: MixtureState, params: Any, batch: Batch) -> tuple[MixtureState, Metrics]:
        key, trained = jax.random.fold_in(state.key, state.step), state.mixture.trained
        (loss, tally), gradient = jax.value_and_grad(mean_loss, has_aux=True)(trained, state, params, batch, key)
        updates, inner = optimizer.update(gradient, state.optimizer, trained)
        mixture = state.mixture.replace(trained=optax.apply_updates(trained, updates))  # pyright: ignore
        right, tokens = tally.right / jnp.maximum(tally.labels, 1), jnp.asarray(batch["input_ids"].size)
        metrics = Metrics(loss, right, optax.tree.norm(gradient), tally.labels, tokens)
        return MixtureState(mixture, inner, state.step + 1, state.key), metrics

    return run


def _inputs(batch: Batch) -> dict[str, Any]:
    return {name: array for name, array in batch.items() if name != "labels"}


def usage(forward: Forward) -> Callable[[Any, xlora.Mixture, Iterable[Batch]], Usage]:
    """A function `(params, mixture, batches) -> Usage`, compiled once and good for any mixture of the same kind."""
    mixed = xlora.lift(forward)

    @jax.jit
    def one(params: Any, mixture: xlora.Mixture, batch: Batch) -> tuple[Tally, Array]:
        output, scalings = mixed(params, mixture, **_inputs(batch))
        learnt = (batch["labels"] != IGNORE)[:, :, None, None]
        return cross_entropy(output.logits, batch["labels"]), jnp.sum(scalings, (0, 1), where=learnt)

    def over(params: Any, mixture: xlora.Mixture, batches: Iterable[Batch]) -> Usage:
        found = [jax.device_get(one(params, mixture, batch)) for batch in batches]
        labels = max(sum(int(tally.labels) for tally, _ in found), 1)
        return Usage(sum(float(tally.loss) for tally, _ in found) / labels, np.sum([s for _, s in found], 0) / labels)

    return over
