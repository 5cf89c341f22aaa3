"""Several adapters of one base trained together: their states are one pytree, their steps one program.

    optimizer = train.adamw(1.0, steps)
    states = sweep.stacked([train.start(a, sweep.at_rate(optimizer, lr), key) for a, lr, key in runs])
    step   = sweep.step(forward, sweep.at_rate(optimizer))
    states, metrics = step(states, params, batches)

Everything but `params` has a first axis for the runs. Where they differ they differ in arrays: learning rate, first
values, dropout key, data. The program is one, so what it is made of (the spec, the shapes) is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from jpeft_interop import train
from jpeft_interop.train import Batch, Forward, Metrics, State

T = TypeVar("T")


def stacked(runs: Sequence[T]) -> T:
    """Trees that are alike as one, each leaf with a first axis for them.

    Example:
      >>> stacked([{"a": jnp.zeros(2)}, {"a": jnp.ones(2)}])["a"].shape
      (2, 2)
    """
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)


def one_of(runs: T, number: int) -> T:
    """The tree of one run, taken out of `stacked` ones."""
    return jax.tree.map(lambda leaf: leaf[number], runs)


def at_rate(optimizer: optax.GradientTransformation, rate: float = 1.0) -> optax.GradientTransformation:
    """An optimizer made for a rate of 1 at this rate, which lies in its state as an array.

    A rate that is a Python number is part of the program, the same for every run that goes through it; an array of the
    state is each run's own. It multiplies the update, which is what a rate does in SGD, Adam and AdamW (its decay
    included), and what the peak of a schedule does to all of it.

    Args:
      optimizer: with a rate, or a schedule whose peak is, 1.
      rate: of the states that this one's `init` makes; any will do to make a step.

    Example:
      >>> half = at_rate(optax.sgd(1.0), 0.5)
      >>> half.update({"a": jnp.ones(2)}, half.init({"a": jnp.ones(2)}), {"a": jnp.ones(2)})[0]["a"]
      Array([-0.5, -0.5], dtype=float32)
    """
    return optax.chain(optimizer, optax.inject_hyperparams(optax.scale)(step_size=rate))


def step(
    forward: Forward,
    optimizer: optax.GradientTransformation,
    *,
    at_once: bool = False,
    **options: Any,
) -> Callable[[State, Any, Batch], tuple[State, Metrics]]:
    """A compiled step of several runs, `(states, params, batches) -> (states, metrics)`: `train.step` for each of them.

    The base is there once, for all of them: it has no axis for the runs.

    Args:
      forward: as for `train.step`.
      optimizer: of `at_rate`, if the rates differ.
      at_once: all runs in the same products, by `vmap`, which holds the activations of all in memory; otherwise one
        after the other in a loop, in one run's memory. On two CPU cores the loop takes no longer than separate steps,
        `vmap` 0.9 to 1.4 times as long (`benchmarks/adapters.py`); an accelerator that one run leaves idle may gain.
      options: of `train.step`, each run's: `accumulate`, `remat`, `loss`.
    """
    one = train.step(forward, optimizer, **options)

    @partial(jax.jit, donate_argnums=0)
    def run(states: State, params: Any, batches: Batch) -> tuple[State, Metrics]:
        if at_once:
            return jax.vmap(one, in_axes=(0, None, 0))(states, params, batches)
        return jax.lax.map(lambda pair: one(pair[0], params, pair[1]), (states, batches))

    return run
