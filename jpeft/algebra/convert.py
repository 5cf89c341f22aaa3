"""Any adapter that only changes weights made a plain LoRA, by the SVD of its change, with what that loses.

ΔW = W' - W ≈ A B,    A = U_r,  B = S_r V_rᵀ
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from jpeft.adapter import Adapter
from jpeft.algebra.svd import SVD, factors, lost, rank_for, svd, thin_svd
from jpeft.algebra.terms import Part, lora_from, lora_site, term
from jpeft.effects import check_fit
from jpeft.errors import SpecError
from jpeft.kernel import to_matrix, wide
from jpeft.methods import METHODS
from jpeft.methods.lora import LoRA
from jpeft.site import Site
from jpeft.spec import Spec
from jpeft.tree import beside, flatten

THIN = ("lora", "adalora")  # methods whose ΔW is a product of thin factors


class Converted(NamedTuple):
    """A LoRA, and what it loses.

    Attributes:
      adapter: the LoRA.
      errors: by path, (*batch,): ‖ΔW - A B‖_F / ‖ΔW‖_F; 0 where nothing is changed.
    """

    adapter: Adapter
    errors: dict[str, Array]


def to_lora(adapter: Adapter, *, rank: int | None = None, energy: float | None = None, params: Any = None) -> Converted:
    """The LoRA nearest to an adapter; its scaling is 1. Leaves trained whole and biases of B stay as they are.

    Args:
      adapter: of any method. Of LoRA and AdaLoRA, ΔW is never formed.
      rank: the most directions each weight gets; no more than it has. Runs under jit.
      energy: instead of `rank`: the share of Σ σ² to keep, in (0, 1]; each weight gets the fewest directions that hold
        it, as in PEFT's `convert_to_lora(rank=0.9)`. Of a stack, enough for each of its matrices.
      params: the base, where the method's change depends on it (DoRA, IA³).

    Raises:
      SpecError: neither or both of `rank` and `energy`, or out of range; `params` missing; or the adapter scales the
        result of a layer that has a bias, which no change of the weight does.
      KernelError: the adapter was made for other params.

    Example:
      >>> import jax, jpeft
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> adapter = jpeft.init(jax.random.key(0), jpeft.IA3(), params)
      >>> doubled = adapter.replace(trained=jax.tree.map(lambda l: 2 * l, adapter.trained))
      >>> lora, errors = to_lora(doubled, rank=1, params=params)
      >>> jpeft.apply(params, lora)["kernel"].round(5).tolist()
      [[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]]
    """
    _check(rank, energy)
    flat = None if params is None else flatten(params)
    if flat is not None:
        check_fit(flat, [(adapter, None)])
    parts, errors = [], {}
    for site in (site for site in adapter.sites if site.method != "replacement"):
        found = _svd_of_change(adapter, site, flat)
        kept = _rank_for(found.s, energy) if rank is None else min(rank, found.s.shape[-1])
        a, b = factors(found, kept)
        leaves = METHODS[site.method].matrices(adapter.leaves(site.path), site.kernel)
        bias = METHODS[site.method].bias({name: wide(leaf) for name, leaf in leaves.items()})
        parts.append(Part(lora_site(site, kept, site.layers), a, b, bias, _dtype(adapter, site)))
        errors[site.path] = lost(found.s, kept)
    whole = [(site, adapter.trained[site.path]) for site in adapter.sites if site.method == "replacement"]
    return Converted(lora_from(parts, _as_lora(adapter.spec), whole), errors)


def shrink(adapter: Adapter, rank: int) -> Converted:
    """A LoRA with at most this rank at each weight, the nearest there is; ΔW is never formed.

    Args:
      adapter: a LoRA. One that is small enough already is returned as it is.
      rank: the most directions each weight keeps; 0 leaves none.

    Raises:
      SpecError: not a LoRA, or a negative rank.

    Example:
      >>> import jax, jpeft
      >>> adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=4), {"kernel": jnp.ones((8, 6))})
      >>> small, errors = shrink(adapter, 2)
      >>> small.spec, errors
      (LoRA(rank=2, alpha=2.0, targets='all-linear'), {'kernel': Array(0., dtype=float32)})
    """
    _check(rank, None)
    sites = [site for site in adapter.sites if site.method != "replacement"]
    for site in sites:
        if site.method != "lora":
            raise SpecError(
                f"{site.path!r}: shrink is for LoRA adapters; found {site.method!r}. Convert it: "
                f"to_lora(adapter, rank={rank}, params=params)"
            )
    if all(site.rank <= rank for site in sites):
        return Converted(adapter, {site.path: jnp.zeros(site.kernel.batch_shape) for site in sites})
    return to_lora(adapter, rank=rank)


def _check(rank: Any, energy: float | None) -> None:
    if (rank is None) == (energy is None):
        raise SpecError(f"give rank= or energy=, one of them; found rank={rank!r}, energy={energy!r}")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 0):
        raise SpecError(f"rank must be an integer >= 0; found {rank!r}; a share of the energy is energy=")


def _rank_for(s: Array, energy: float | None) -> int:
    if isinstance(s, Tracer):
        raise SpecError("energy= chooses ranks by value, so it can't run under jit; inside jit give rank=")
    assert energy is not None
    return rank_for(s, energy)


def _svd_of_change(adapter: Adapter, site: Site, flat: Mapping[str, Any] | None) -> SVD:
    if site.method in THIN:
        one = term(adapter, site)
        return thin_svd(one.s * one.a, one.b)
    return svd(_change(adapter, site, flat))


def _change(adapter: Adapter, site: Site, flat: Mapping[str, Any] | None) -> Array:
    """ΔW (*batch, in, out) in fp32."""
    method = METHODS[site.method]
    leaves = method.matrices(adapter.leaves(site.path), site.kernel)
    leaves = {name: wide(leaf) for name, leaf in leaves.items()}
    if method.delta is not None:
        return method.delta(leaves)
    if flat is None:
        raise SpecError(f"{site.path!r}: what {site.method!r} changes depends on the base; give params=")
    if method.scales is not None and method.scales(leaves).out is not None and beside(site.path, "bias") in flat:
        raise SpecError(
            f"{site.path!r}: {site.method!r} scales the layer's result, its bias {beside(site.path, 'bias')!r} "
            "included: no LoRA does that. Merge it: jpeft.merge(params, adapter)"
        )
    w = wide(to_matrix(jnp.asarray(flat[site.path]), site.kernel))
    return method.transform(w, leaves) - w


def _dtype(adapter: Adapter, site: Site) -> Any:
    return jnp.result_type(*(leaf.dtype for leaf in adapter.trained[site.path].values()))


def _as_lora(spec: Spec) -> LoRA:
    """The targets and the dropout of any spec, in a LoRA's."""
    if type(spec) is LoRA:
        return spec
    return LoRA(**{field.name: getattr(spec, field.name) for field in fields(Spec)}, dropout=spec.dropout_rate)
