"""AdaLoRA's budget: an optax transformation that wraps the optimizer and shares ranks out among the kernels.

After each step, from the new factors p and the raw gradient g:

    I = |p g|,   Ī ← β1 Ī + (1 - β1) I,   Ū ← β2 Ū + (1 - β2) |I - Ī|,   s = Ī Ū
    S_i = s(E_i) + mean s(A_:i) + mean s(B_i:)

and every Δ_T steps the E_i of the lowest scores become zero, so many that the budget remains; it falls from the ranks
at the start to the target along a cubic. Zhang et al. 2023, arXiv:2303.10512, equations 8 to 12. Shapes are static: a
rank is a mask, until `prune` takes out what is zero.

Scores equal to the threshold are pruned with it, as in PEFT: where many are equal (all are zero until E has moved),
more go than the budget asks for, and a later allocation can bring them back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jpeft.adapter import Adapter, Meta, Part
from jpeft.errors import SpecError
from jpeft.kernel import Kernel
from jpeft.methods.adalora import AdaLoRA
from jpeft.site import Site
from jpeft.tree import dotted, module_of

Masks = dict[str, Array]


class AdaLoRAState(NamedTuple):
    """The budget's state.

    Attributes:
      inner: the wrapped optimizer's state.
      step: optimizer steps done.
      sensitivity: Ī of each factor, by path and leaf.
      uncertainty: Ū of each factor.
      masks: by path, (*batch, r): which directions the last allocation kept.
    """

    inner: Any
    step: Array
    sensitivity: Part
    uncertainty: Part
    masks: Masks


def budgets(spec: AdaLoRA, matrices: int) -> np.ndarray:
    """The budget after each optimizer step, from 0 to `total_steps`: the sum of the ranks of so many matrices.

    Example:
      >>> budgets(AdaLoRA(rank=4, target_rank=1, total_steps=6, initial_steps=1, final_steps=1), 2)
      array([8, 8, 4, 2, 2, 2, 2], dtype=int32)
    """
    if spec.target_rank > spec.rank:  # legal in a file whose budget nobody ever asked for: PEFT's default target is 8
        raise SpecError(f"AdaLoRA: target_rank must be at most rank ({spec.rank}); found {spec.target_rank}")
    start, target = spec.rank * matrices, spec.target_rank * matrices
    first, last = spec.initial_steps, _total(spec) - spec.final_steps

    def after(step: int) -> int:
        if step <= first or step >= last:
            return start if step <= first else target
        left = 1 - (step - first) / (last - first)
        return int((start - target) * left**3 + target)

    return np.array([after(step) for step in range(_total(spec) + 1)], np.int32)


def _total(spec: AdaLoRA) -> int:
    if spec.total_steps is None:
        raise SpecError("AdaLoRA: the budget needs to know how long the run is: AdaLoRA(total_steps=...)")
    return spec.total_steps


def adalora(inner: optax.GradientTransformation, adapter: Adapter) -> optax.GradientTransformation:
    """`inner`, and after each of its steps the budget.

    Give it raw gradients: what comes before it in an `optax.chain` (clipping) is part of the scores. Leaves that are no
    AdaLoRA factors (biases, saved modules) get `inner`'s update unchanged.

    Args:
      inner: the optimizer of `adapter.trained`.
      adapter: made by `jpeft.init` with a `jpeft.AdaLoRA` spec that has `total_steps`.

    Raises:
      SpecError: the adapter's spec is another, has no `total_steps` or a target above its rank; or it is pruned.

    Example:
      >>> import jpeft
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> adapter = jpeft.init(jax.random.key(0), jpeft.AdaLoRA(rank=2, target_rank=1, total_steps=9), params)
      >>> optimizer = jpeft.adalora(optax.adam(1e-2), adapter)
      >>> optimizer.init(adapter.trained).masks
      {'kernel': Array([ True,  True], dtype=bool)}
    """
    sites = adalora_sites(adapter)
    spec: Any = adapter.spec
    for site in sites:
        if site.rank != spec.rank:
            raise SpecError(
                f"{site.path!r} has rank {site.rank} of {spec.rank}: its adapter is pruned, and the budget starts from "
                "whole ones; go on training it with the optimizer alone"
            )
    chosen = {site.path: np.asarray(site.chosen, bool) for site in sites}
    budget = jnp.asarray(budgets(spec, sum(int(one.sum()) for one in chosen.values())))
    entries = spec.rank * sum(int(one.sum()) for one in chosen.values())
    last = _total(spec) - spec.final_steps

    def init(trained: Part) -> AdaLoRAState:
        factors = {site.path: trained[site.path] for site in sites}
        zeros = lambda: jax.tree.map(jnp.zeros_like, factors)  # of its own for each: steps donate their state
        masks = {path: jnp.ones(leaves["e"].shape, bool) for path, leaves in factors.items()}
        return AdaLoRAState(inner.init(trained), jnp.zeros((), jnp.int32), zeros(), zeros(), masks)

    def update(gradients: Part, state: AdaLoRAState, trained: Part | None = None) -> tuple[Part, AdaLoRAState]:
        if trained is None:
            raise SpecError("adalora scores the new factors: call update(gradients, state, adapter.trained)")
        proposed, inner_state = inner.update(gradients, state.inner, trained)
        updates: Any = proposed
        new: Any = optax.apply_updates(trained, updates)
        step = state.step + 1
        scored = step < last
        sensitivity, uncertainty = _smoothed(spec, state, new, gradients, scored)
        allocates = (step == last) | (scored & (step > spec.initial_steps) & (step % spec.every == 0))
        pruned = entries - budget[jnp.minimum(step, len(budget) - 1)]
        kept = _allocated(sites, chosen, sensitivity, uncertainty, pruned)
        masks = {path: jnp.where(allocates, kept[path], mask) for path, mask in state.masks.items()}
        updates = _masked(updates, trained, masks, allocates | (step > last))
        return updates, AdaLoRAState(inner_state, step, sensitivity, uncertainty, masks)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def adalora_sites(adapter: Adapter) -> list[Site]:
    """The sites of an AdaLoRA's factors.

    Raises:
      SpecError: the adapter's spec is another.
    """
    if not isinstance(adapter.spec, AdaLoRA):
        raise SpecError(f"the budget is AdaLoRA's: jpeft.init(key, jpeft.AdaLoRA(...), params); found {adapter.spec}")
    return [site for site in adapter.sites if site.method == "adalora"]


def _smoothed(spec: AdaLoRA, state: AdaLoRAState, new: Part, gradients: Part, scored: Array) -> tuple[Part, Part]:
    """Ī and Ū after one more step; as they were once the ranks are final."""
    pick = lambda tree: {path: tree[path] for path in state.sensitivity}
    now = jax.tree.map(lambda p, g: jnp.abs(p * g), pick(new), pick(gradients))
    ema = lambda beta: lambda old, one: jnp.where(scored, beta * old + (1 - beta) * one, old)
    sensitivity = jax.tree.map(ema(spec.beta1), state.sensitivity, now)
    distance = jax.tree.map(lambda i, mean: jnp.abs(i - mean), now, sensitivity)
    return sensitivity, jax.tree.map(ema(spec.beta2), state.uncertainty, distance)


def scores(kernel: Kernel, sensitivity: Mapping[str, Array], uncertainty: Mapping[str, Array]) -> Array:
    """S (*batch, r) of one kernel's directions."""
    score = {name: sensitivity[name] * uncertainty[name] for name in ("a", "b", "e")}
    lead = len(kernel.batch)
    a = score["a"].mean(tuple(range(lead, score["a"].ndim - 1)))
    b = score["b"].mean(tuple(range(lead + 1, score["b"].ndim)))
    return score["e"] + (a + b)


def _allocated(
    sites: list[Site], chosen: Mapping[str, np.ndarray], sensitivity: Part, uncertainty: Part, pruned: Array
) -> Masks:
    """Which directions stay when so many of the lowest scores go; slices that are not adapted count for nothing."""
    found = {site.path: scores(site.kernel, sensitivity[site.path], uncertainty[site.path]) for site in sites}
    found = {path: jnp.where(chosen[path][..., None], one, jnp.inf) for path, one in found.items()}
    ordered = jnp.sort(jnp.concatenate([one.ravel() for one in found.values()])) if found else jnp.zeros(1)
    threshold = jnp.where(pruned > 0, ordered[jnp.maximum(pruned - 1, 0)], -jnp.inf)
    return {path: one > threshold for path, one in found.items()}


def _masked(updates: Part, old: Part, masks: Masks, act: Array) -> Part:
    """Updates that bring each E_i that is masked to exactly zero."""
    out = dict(updates)
    for path, mask in masks.items():
        zeroed = jnp.where(act & ~mask, -old[path]["e"], updates[path]["e"])
        out[path] = updates[path] | {"e": zeroed}
    return out


def ranks(adapter: Adapter) -> dict[str, np.ndarray]:
    """The real rank of each kernel, (*batch,): how many E_i are not zero. Not under jit.

    Example:
      >>> import jpeft
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> adapter = jpeft.init(jax.random.key(0), jpeft.AdaLoRA(rank=2, target_rank=1), params)
      >>> ranks(adapter)  # E starts at zero
      {'kernel': array(0)}
    """
    count = lambda path: np.count_nonzero(np.asarray(adapter.trained[path]["e"]), axis=-1)
    return {site.path: np.asarray(count(site.path)) for site in adalora_sites(adapter)}


def prune(adapter: Adapter) -> Adapter:
    """The same change of the weights, without the directions that are zero: what to save or serve. Not under jit.

    Ranks may become 0. Of stacked kernels, all matrices get the largest rank among them. The spec's `ranks` say what is
    left; its scaling stays that of the rank at the start.

    Example:
      >>> import jpeft
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> adapter = jpeft.init(jax.random.key(0), jpeft.AdaLoRA(rank=2, target_rank=1), params)
      >>> prune(adapter).trained["kernel"]["a"].shape
      (3, 0)
    """
    real = {path: int(one.max(initial=0)) for path, one in ranks(adapter).items()}
    trained = {path: leaves for path, leaves in adapter.trained.items() if path not in real}
    trained |= {path: _kept(adapter.trained[path], rank) for path, rank in real.items()}
    sites = tuple(replace(site, rank=real.get(site.path, site.rank)) for site in adapter.sites)
    named = {dotted(module_of(path)).replace(".", r"\."): rank for path, rank in real.items()}
    spec = replace(adapter.spec, ranks=named)
    return Adapter(dict(sorted(trained.items())), adapter.constant, Meta(spec, sites))


def _kept(leaves: Mapping[str, Array], rank: int) -> dict[str, Array]:
    """The first `rank` directions, those that are not zero in front."""
    e = leaves["e"]
    lead = e.ndim - 1
    order = jnp.argsort(e == 0, axis=-1, stable=True)[..., :rank]
    take = lambda leaf, axis: jnp.take_along_axis(
        leaf, order.reshape(*order.shape[:lead], *_ones(leaf.ndim, lead, axis, rank)), axis
    )
    return {"a": take(leaves["a"], leaves["a"].ndim - 1), "b": take(leaves["b"], lead), "e": take(e, lead)}


def _ones(ndim: int, lead: int, axis: int, rank: int) -> list[int]:
    """The shape of an index along one axis behind the batch axes."""
    return [rank if i == axis else 1 for i in range(lead, ndim)]
