"""NumPy arrays into JAX and back, without casts and without shared memory."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def own(array: np.ndarray, dtype: Any = None) -> jax.Array | np.ndarray:
    """A JAX array with a copy of `array`: what happens later to torch's memory or to a mapped file can't reach it.

    Args:
      array: of any shape and strides.
      dtype: what to cast to; its own where None.

    Returns:
      A `jax.Array`. A 64-bit array stays NumPy's (read-only) where JAX runs without x64, since JAX would halve it.
    """
    private = np.array(array, dtype=dtype, order="C", copy=True)
    if jax.dtypes.canonicalize_dtype(private.dtype) == private.dtype:
        return jax.device_put(private)
    private.flags.writeable = False
    return private


def host(leaf: Any) -> np.ndarray:
    """The values of a leaf in NumPy, at most one copy: JAX would keep the copy of a device's array for good."""
    if isinstance(leaf, jax.Array) and any(device.platform != "cpu" for device in leaf.devices()):
        return np.asarray(leaf.copy())
    return np.asarray(leaf)
