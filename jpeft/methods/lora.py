"""LoRA: low-rank adaptation.

    W' = W + s A B,    s = alpha / r  (rank-stabilised: alpha / sqrt(r)),    y = x W' + b (+ s b_B)

with W (in, out), A (in, r), B (r, out). Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models",
arXiv:2106.09685; the rank-stabilised scaling is Kalajdzievski 2023, arXiv:2312.03732. The papers write y = W x, so
their A and B are these, transposed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from jpeft.errors import SpecError
from jpeft.kernel import Kernel
from jpeft.low_rank import low_rank, low_rank_plain
from jpeft.method import Leaves, Method
from jpeft.targets import Patterns, Targets, frozen_mapping, frozen_names, pattern_value

Bias = Literal["none", "all", "lora_only"]
Init = Literal["kaiming", "gaussian"]


@dataclass(frozen=True, repr=False)
class LoRA:
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

    Raises:
      SpecError: a value out of range.

    Example:
      >>> LoRA(rank=8, alpha=16, targets=["q_proj", "v_proj"]).scaling(8)
      2.0
    """

    rank: int = 8
    alpha: float | None = None
    targets: str | Sequence[str] = "all-linear"
    exclude: str | Sequence[str] = ()
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] = ()
    rank_pattern: Patterns[int] = ()
    alpha_pattern: Patterns[float] = ()
    rank_stabilized: bool = False
    dropout: float = 0.0
    factor_bias: bool = False
    bias: Bias = "none"
    modules_to_save: str | Sequence[str] = ()
    init: Init = "kaiming"

    method = "lora"

    def __post_init__(self) -> None:
        freeze = lambda name, value: object.__setattr__(self, name, value)
        freeze("targets", frozen_names(self.targets))
        freeze("exclude", frozen_names(self.exclude))
        freeze("modules_to_save", frozen_names(self.modules_to_save, regex=False))
        freeze("layers_pattern", frozen_names(self.layers_pattern, regex=False))
        if self.layers_to_transform is not None:
            layers = self.layers_to_transform
            freeze("layers_to_transform", (layers,) if isinstance(layers, int) else tuple(layers) or None)
        freeze("rank_pattern", frozen_mapping(self.rank_pattern))
        freeze("alpha_pattern", frozen_mapping(self.alpha_pattern))
        _check(self)

    def __repr__(self) -> str:
        shown = ("rank", "alpha", "targets")
        kept = [f for f in fields(self) if f.name in shown or getattr(self, f.name) != f.default]
        return f"LoRA({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in kept)})"

    @property
    def where(self) -> Targets:
        """The part of the spec that says which weights are meant."""
        layers: Any = self.layers_to_transform  # a tuple or None since __post_init__
        names = frozen_names(self.targets), frozen_names(self.exclude)
        return Targets(*names, layers, frozen_names(self.layers_pattern, regex=False), tuple(self.modules_to_save))

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


def _check(spec: LoRA) -> None:
    for name, rank in (("rank", spec.rank), *frozen_mapping(spec.rank_pattern)):
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
            raise SpecError(f"LoRA: {name} must be an integer >= 0; found {rank!r}")
    regexes = [names for names in (spec.targets, spec.exclude) if isinstance(names, str)]
    patterns = (*frozen_mapping(spec.rank_pattern), *frozen_mapping(spec.alpha_pattern))
    for regex in (*regexes, *(name for name, _ in patterns), *spec.layers_pattern):
        _check_regex(regex)
    if not 0 <= spec.dropout < 1:
        raise SpecError(f"LoRA: dropout must be in [0, 1); found {spec.dropout!r}")
    for name, known in (("bias", ("none", "all", "lora_only")), ("init", ("kaiming", "gaussian"))):
        if getattr(spec, name) not in known:
            raise SpecError(f"LoRA: {name} must be one of {known}; found {getattr(spec, name)!r}")


def _check_regex(regex: str) -> None:
    try:
        re.compile(regex)
    except re.error as error:
        raise SpecError(f"LoRA: {regex!r} is no regex ({error}); names go in a list: targets=[{regex!r}]") from error


def init(key: Array, kernel: Kernel, spec: LoRA, rank: int, dtype: jnp.dtype) -> Leaves:
    """The trained leaves of one kernel: `a` (*batch, *contracted, r), `b` (*batch, r, *output), perhaps `bias`.

    The change is exactly zero: B is zero, or A for an embedding.
    """
    a_shape = (*kernel.batch_shape, *kernel.sizes(kernel.contracted), rank)
    b_shape = (*kernel.batch_shape, rank, *kernel.sizes(kernel.output))
    if kernel.kind == "embedding":
        leaves = {"a": jnp.zeros(a_shape, dtype), "b": jax.random.normal(key, b_shape, dtype)}
    else:
        leaves = {"a": _draw_a(key, a_shape, spec.init, kernel.fan_in, dtype), "b": jnp.zeros(b_shape, dtype)}
    if spec.factor_bias:
        leaves["bias"] = jnp.zeros((*kernel.batch_shape, *kernel.sizes(kernel.output)), dtype)
    return leaves


def _draw_a(key: Array, shape: tuple[int, ...], how: Init, fan_in: int, dtype: jnp.dtype) -> Array:
    if how == "gaussian":
        return jax.random.normal(key, shape, dtype) / max(shape[-1], 1)
    bound = 1 / math.sqrt(max(fan_in, 1))
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def matrices(leaves: Leaves, kernel: Kernel) -> Leaves:
    """A (*batch, in, r), B (*batch, r, out), bias (*batch, out)."""
    batch, rank = kernel.batch_shape, leaves["a"].shape[-1]
    shapes = {"a": (*batch, kernel.fan_in, rank), "b": (*batch, rank, kernel.fan_out), "bias": (*batch, kernel.fan_out)}
    return {name: leaf.reshape(shapes[name]) if name in shapes else leaf for name, leaf in leaves.items()}


def delta(leaves: Leaves) -> Array:
    """ΔW = s A B, (*batch, in, out)."""
    return leaves["scaling"][..., None, None] * jnp.matmul(leaves["a"], leaves["b"], precision="highest")


def transform(w: Array, leaves: Leaves) -> Array:
    """W' = W + s A B."""
    return w + delta(leaves)


def weighted(leaves: Leaves, weight: Array) -> Leaves:
    """The same adapter, with `weight` times its effect."""
    return leaves | {"scaling": leaves["scaling"] * weight}


def product(x: Array, y: Array, leaves: Leaves, *, forward_mode: bool) -> Array:
    """y = x W + s (x A) B, the branch in the factors' dtype."""
    branch = low_rank_plain if forward_mode else low_rank
    a, b = leaves["a"], leaves["b"]
    return y + branch(x.astype(a.dtype), a, b, _scaling(leaves)).astype(y.dtype)


def _scaling(leaves: Leaves) -> Array:
    """s in the factors' dtype."""
    return leaves["scaling"].astype(leaves["a"].dtype)


def transposed(leaves: Leaves) -> Leaves:
    """(A B)ᵀ = Bᵀ Aᵀ."""
    return leaves | {"a": leaves["b"].mT, "b": leaves["a"].mT}


def lookup(take: Callable[[Array], Array], leaves: Leaves) -> Array:
    """Row i of s A B is s A[i] B; a convolution with s A B is one with A, then B at each point."""
    return _scaling(leaves) * (take(leaves["a"]) @ leaves["b"])


def bias(leaves: Leaves) -> Array | None:
    """s b_B, (*batch, out): what the bias of B adds to the layer's result."""
    return _scaling(leaves)[..., None] * leaves["bias"] if "bias" in leaves else None


METHOD = Method(transform, matrices, delta, weighted, product, transposed, lookup, bias)
