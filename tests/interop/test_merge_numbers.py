"""Merging rounds once: against float64, half a unit in the last place, whole and streamed; the base stays as it is.

The sum is made in fp32 and rounded to the weight's type. What fp32 itself is off by is all that comes on top of half a
unit: of bf16 under a thousandth of one, of fp16 under a hundredth; of fp32 it is bounded by its own r + 2 roundings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jpeft
from jpeft.tree import flatten
from test_merge_stream import NAMES, merged, normal, trained, written

SPEC = jpeft.LoRA(rank=5, alpha=3, targets=NAMES)
EPS32 = 2.0**-24


def units(exact: np.ndarray, dtype: Any) -> np.ndarray:
    """One unit in the last place of each value, in a binary type."""
    found = ml_dtypes.finfo(dtype)
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(exact), 1e-300))), found.minexp)
    return 2.0 ** (exponent - found.nmant)


def exact_and_sizes(params: Any, adapter: jpeft.Adapter) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """W + s A B in float64, and |W| + s |A| |B|."""
    scale, found = adapter.spec.scaling(5, 3), {}
    for path, leaves in adapter.trained.items():
        w, a, b = (np.asarray(leaf, np.float64) for leaf in (flatten(params)[path], leaves["a"], leaves["b"]))
        found[path] = (w + scale * (a @ b), np.abs(w) + scale * (np.abs(a) @ np.abs(b)))
    return found


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_half_a_unit_in_the_last_place(dtype: Any, tmp_path: Path) -> None:
    _, params = written(tmp_path / "base", normal, dtype)
    adapter = trained(SPEC, params, normal)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(adapter.trained))
    streamed, whole = merged(tmp_path, params, adapter)
    for path, (exact, sizes) in exact_and_sizes(params, adapter).items():
        unit = units(exact, dtype)
        allowed = 0.5 * unit + (SPEC.rank + 2) * EPS32 * sizes
        for made in (streamed[path], whole[path]):
            assert made.dtype == dtype
            off = np.abs(np.asarray(made, np.float64) - exact)
            assert (off <= allowed).all(), (path, (off / unit).max())
            if dtype != jnp.float32:
                nearest = np.asarray(exact.astype(np.dtype(dtype)), np.float64)
                assert np.mean(np.asarray(made, np.float64) == nearest) > 0.998  # the rest lie halfway, to fp32


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rounding_twice_would_show(dtype: Any, tmp_path: Path) -> None:
    """The control: the change rounded first, as a merge in the weight's own type does it, is beyond the bound."""
    _, params = written(tmp_path / "base", normal, dtype)
    adapter = trained(SPEC, params, normal)
    worst = 0.0
    for path, (exact, sizes) in exact_and_sizes(params, adapter).items():
        w = np.asarray(flatten(params)[path], np.float64)
        twice = (w + (exact - w).astype(np.dtype(dtype)).astype(np.float64)).astype(np.dtype(dtype))
        allowed = 0.5 * units(exact, dtype) + (SPEC.rank + 2) * EPS32 * sizes
        worst = max(worst, float((np.abs(twice.astype(np.float64) - exact) / allowed).max()))
    assert worst > 1.5


def test_to_unmerge_is_to_have_kept_the_base(tmp_path: Path) -> None:
    """Merging leaves the base alone, in memory and on the disk; to take the change off again would not give it back."""
    _, params = written(tmp_path / "base", normal, jnp.bfloat16)
    before = {path: np.array(leaf) for path, leaf in flatten(params).items()}
    files = {file: file.read_bytes() for file in (tmp_path / "base").iterdir()}
    adapter = trained(SPEC, params, normal)
    _, whole = merged(tmp_path, params, adapter)
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(np.asarray(leaf), before[path])
    assert {file: file.read_bytes() for file in (tmp_path / "base").iterdir()} == files
    lost = 0
    for path, (exact, _) in exact_and_sizes(params, adapter).items():
        w = np.asarray(before[path], np.float64)
        back = (np.asarray(whole[path], np.float64) - (exact - w)).astype(before[path].dtype)
        lost += int((np.asarray(back, np.float64) != w).sum())
    assert lost > 0
