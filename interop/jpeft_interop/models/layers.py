"""The two weights every model here is made of, with their random starts."""

from __future__ import annotations

import jax
from flax import nnx
from jax.typing import DTypeLike


def linear(sizes: tuple[int, int], deviation: float, dtype: DTypeLike, rngs: nnx.Rngs, bias: bool = True) -> nnx.Linear:
    """x · kernel + bias, the kernel `sizes` (in, out), normal with that standard deviation; the bias starts at zero."""
    init = jax.nn.initializers.normal(deviation)
    return nnx.Linear(*sizes, use_bias=bias, param_dtype=dtype, kernel_init=init, rngs=rngs)


def table(sizes: tuple[int, int], deviation: float, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Embed:
    """A lookup in an `embedding` of `sizes` (rows, width), normal with that standard deviation."""
    init = jax.nn.initializers.normal(deviation)
    return nnx.Embed(*sizes, param_dtype=dtype, embedding_init=init, rngs=rngs)
