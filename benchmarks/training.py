"""What the benchmarks of training compare, of any model: its floor, an adapter by `lift`, full fine-tuning.

The floor is the frozen base: forward, and backward through the activations only. Its gradient is that of a vector which
is added to the embedded tokens, so that all of the backward pass is needed and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from llama_linen import LM
from timing import Compiled, Ratio, compiled, in_turns, ratios

import jpeft

Loss = Callable[[Any, Any], Array]  # of what is trained, and the base's params
Row = tuple[Loss, Any, Any]  # the loss, and both

HEADER = ("row", "s", "× floor", "10th to 90th %", "GFLOP", "temporary MiB", "× floor's", "trace s", "compile s")


@dataclass(frozen=True)
class Subject:
    """A model at some batch.

    Attributes:
      forward: what is lifted.
      loss: of a forward, params, and the vector that is added to the embedded tokens, or None for none.
      params: the frozen base.
      width: of that vector.
    """

    forward: Callable[..., Any]
    loss: Callable[[Callable[..., Any], Any, Array | None], Array]
    params: Any
    width: int

    def floor(self) -> Row:
        """The frozen model."""
        dtype = jax.tree.leaves(self.params)[0].dtype
        return lambda shift, params: self.loss(self.forward, params, shift), jnp.zeros(self.width, dtype), self.params

    def full(self) -> Row:
        """All params trained, in the plain model."""
        return lambda params, _: self.loss(self.forward, params, None), self.params, None

    def adapted(self, adapter: jpeft.Adapter, lift: Callable[..., Any] = jpeft.lift) -> Row:
        """The adapter's leaves trained, in the lifted model."""
        forward = lift(self.forward)
        attach = lambda trained, params: jpeft.attach(params, adapter.replace(trained=trained))
        return lambda trained, params: self.loss(forward, attach(trained, params), None), adapter.trained, self.params

    def dense(self, adapter: jpeft.Adapter) -> Row:
        """The same by the definition: adapted weights formed, the model plain."""
        apply = lambda trained, params: jpeft.apply(params, adapter.replace(trained=trained))
        loss = lambda trained, params: self.loss(self.forward, apply(trained, params), None)
        return loss, adapter.trained, self.params


def linen(model: LM, batch: int, time: int) -> Subject:
    """The Linen Llama with random weights, on random tokens."""
    tokens = jax.random.randint(jax.random.key(0), (batch, time), 0, model.vocab)
    params = jax.jit(model.init)(jax.random.key(1), tokens)["params"]

    def loss(forward: Callable[..., Any], params: Any, shift: Array | None) -> Array:
        if shift is not None:
            params = params | {"embed": {"embedding": params["embed"]["embedding"] + shift}}
        return next_token(forward({"params": params}, tokens), tokens)

    return Subject(model.apply, loss, params, model.d)


def next_token(logits: Array, tokens: Array) -> Array:
    """The mean cross-entropy of each token after those before it."""
    logits = logits[:, :-1].astype(jnp.float32)
    picked = jax.nn.one_hot(tokens[:, 1:], logits.shape[-1], dtype=logits.dtype)
    return (jax.nn.logsumexp(logits, -1) - (logits * picked).sum(-1)).mean()


def trained(spec: Any, subject: Subject, **options: Any) -> jpeft.Adapter:
    """An adapter as after some training: no leaf is zero."""
    adapter = jpeft.init(jax.random.key(2), spec, subject.params, **options)
    noise = lambda leaf: leaf + 0.01 * jax.random.normal(jax.random.key(3), leaf.shape, leaf.dtype)
    return adapter.replace(trained=jax.tree.map(noise, adapter.trained))


@dataclass(frozen=True)
class Measured:
    """A row's program, the median of its seconds, and what it takes over the floor in the same round."""

    program: Compiled
    seconds: float
    ratio: Ratio


def measure(rows: Mapping[str, Row], rounds: int, floor: str = "floor") -> dict[str, Measured]:
    """Every row compiled, then run in turns."""
    programs = {name: compiled(jax.value_and_grad(loss), *arguments) for name, (loss, *arguments) in rows.items()}
    bind = lambda name, arguments: lambda: programs[name].step(*arguments)
    times = in_turns({name: bind(name, arguments) for name, (_, *arguments) in rows.items()}, rounds)
    over = ratios(times, floor)
    middle = lambda name: sorted(times[name])[len(times[name]) // 2]
    return {name: Measured(programs[name], middle(name), over[name]) for name in rows}


def cells(name: str, row: Measured, floor: Measured) -> Sequence[object]:
    """A line of the table under `HEADER`."""
    spread = "" if row is floor else f"{row.ratio.low:.2f} to {row.ratio.high:.2f}"
    p = row.program
    memory = f"{p.temp_mib:.0f}", f"{p.temp_mib / floor.program.temp_mib:.2f}"
    begin = f"{row.seconds:.3g}", f"{row.ratio.median:.2f}", spread, f"{p.gflop:.4g}"
    return (name, *begin, *memory, f"{p.trace_s:.1f}", f"{p.compile_s:.1f}")
