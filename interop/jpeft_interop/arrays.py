"""NumPy arrays into JAX and back, without casts and without shared memory."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from jpeft.shared import values

ALIGNMENT = 64
CHUNK = 1 << 18
HALVES = ("bfloat16", "float16")


def own(array: np.ndarray, dtype: Any = None) -> jax.Array | np.ndarray:
    """A JAX array with a copy of `array`: what happens later to torch's memory or to a mapped file can't reach it.

    Args:
      array: of any shape and strides.
      dtype: what to cast to; its own where None.

    Returns:
      A `jax.Array`. A 64-bit array stays NumPy's (read-only) where JAX runs without x64, since JAX would halve it.
    """
    private = _aligned(array.shape, np.dtype(dtype or array.dtype))
    with np.errstate(over="ignore"):  # what overflows becomes infinite, and is for the caller to find
        np.copyto(private, array, casting="no" if dtype is None else "unsafe")
    if jax.dtypes.canonicalize_dtype(private.dtype) == private.dtype:
        return jax.device_put(private)
    private.flags.writeable = False
    return private


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that a CPU device takes over as it is, where it would copy one that begins elsewhere."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def host(leaf: Any) -> np.ndarray:
    """The values of a leaf in NumPy, at most one copy: JAX would keep the copy of a device's array for good.

    Where several processes share it, all of them have to ask.
    """
    if isinstance(leaf, jax.Array) and any(device.platform != "cpu" for device in leaf.devices()):
        return values(leaf.copy())
    return values(leaf)


def is_finite(array: np.ndarray) -> bool:
    """Whether all values are finite, found without a copy of the whole."""
    flat = array.reshape(-1) if array.flags.c_contiguous else array.ravel(order="K")
    check = _half_is_finite if flat.dtype.name in HALVES else _chunk_is_finite
    return all(check(flat[start : start + CHUNK]) for start in range(0, flat.size, CHUNK))


def _half_is_finite(chunk: np.ndarray) -> bool:
    """By the bits, where NumPy is slow: those of the exponent are all ones in what is infinite or no number."""
    exponent = np.array(np.inf, chunk.dtype).view(np.uint16)
    return bool((chunk.view(np.uint16) & exponent).max() != exponent)


def _chunk_is_finite(chunk: np.ndarray) -> bool:
    return bool(np.isfinite(chunk.astype(np.float32) if chunk.dtype.itemsize < 4 else chunk).all())
