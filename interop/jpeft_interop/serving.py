"""What vLLM's loader takes: plain LoRA, one rank and one scaling for all modules.

vLLM reads `r`, `lora_alpha` and `use_rslora` and passes over every other field, patterns too: a module whose alpha a
pattern sets would be scaled as the others are, silently. It refuses DoRA, saved modules and trained biases. So here the
scaling of each module goes into its B, smaller ranks are filled up with zeros, and what has no such form is refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np

import jpeft
from jpeft.adapter import Adapter, Meta
from jpeft.errors import AdapterError
from jpeft_interop.split import Matrix

Target = Literal["peft", "vllm"]
MERGE = "merge it into the base instead: `jpeft merge MODEL ADAPTER OUT`, or jpeft.merge(params, adapter)"


def plain_lora(adapter: Adapter) -> Adapter:
    """The adapter as a LoRA that vLLM may take; an AdaLoRA is one, its E taken into A.

    Raises:
      AdapterError: it has what vLLM's loader refuses; says what to do.
    """
    spec: Any = adapter.spec
    if isinstance(spec, jpeft.AdaLoRA):
        return _folded(adapter)
    if spec.method != jpeft.LoRA.method:  # a subclass of its spec is another method
        to_lora = "jpeft.algebra.to_lora(adapter, rank=64, params=params), which says what that loses"
        raise AdapterError(
            f"vLLM serves LoRA alone, and this is {spec.method!r}: {MERGE}; or make it a LoRA, {to_lora}"
        )
    if whole := [site.path for site in adapter.sites if site.method == "replacement"]:
        raise AdapterError(f"vLLM takes no weights that are trained whole ({whole[0]!r}): {MERGE}")
    if spec.factor_bias:
        raise AdapterError(f"vLLM takes no bias of B (factor_bias): {MERGE}")
    return adapter


def _folded(adapter: Adapter) -> Adapter:
    """An AdaLoRA as a LoRA of the same ranks: s A E B."""
    spec: Any = adapter.spec
    plain = jpeft.LoRA(rank=spec.rank, alpha=spec.rank, targets=spec.targets, exclude=spec.exclude, bias=spec.bias)
    if spec.bias != "none" or spec.modules_to_save:
        raise AdapterError(f"vLLM takes no weights that are trained whole: {MERGE}")
    trained = {
        path: {"a": _times(np.asarray(leaves["a"]), _beside(np.asarray(leaves["e"]), leaves["a"])), "b": leaves["b"]}
        for path, leaves in adapter.trained.items()
    }
    constant = {path: {"scaling": leaves["scaling"]} for path, leaves in adapter.constant.items()}
    sites = tuple(replace(site, method="lora") for site in adapter.sites)
    return Adapter(trained, constant, Meta(plain, sites))


def _beside(e: Any, a: Any) -> Any:
    """E (*batch, r) beside A (*batch, *contracted, r)."""
    return e.reshape(*e.shape[:-1], *[1] * (a.ndim - e.ndim), e.shape[-1])


def uniform(matrices: list[Matrix], spec: Any) -> tuple[list[Matrix], Any]:
    """The same changes with one rank and one scaling, and the spec that says so; as they are, where they have those.

    Raises:
      AdapterError: experts' stacked kernels, which vLLM has under names of each model's own.
    """
    if stacked := [matrix.spot.module for matrix in matrices if matrix.spot.is_parameter]:
        raise AdapterError(f"vLLM's names for adapters of experts ({stacked[0]!r}) are each model's own: {MERGE}")
    rank = max((matrix.rank for matrix in matrices), default=0)
    stated = np.float32(spec.scaling(rank))
    alike = all(m.rank == rank and abs(np.float32(m.scaling) - stated) <= 1e-6 * abs(stated) for m in matrices)
    if alike and spec.rank == rank:
        return matrices, replace(spec, rank_pattern=(), alpha_pattern=())
    plain = replace(spec, rank=rank, alpha=rank, rank_pattern=(), alpha_pattern=(), rank_stabilized=False)
    return [_unscaled(matrix, rank) for matrix in matrices], plain


def _unscaled(matrix: Matrix, rank: int) -> Matrix:
    """Scaling 1, and so many directions."""
    a, b = matrix.leaves["a"], _times(matrix.leaves["b"], np.float32(matrix.scaling))
    more = rank - matrix.rank
    leaves = {"a": np.pad(a, ((0, 0), (0, more))), "b": np.pad(b, ((0, more), (0, 0)))}
    return replace(matrix, leaves=leaves, scaling=1.0)


def _times(leaf: np.ndarray, factor: Any) -> np.ndarray:
    """Multiply, in the leaf's dtype where that holds the product exactly, else in float32: rounded once."""
    made = leaf.astype(np.promote_types(leaf.dtype, np.float32)) * np.asarray(factor, np.float32)
    return made.astype(leaf.dtype) if np.array_equal(made.astype(leaf.dtype), made) else made
