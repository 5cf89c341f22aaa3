"""LoRA: low-rank adaptation.

    W' = W + s A B,    s = alpha / r  (rank-stabilised: alpha / sqrt(r)),    y = x W' + b (+ s b_B)

with W (in, out), A (in, r), B (r, out). Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models",
arXiv:2106.09685; the rank-stabilised scaling is Kalajdzievski 2023, arXiv:2312.03732. The papers write y = W x, so
their A and B are these, transposed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jpeft.draws import gaussian, uniform
from jpeft.kernel import Kernel
from jpeft.low_rank import low_rank, low_rank_plain
from jpeft.method import Axes, Leaves, Meeting, Method, Shapes, Site, Weights
from jpeft.remat import named
from jpeft.spec import Spec, names_of
from jpeft.targets import Patterns, frozen_mapping, pattern_value
from jpeft.tree import module_of

Init = Literal["kaiming", "gaussian"]


@dataclass(frozen=True, repr=False)
class LoRA(Spec):
    """The LoRA spec: hyperparameters and targets. Frozen, hashable, serialisable.

    Args:
      rank: r of every kernel that `rank_pattern` does not name; 0 is legal and does nothing.
      alpha: the numerator of the scaling; `rank` if None.
      targets: `"all-linear"`, a regex (matched whole, against the module's path written with dots), or names: a
        module's path, whole or a suffix at a separator; `/` and `.` are the same.
      exclude: names or a regex, never targeted.
      layers_to_transform: layer numbers to adapt; all if None.
      layers_pattern: the path parts in front of a layer number (`"layers"`, `"h"`); any if empty.
      rank_pattern: ranks by module name or regex suffix, the first match wins.
      alpha_pattern: the same for alpha.
      rank_stabilized: scale by `alpha / sqrt(r)`.
      dropout: the rate on the branch's input; acts where `attach` gets a `dropout_key`.
      factor_bias: give B a bias of its own.
      bias: train the base's biases: `none`, `all`, or `lora_only` (those beside an adapted kernel).
      modules_to_save: modules whose weights are copied and trained whole (a classifier).
      init: A's distribution: `kaiming`, U(±1/sqrt(in)), or `gaussian`, N(0, 1/r²). B starts at zero. Of an embedding, A
        is zero and B is N(0, 1).
      share_a: one A for all the experts of a kernel, and a B for each: half of what there is to train. Experts are the
        batch axes that a single product goes over (`Kernel.experts`); stacked layers keep an A each.

    Raises:
      SpecError: a value out of range.

    Example:
      >>> LoRA(rank=8, alpha=16, targets=["q_proj", "v_proj"]).scaling(8)
      2.0
    """

    rank: int = 8
    alpha: float | None = None
    rank_pattern: Patterns[int] = ()
    alpha_pattern: Patterns[float] = ()
    rank_stabilized: bool = False
    dropout: float = 0.0
    factor_bias: bool = False
    init: Init = "kaiming"
    share_a: bool = False

    method = "lora"
    shown: ClassVar = ("rank", "alpha", "targets")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.freeze("rank_pattern", frozen_mapping(self.rank_pattern))
        self.freeze("alpha_pattern", frozen_mapping(self.alpha_pattern))
        for name, rank in (("rank", self.rank), *frozen_mapping(self.rank_pattern)):
            self.check_ranks(name, rank)
        for name, alpha in (("alpha", self.alpha), *frozen_mapping(self.alpha_pattern)):
            self.check_number(name, alpha or 0)
        self.check_regexes(*self.patterns)
        self.check_rate("dropout")
        self.check_one_of("init", ("kaiming", "gaussian"))

    @property
    def patterns(self) -> tuple[str, ...]:
        """The names and regexes of the rank and alpha patterns."""
        return (*names_of(self.rank_pattern), *names_of(self.alpha_pattern))

    @property
    def dropout_rate(self) -> float:
        """Of the dropout on the input of the branch."""
        return self.dropout

    def check_kernels(self, kernels: Iterable[Kernel]) -> None:
        """`share_a` needs experts."""
        if self.share_a and not any(kernel.experts for kernel in kernels):
            raise self.fail(
                "share_a is for the experts of a kernel, and no target has any; take kernels= from jpeft.kernels, or "
                "by hand say which batch axes they are: Kernel(..., batch=(0,), experts=(0,))"
            )

    def rank_of(self, *names: str) -> int:
        """r of the weight in a module, or by its other names."""
        return pattern_value(self.rank_pattern, names, self.rank)

    def alpha_of(self, *names: str) -> float:
        """Alpha of the weight in a module, or by its other names."""
        return pattern_value(self.alpha_pattern, names, self.rank if self.alpha is None else self.alpha)

    def scaling(self, rank: int, alpha: float | None = None) -> float:
        """s: `alpha / r`, or `alpha / sqrt(r)` if rank-stabilised; 0 at rank 0, where there is nothing to scale."""
        alpha = (self.rank if self.alpha is None else self.alpha) if alpha is None else alpha
        return 0.0 if rank == 0 else alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def init(key: Array, site: Site, spec: LoRA, weight: Array, dtype: jnp.dtype) -> Leaves:
    """The trained leaves of one kernel, `a`, `b` and perhaps `bias`.

    The change is exactly zero: B is zero, or A for an embedding.
    """
    kernel, shape = site.kernel, shapes(spec, site)
    if kernel.kind == "embedding":
        leaves = {"a": jnp.zeros(shape["a"], dtype), "b": jax.random.normal(key, shape["b"], dtype)}
    else:
        leaves = {"a": _draw_a(key, shape["a"], spec.init, kernel.fan_in, dtype), "b": jnp.zeros(shape["b"], dtype)}
    return leaves | ({"bias": jnp.zeros(shape["bias"], dtype)} if "bias" in shape else {})


def shapes(spec: LoRA, site: Site) -> Shapes:
    """`a` (*batch, *contracted, r), `b` (*batch, r, *output), `bias` (*batch, *output), `scaling` (*batch,).

    A that experts share has size 1 along their axes.
    """
    kernel, batch = site.kernel, site.kernel.batch_shape
    shared = kernel.experts if spec.share_a else ()
    a_batch = (1 if axis in shared else kernel.shape[axis] for axis in kernel.batch)
    output = kernel.sizes(kernel.output)
    bias = {"bias": (*batch, *output)} if spec.factor_bias else {}
    a = (*a_batch, *kernel.sizes(kernel.contracted), site.rank)
    return {"a": a, "b": (*batch, site.rank, *output), "scaling": batch} | bias


def axes(kernel: Kernel) -> dict[str, Axes]:
    """Which axis of the weight each axis of a leaf is."""
    batch, contracted, output = kernel.batch, kernel.contracted, kernel.output
    b = (*batch, None, *output)
    return {"a": (*batch, *contracted, None), "b": b, "mask": b, "bias": (*batch, *output), "scaling": batch}


def _draw_a(key: Array, shape: tuple[int, ...], how: Init, fan_in: int, dtype: jnp.dtype) -> Array:
    if how == "gaussian":
        return gaussian(key, shape, 1 / max(shape[-1], 1), dtype)
    return uniform(key, shape, 1 / math.sqrt(max(fan_in, 1)), dtype)


def constant(spec: LoRA, site: Site) -> Leaves:
    """`scaling` (*batch,): s of each matrix; 0 where `layers` leaves a slice of a stack alone."""
    value = spec.scaling(site.rank, spec.alpha_of(module_of(site.path), site.path))
    return {"scaling": jnp.asarray(site.chosen * np.float32(value))}


def matrices(leaves: Leaves, kernel: Kernel) -> Leaves:
    """A (*batch, in, r), that of experts repeated where they share it, B (*batch, r, out), bias (*batch, out).

    B is held to its `mask`, where there is one (`mask_shapes`): a gradient outside it is zero, so it stays.
    """
    batch, rank = kernel.batch_shape, leaves["a"].shape[-1]
    shapes = {"b": (*batch, rank, kernel.fan_out), "bias": (*batch, kernel.fan_out)}
    held = leaves | ({"b": leaves["b"] * leaves["mask"].astype(leaves["b"].dtype)} if "mask" in leaves else {})
    found = {n: leaf.reshape(shapes[n]) if n in shapes else leaf for n, leaf in held.items() if n != "mask"}
    return found | {"a": _every_a(leaves["a"], kernel)}


def _every_a(a: Array, kernel: Kernel) -> Array:
    """A of each matrix (*batch, in, r), from one that may have size 1 along axes that share it."""
    batch, found = kernel.batch_shape, a.shape
    lead = tuple(1 if own == 1 else size for own, size in zip(found, batch, strict=False))
    matrices = a.reshape(*lead, kernel.fan_in, found[-1])
    return matrices if lead == batch else jnp.broadcast_to(matrices, (*batch, *matrices.shape[-2:]))


def mask_shapes(kernel: Kernel, rank: int) -> list[tuple[int, ...]]:
    """The shapes that a constant leaf `mask` may have: (*batch, r, *output), or one value for all outputs.

    It makes several low-rank changes one: direction i acts on output j with mask[i, j] times its scaling. So the layers
    of a stack may differ in rank, and each part of a fused weight (q, k and v) may have an adapter of its own.
    """
    output = kernel.sizes(kernel.output)
    return [(*kernel.batch_shape, rank, *sizes) for sizes in (output, (1,) * len(output))]


def delta(leaves: Leaves) -> Array:
    """ΔW = s A B, (*batch, in, out)."""
    return leaves["scaling"][..., None, None] * jnp.matmul(leaves["a"], leaves["b"], precision="highest")


def transform(w: Array, leaves: Leaves) -> Array:
    """W' = W + s A B."""
    return w + delta(leaves)


def weighted(leaves: Leaves, weight: Array) -> Leaves:
    """The same adapter, with `weight` times its effect."""
    return leaves | {"scaling": leaves["scaling"] * weight}


def product(x: Array, y: Array, w: Weights, leaves: Leaves, *, forward_mode: bool) -> Array:
    """y = x W + s (x A) B, the branch in the factors' dtype."""
    a, b = leaves["a"], leaves["b"]
    return named((low_rank_plain if forward_mode else low_rank)(x.astype(a.dtype), y, a, b, _scaling(leaves)))


def _scaling(leaves: Leaves) -> Array:
    """s in the factors' dtype."""
    return leaves["scaling"].astype(leaves["a"].dtype)


def transposed(leaves: Leaves) -> Leaves:
    """(A B)ᵀ = Bᵀ Aᵀ."""
    return leaves | {"a": leaves["b"].mT, "b": leaves["a"].mT}


def lookup(meeting: Meeting, y: Array, w: Weights, leaves: Leaves) -> Array:
    """Row i of s A B is s A[i] B; a convolution with s A B is one with A, then B at each point."""
    return named(y + looked_up(meeting, leaves).astype(y.dtype))


def looked_up(meeting: Meeting, leaves: Leaves) -> Array:
    """What `lookup` adds, in the factors' dtype."""
    return meeting.each(_scaling(leaves)[..., None]) * meeting.then(meeting.take(leaves["a"]), leaves["b"])


def bias(leaves: Leaves) -> Array | None:
    """s b_B, (*batch, out): what the bias of B adds to the layer's result."""
    return _scaling(leaves)[..., None] * leaves["bias"] if "bias" in leaves else None


METHOD = Method(
    transform,
    matrices,
    init=init,
    shapes=shapes,
    axes=axes,
    constant=constant,
    delta=delta,
    weighted=weighted,
    product=product,
    transposed=transposed,
    lookup=lookup,
    bias=bias,
)
