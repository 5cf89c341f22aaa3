"""NumPy arrays into JAX and back, without casts and without shared memory."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

ALIGNMENT = 64
CHUNK = 1 << 20


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
    """The values of a leaf in NumPy, at most one copy: JAX would keep the copy of a device's array for good."""
    if isinstance(leaf, jax.Array) and any(device.platform != "cpu" for device in leaf.devices()):
        return np.asarray(leaf.copy())
    return np.asarray(leaf)


def is_finite(array: np.ndarray) -> bool:
    """Whether all values are finite, found without a copy of the whole."""
    flat = array.reshape(-1) if array.flags.c_contiguous else array.ravel(order="K")
    narrow = flat.dtype.itemsize < 4  # NumPy is slow on what it does not know
    for start in range(0, flat.size, CHUNK):
        chunk = flat[start : start + CHUNK]
        if not np.isfinite(chunk.astype(np.float32) if narrow else chunk).all():
            return False
    return True
