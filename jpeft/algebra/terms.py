"""What the algebra computes with: one adapter's change of one weight as factors, and a LoRA put together from such."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from jpeft.adapter import Adapter, Meta
from jpeft.errors import KernelError, SpecError
from jpeft.kernel import wide
from jpeft.method import Leaves
from jpeft.methods import METHODS, adalora
from jpeft.methods.lora import LoRA
from jpeft.site import Site
from jpeft.tree import dotted, module_of


class Term(NamedTuple):
    """`ΔW = s A B` of one weight, in fp32.

    Attributes:
      a: A (*batch, in, r).
      b: B (*batch, r, out).
      scaling: s (*batch,); 0 where a slice of a stack is left alone.
      bias: s b_B (*batch, out), what a bias of B adds to the layer's result; None if there is none.
      dtype: of the factors.
    """

    a: Array
    b: Array
    scaling: Array
    bias: Array | None
    dtype: Any

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[-1]

    @property
    def s(self) -> Array:
        """(*batch, 1, 1): the scaling."""
        return self.scaling[..., None, None]

    def dense(self) -> Array:
        """`ΔW` (*batch, in, out)."""
        return self.s * jnp.matmul(self.a, self.b, precision="highest")


class Part(NamedTuple):
    """What a new LoRA does at one weight: A and B as matrices, with scaling 1, and perhaps the bias of B."""

    site: Site
    a: Array
    b: Array
    bias: Array | None
    dtype: Any


def term(adapter: Adapter, site: Site) -> Term:
    """The change at one weight as thin factors; of a LoRA or an AdaLoRA."""
    leaves = METHODS[site.method].matrices(adapter.leaves(site.path), site.kernel)
    dtype = leaves["a"].dtype
    leaves = {name: wide(leaf) for name, leaf in leaves.items()}
    bias = METHODS[site.method].bias(leaves)
    leaves = adalora.as_lora(leaves) if site.method == "adalora" else leaves
    return Term(leaves["a"], leaves["b"], leaves["scaling"], bias, dtype)


def check_lora(adapter: Adapter, what: str) -> None:
    """Raises SpecError unless every site is a LoRA's."""
    for site in adapter.sites:
        if site.method == "replacement":
            raise SpecError(
                f"{site.path!r} is trained whole (modules_to_save or bias): W' = V is no change that {what} could "
                "weigh. Merge it into the base, or leave it out: jpeft.LoRA(..., modules_to_save=(), bias='none')"
            )
        if site.method != "lora":
            hint = "; make it a LoRA first: to_lora(adapter, rank=8, params=params)"
            raise SpecError(f"{site.path!r}: {what} is for LoRA adapters; found {site.method!r}{hint}")


def check_same_kernel(sites: Iterable[Site]) -> Site:
    """The first of several adapters' sites at one weight.

    Raises:
      KernelError: they see the weight differently: other axes, or another of its uses.
    """
    first, *others = sites
    axes = lambda site: (site.kernel.shape, site.kernel.contracted, site.kernel.output, site.kernel.batch, site.use)
    for other in others:
        if axes(other) != axes(first):
            raise KernelError(
                f"{first.path!r}: the adapters see the weight differently, (shape, contracted, output, batch, use): "
                f"{axes(first)} and {axes(other)}; make both with the same kernels="
            )
    return first


def union_of_layers(sites: Iterable[Site]) -> tuple[int, ...] | None:
    """Of a stack, the slices that any of them adapts; None for all."""
    chosen: set[int] = set()
    for site in sites:
        if site.layers is None:
            return None
        chosen |= set(site.layers)
    return tuple(sorted(chosen))


def lora_site(site: Site, rank: int, layers: tuple[int, ...] | None) -> Site:
    """The same weight, with a LoRA of this rank on these slices."""
    return replace(site, method="lora", rank=rank, layers=layers)


def lora_from(parts: Sequence[Part], like: LoRA, kept: Iterable[tuple[Site, Leaves]] = ()) -> Adapter:
    """A LoRA of scaling 1 with these factors.

    Args:
      parts: one a weight.
      like: where its dropout and targets come from; ranks and alpha are set to what the factors have.
      kept: leaves that are trained whole, as they are.
    """
    trained = {part.site.path: _leaves(part) for part in parts}
    factored = [part.site for part in parts]
    constant = {site.path: {"scaling": jnp.asarray(site.chosen * np.float32(site.rank > 0))} for site in factored}
    has_bias = any("bias" in leaves for leaves in trained.values())
    whole = list(kept)
    trained |= {site.path: leaves for site, leaves in whole}
    sites = tuple(sorted([*factored, *(site for site, _ in whole)], key=lambda site: site.path))
    return Adapter(dict(sorted(trained.items())), constant, Meta(_spec(like, factored, has_bias), sites))


def _leaves(part: Part) -> dict[str, Array]:
    """A, B and its bias in the weight's own axes."""
    kernel, rank = part.site.kernel, part.a.shape[-1]
    a = part.a.reshape(*kernel.batch_shape, *kernel.sizes(kernel.contracted), rank)
    b = part.b.reshape(*kernel.batch_shape, rank, *kernel.sizes(kernel.output))
    leaves = {"a": a.astype(part.dtype), "b": b.astype(part.dtype)}
    if part.bias is not None:
        bias = part.bias.reshape(*kernel.batch_shape, *kernel.sizes(kernel.output))
        leaves["bias"] = bias.astype(part.dtype)
    return leaves


def _spec(like: LoRA, sites: list[Site], has_bias: bool) -> LoRA:
    """`like` with the ranks that these sites have, alpha equal to each, and an A for each expert."""
    rank = Counter(site.rank for site in sites).most_common(1)[0][0] if sites else like.rank
    others = tuple((_pattern(site.path), site.rank) for site in sites if site.rank != rank)
    return replace(
        like,
        rank=rank,
        alpha=float(rank),
        rank_pattern=others,
        alpha_pattern=tuple((name, float(r)) for name, r in others),
        rank_stabilized=False,
        factor_bias=has_bias,
        share_a=False,
    )


def _pattern(path: str) -> str:
    return re.escape(dotted(module_of(path) or path))


def named(paths: Iterable[str]) -> tuple[str, ...]:
    """Targets that mean just these weights: the module of each, or the whole path where the leaf has another name."""
    is_module = lambda path: path.rpartition("/")[2] in ("kernel", "embedding") and module_of(path)
    return tuple(module_of(path) if is_module(path) else path for path in sorted(paths))


def same_targets(first: Any, others: Iterable[Any], paths: Iterable[str]) -> Any:
    """The first spec, with the weights of all as its targets where the specs name different ones."""
    if all(other.where == first.where for other in others):
        return first
    return replace(
        first, targets=named(paths), exclude=(), layers_to_transform=None, layers_pattern=(), modules_to_save=()
    )
