"""Random starts of leaves: the same bits under jit and outside.

Whatever multiplies and adds may be rounded once in one program and twice in another. So a draw comes from values that
are exact, or is kept apart from what follows by a barrier, and then is multiplied once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def uniform(key: Array, shape: tuple[int, ...], bound: float, dtype: jnp.dtype) -> Array:
    """Draw from U(±bound).

    A draw in [0, 1) has so few bits that twice it less one is exact, whether or not the two are fused.
    """
    return bound * jax.lax.optimization_barrier(jax.random.uniform(key, shape, dtype, -1, 1))


def gaussian(key: Array, shape: tuple[int, ...], deviation: float, dtype: jnp.dtype) -> Array:
    """Draw from N(0, deviation²); the barrier keeps the deviation and the normal's own factor from becoming one."""
    return deviation * jax.lax.optimization_barrier(jax.random.normal(key, shape, dtype))
