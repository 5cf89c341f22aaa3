"""What adapters with weights do to each weight of the params: read from the adapters, checked, nothing computed yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike

from jpeft.adapter import Adapter
from jpeft.errors import KernelError, SpecError
from jpeft.method import Leaves
from jpeft.methods import METHODS
from jpeft.site import Site
from jpeft.together import Acting
from jpeft.tree import is_floating, is_weight, nearest

Adapters = Adapter | Sequence[Adapter] | Mapping[str, Adapter]
Weights = ArrayLike | Sequence[Any] | Mapping[str, Any] | None
Weighted = tuple[Adapter, Any]


def weighted_adapters(adapters: Adapters, weights: Weights = None) -> list[Weighted]:
    """One or several adapters, as pairs with their weights."""
    if isinstance(adapters, Mapping):
        names = list(adapters)
        if isinstance(weights, Mapping) and set(weights) != set(names):
            raise SpecError(f"weights are for {sorted(weights)}; the adapters are {sorted(names)}")
        weights = [weights[name] for name in names] if isinstance(weights, Mapping) else weights
        adapters = [adapters[name] for name in names]
    if isinstance(weights, Mapping):
        raise SpecError(f"weights are by name ({sorted(weights)}), the adapters are not; give {{name: adapter}}")
    if (why := getattr(type(adapters), "not_an_adapter", None)) is not None:
        raise TypeError(why)
    group = [adapters] if isinstance(adapters, Adapter) else adapters
    if not isinstance(group, (list, tuple)) or not all(isinstance(one, Adapter) for one in group):
        raise TypeError(
            f"expected an adapter, made by jpeft.init(key, spec, params) or jpeft.load(path); found {_kind(group)}"
        )
    amounts: Any = [None] * len(group) if weights is None else weights
    several = isinstance(amounts, (list, tuple)) or getattr(amounts, "ndim", 0) > 0
    amounts = list(amounts) if several else [amounts]
    if len(amounts) != len(group):
        raise SpecError(f"{len(amounts)} weights for {len(group)} adapters")
    return list(zip(group, amounts, strict=True))


def _kind(found: Any) -> str:
    if isinstance(found, (list, tuple)):
        return f"a {type(found).__name__} of {', '.join(sorted({type(one).__name__ for one in found})) or 'nothing'}"
    return type(found).__name__


def check_fit(flat: Mapping[str, Any], pairs: Sequence[Weighted]) -> None:
    """Every site of every adapter has its weight here, in its shape, not yet adapted."""
    for adapter, _ in pairs:
        for site in adapter.sites:
            if site.path not in flat:
                raise KernelError(
                    f"the adapter has {site.path!r}, the params don't; nearest: {nearest(site.path, flat)}"
                )
            leaf = flat[site.path]
            if is_weight(leaf):
                raise KernelError(
                    f"{site.path!r} has an adapter attached; attach all at once: jpeft.attach(params, [a, b])"
                )
            if tuple(leaf.shape) != site.kernel.shape:
                raise KernelError(
                    f"{site.path!r}: the adapter is for shape {site.kernel.shape}, the params have {tuple(leaf.shape)}"
                )
            if not is_floating(leaf):
                raise KernelError(f"{site.path!r} holds {leaf.dtype}; expected a floating dtype: dequantize it first")


class Effect(NamedTuple):
    """What one adapter does at one weight: its leaves as matrices with the adapter's weight folded in."""

    site: Site
    leaves: Leaves
    dropout: float


def effects_by_path(pairs: Sequence[Weighted]) -> dict[str, list[Effect]]:
    """What each weight undergoes.

    Raises:
      SpecError: a weight on something that can't be scaled, or two adapters that replace the same leaf.
      KernelError: two adapters that take the same weight's axes differently.
    """
    effects: dict[str, list[Effect]] = {}
    for adapter, weight in pairs:
        for site in adapter.sites:
            effect = Effect(site, _leaves(adapter, site, weight), adapter.spec.dropout_rate)
            effects.setdefault(site.path, []).append(effect)
    for path, group in effects.items():
        if len(group) > 1 and any(METHODS[site.method].alone for site, *_ in group):
            raise SpecError(f"{path!r} is replaced whole by one of {len(group)} adapters: they can't act together")
        axes = {(site.kernel.contracted, site.kernel.output, site.kernel.batch) for site, *_ in group}
        if len(axes) > 1:
            raise KernelError(
                f"{path!r}: the adapters take its axes differently, (contracted, output, batch): {sorted(axes)}; make "
                "both with the same kernels="
            )
    return effects


def _leaves(adapter: Adapter, site: Site, weight: Any) -> Leaves:
    method = METHODS[site.method]
    leaves = method.matrices(adapter.leaves(site.path), site.kernel)
    if weight is None:
        return leaves
    if method.weighted is None:
        raise SpecError(f"{site.path!r}: the effect of {site.method!r} can't be scaled; leave weights= out")
    return method.weighted(leaves, jnp.asarray(weight, jnp.float32))


def acting(effects: Sequence[Effect]) -> Acting:
    """The methods at one weight, each with its leaves as matrices."""
    return [(METHODS[effect.site.method], effect.leaves) for effect in effects]
