"""The weights that models here are made of, with their random starts."""

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


class Patches(nnx.Module):
    """Square or oblong patches of images, each mapped to a vector: torch's convolution with steps of its own size."""

    def __init__(
        self,
        patch: tuple[int, int],
        sizes: tuple[int, int],
        deviation: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        bias: bool = True,
    ) -> None:
        """A `kernel` of (height, width, in, out), normal with that standard deviation; `sizes` is (channels, width)."""
        self.kernel = nnx.Param(jax.nn.initializers.normal(deviation)(rngs.params(), (*patch, *sizes), dtype))
        self.bias = nnx.Param(jnp.zeros(sizes[1:], dtype)) if bias else None

    def __call__(self, pixel_values: Array) -> Array:
        """`(batch, patches, width)` of images `(batch, channels, height, width)`, row by row, in the kernel's dtype."""
        kernel = self.kernel[...]
        x = jnp.asarray(pixel_values, kernel.dtype)
        x = jax.lax.conv_general_dilated(
            x, kernel, kernel.shape[:2], "VALID", dimension_numbers=("NCHW", "HWIO", "NHWC")
        )
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        return x if self.bias is None else x + self.bias[...]
