"""IA³ adapters added up: `l = Σ w_i l_i`, as PEFT's IA³ has `add_weighted_adapter`.

An adapter that leaves a weight alone adds nothing there; weights that sum to 1 keep ones at 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import Array

from jpeft.adapter import Adapter, Meta
from jpeft.algebra.terms import check_same_kernel, named, same_targets, union_of_layers
from jpeft.effects import Weighted
from jpeft.errors import SpecError
from jpeft.kernel import wide
from jpeft.method import Leaves
from jpeft.methods import ia3
from jpeft.site import Site

Group = list[tuple[Site, Leaves, Any]]


def combine_ia3(pairs: Sequence[Weighted]) -> Adapter:
    """One IA³ for several, weighted.

    Raises:
      SpecError: leaves trained whole, or a weight scaled at its input by one adapter and at its result by another.
      KernelError: a weight seen differently.
    """
    groups: dict[str, Group] = {}
    for adapter, weight in pairs:
        for site in adapter.sites:
            if site.method != "ia3":
                raise SpecError(
                    f"{site.path!r} is trained whole (modules_to_save or bias): there is no sum of such; merge it into "
                    "the base, or leave it out"
                )
            groups.setdefault(site.path, []).append((site, adapter.leaves(site.path), weight))
    sites = [_site(group) for _, group in sorted(groups.items())]
    trained = {site.path: _added(site.path, groups[site.path]) for site in sites}
    specs: list[Any] = [adapter.spec for adapter, _ in pairs]
    spec = same_targets(specs[0], specs[1:], groups)
    if any(other.feedforward != spec.feedforward for other in specs):
        spec = replace(spec, feedforward=named(path for path, leaves in trained.items() if "l_in" in leaves))
    constant = {site.path: found for site in sites if (found := ia3.constant(spec, site))}
    return Adapter(trained, constant, Meta(spec, tuple(sites)))


def _site(group: Group) -> Site:
    return replace(check_same_kernel(site for site, *_ in group), layers=union_of_layers(site for site, *_ in group))


def _added(path: str, group: Group) -> Leaves:
    """Σ w_i l_i."""
    sides = {name for _, leaves, _ in group for name in leaves if name != "chosen"}
    if len(sides) > 1:
        raise SpecError(f"{path!r} is scaled at its input by one adapter and at its result by another; they don't add")
    (name,) = sides
    terms = [_weighted(leaves, name, weight) for _, leaves, weight in group]
    dtype = jnp.result_type(*(leaves[name].dtype for _, leaves, _ in group))
    return {name: sum(terms[1:], start=terms[0]).astype(dtype)}


def _weighted(leaves: Leaves, name: str, weight: Any) -> Array:
    """`w l`, zero in slices that are left alone."""
    one = wide(leaves[name]) * jnp.asarray(1 if weight is None else weight, jnp.float32)
    if "chosen" not in leaves:
        return one
    chosen = leaves["chosen"]
    return one * chosen.reshape(*chosen.shape, *[1] * (one.ndim - chosen.ndim))
