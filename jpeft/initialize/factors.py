"""What the initialisers share: a LoRA's weights as matrices, factors put in, and their product taken out of the base.

Every initialiser sees `W` (*batch, in, out), whatever the weight's own axes are, and gives `A` (*batch, in, r) and `B`
(*batch, r, out). Where the start `s A B` is not zero, the base loses it, so that the adapted model is the one before:

    W_res = W - s A B,    W_res + s A B = W.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from jpeft.adapter import Adapter, Site
from jpeft.errors import KernelError, SpecError
from jpeft.kernel import from_matrix, to_matrix, wide
from jpeft.methods.lora import LoRA
from jpeft.tree import base_leaves, dotted, module_of, nearest, replace


class Initialized(NamedTuple):
    """An adapter, and the base that it goes with: the old params with the adapter's start taken out of them."""

    adapter: Adapter
    params: Any


class Factors(NamedTuple):
    """`A` (*batch, in, r) and `B` (*batch, r, out) of one weight."""

    a: Array
    b: Array


class Target(NamedTuple):
    """One weight that a LoRA adapts: `w` (*batch, in, out) in fp32, `scaling` (*batch,)."""

    site: Site
    w: Array
    scaling: Array

    @property
    def s(self) -> Array:
        """(*batch, 1, 1): the scaling, 1 where a slice of a stack is left alone (its factors have no effect)."""
        return jnp.where(self.scaling > 0, self.scaling, 1)[..., None, None]


def sites(adapter: Adapter, *, fresh: bool = True) -> list[Site]:
    """The weights that get a start: those of rank 1 and more.

    Raises:
      SpecError: not a LoRA, alpha is not positive, experts share an A, or (`fresh`) the adapter has been trained or
        initialised before.
      KernelError: an embedding or a convolution is among them, for which no start of this kind is known.
    """
    spec = adapter.spec
    if type(spec) is not LoRA:
        raise SpecError(f"this start is for a jpeft.LoRA; found {type(spec).__name__}")
    found = [site for site in adapter.sites if site.method == "lora" and site.rank > 0]
    for site in found:
        module = module_of(site.path)
        if site.kernel.kind != "product":
            raise KernelError(
                f"{site.path!r} is a weight of kind {site.kernel.kind!r}; this start is for products. Leave it out: "
                f"exclude=[{dotted(module or site.path)!r}]"
            )
        if spec.share_a and site.kernel.experts:
            raise SpecError(
                f"{site.path!r}: its experts share an A (share_a=True), and this start gives each an A of its own; "
                "use jpeft.LoRA(..., share_a=False), or init's own start"
            )
        if spec.alpha_of(module, site.path) <= 0:
            raise SpecError(f"{site.path!r}: alpha must be > 0; found {spec.alpha_of(module, site.path)}")
        if fresh:
            _check_fresh(adapter.trained[site.path]["b"], site.path)
    return found


def _check_fresh(b: Array, path: str) -> None:
    if not isinstance(b, Tracer) and bool(jnp.any(b)):
        raise SpecError(f"{path!r}: B is not zero; a start is given to a new adapter, from jpeft.init")


def targets(adapter: Adapter, params: Any) -> Iterator[Target]:
    """The weights that get a start, as matrices.

    Raises:
      KernelError: the adapter was made for other params, or one of its ranks is larger than the weight.
      SpecError: as for `sites`.
    """
    flat = base_leaves(params)
    for site in sites(adapter):
        if site.path not in flat:
            raise KernelError(f"the params have no {site.path!r}; the nearest are {nearest(site.path, flat)}")
        weight = flat[site.path]
        if tuple(weight.shape) != site.kernel.shape:
            raise KernelError(f"{site.path!r}: the adapter is for shape {site.kernel.shape}, found {weight.shape}")
        yield Target(site, wide(to_matrix(weight, site.kernel)), adapter.constant[site.path]["scaling"])


def check_rank(site: Site, most: int, what: str = "rank") -> None:
    """Raises KernelError for a rank that the weight has no directions for."""
    if site.rank > most:
        raise KernelError(
            f"{site.path!r} is {site.kernel.fan_in} x {site.kernel.fan_out}: its {what} is at most {most}, found "
            f"{site.rank}; give it less with rank_pattern={{{dotted(module_of(site.path))!r}: {most}}}"
        )


def site_key(key: Array, site: Site) -> Array:
    """A key of the weight's own, which does not depend on the other targets."""
    return jax.random.fold_in(key, zlib.crc32(site.path.encode()))


def with_factors(adapter: Adapter, factors: Mapping[str, Factors]) -> Adapter:
    """The adapter with other factors, in the weights' own axes and the factors' dtype."""
    by_path = {site.path: site for site in adapter.sites}
    new = {path: adapter.trained[path] | _leaves(adapter, by_path[path], pair) for path, pair in factors.items()}
    return adapter.replace(trained=adapter.trained | new)


def _leaves(adapter: Adapter, site: Site, factors: Factors) -> dict[str, Array]:
    kernel, dtype, rank = site.kernel, adapter.trained[site.path]["a"].dtype, factors.a.shape[-1]
    a = factors.a.reshape(*kernel.batch_shape, *kernel.sizes(kernel.contracted), rank)
    b = factors.b.reshape(*kernel.batch_shape, rank, *kernel.sizes(kernel.output))
    return {"a": a.astype(dtype), "b": b.astype(dtype)}


def start(adapter: Adapter, params: Any, factors: Mapping[str, Factors]) -> Initialized:
    """The adapter with these factors, and the base without what they add: `W - s A B`, in the base's dtype."""
    adapter, flat, new = with_factors(adapter, factors), base_leaves(params), {}
    for site in (site for site in adapter.sites if site.path in factors):
        weight = flat[site.path]
        residual = wide(to_matrix(weight, site.kernel)) - product(adapter, site)
        new[site.path] = from_matrix(residual, site.kernel).astype(weight.dtype)
    return Initialized(adapter, replace(params, new))


def product(adapter: Adapter, site: Site) -> Array:
    """`s A B` (*batch, in, out) of one weight, in fp32, from the factors as they are stored."""
    leaves, kernel = adapter.leaves(site.path), site.kernel
    a = wide(leaves["a"]).reshape(*kernel.batch_shape, kernel.fan_in, -1)
    b = wide(leaves["b"]).reshape(*kernel.batch_shape, -1, kernel.fan_out)
    return leaves["scaling"][..., None, None] * jnp.matmul(a, b, precision="highest")
