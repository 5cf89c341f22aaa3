"""NumPy arrays into JAX and back, without casts and without shared memory."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from jpeft.shared import values

ALIGNMENT = 64


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
