"""Whether numbers are numbers: no infinity and no NaN, found without a copy of the whole."""

from __future__ import annotations

import numpy as np

CHUNK = 1 << 18
HALVES = ("bfloat16", "float16")


def is_finite(array: np.ndarray) -> bool:
    """Whether all values are finite, in the precision that they have."""
    flat = array.reshape(-1) if array.flags.c_contiguous else array.ravel(order="K")
    check = _half_is_finite if flat.dtype.name in HALVES else _chunk_is_finite
    return all(check(flat[start : start + CHUNK]) for start in range(0, flat.size, CHUNK))


def _half_is_finite(chunk: np.ndarray) -> bool:
    """By the bits, where NumPy is slow: those of the exponent are all ones in what is infinite or no number."""
    exponent = np.array(np.inf, chunk.dtype).view(np.uint16)
    return bool((chunk.view(np.uint16) & exponent).max() != exponent)


def _chunk_is_finite(chunk: np.ndarray) -> bool:
    return bool(np.isfinite(chunk.astype(np.float32) if chunk.dtype.itemsize < 4 else chunk).all())
