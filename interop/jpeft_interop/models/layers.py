"""The two weights every model here is made of, with their random starts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike


class Embedding(nnx.Module):
    """A table of vectors. Its dtype is that of the params a forward is given; `nnx.Embed` would fix it when made."""

    def __init__(self, sizes: tuple[int, int], deviation: float, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """An `embedding` of `sizes` (rows, width), normal with that standard deviation."""
        self.embedding = nnx.Param(jax.nn.initializers.normal(deviation)(rngs.params(), sizes, dtype))

    def __call__(self, ids: Array) -> Array:
        """The vectors of `ids`, one more axis; NaN for an id outside the table."""
        return jnp.take(self.embedding[...], ids, axis=0)

    def attend(self, x: Array) -> Array:
        """The products of `x`, `(batch, time, width)`, with every vector: the head of a tied model."""
        return jnp.einsum("btd,vd->btv", x, self.embedding[...])


def linear(sizes: tuple[int, int], deviation: float, dtype: DTypeLike, rngs: nnx.Rngs, bias: bool = True) -> nnx.Linear:
    """A linear map, its `kernel` of `sizes` (in, out) normal with that standard deviation, its `bias` zero."""
    init = jax.nn.initializers.normal(deviation)
    return nnx.Linear(*sizes, use_bias=bias, param_dtype=dtype, kernel_init=init, rngs=rngs)
