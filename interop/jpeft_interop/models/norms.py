"""Normalisations with torch's names, `weight` and `bias`; statistics in fp32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike


class RMSNorm(nnx.Module):
    """y = weight · x / sqrt(mean(x²) + ε); rounded to x's dtype before the weight, as Llama does."""

    def __init__(self, size: int, eps: float, dtype: DTypeLike) -> None:
        """A norm over the last axis, of `size`."""
        self.weight = nnx.Param(jnp.ones((size,), dtype))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        """Normalises the last axis."""
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return self.weight[...] * normed.astype(x.dtype)


class UnitRMSNorm(nnx.Module):
    """y = (1 + weight) · x / sqrt(mean(x²) + ε), all of it in fp32, rounded to x's dtype at the end, as Gemma does."""

    def __init__(self, size: int, eps: float, dtype: DTypeLike) -> None:
        """A norm over the last axis, of `size`; its `weight` is the distance from 1."""
        self.weight = nnx.Param(jnp.zeros((size,), dtype))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        """Normalises the last axis."""
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (normed * (1.0 + self.weight[...].astype(jnp.float32))).astype(x.dtype)


class LayerNorm(nnx.Module):
    """y = weight · (x - mean) / sqrt(var + ε) + bias, all of it in fp32, rounded to x's dtype at the end."""

    def __init__(self, size: int, eps: float, dtype: DTypeLike) -> None:
        """A norm over the last axis, of `size`."""
        self.weight = nnx.Param(jnp.ones((size,), dtype))
        self.bias = nnx.Param(jnp.zeros((size,), dtype))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        """Normalises the last axis."""
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        return (normed * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)
