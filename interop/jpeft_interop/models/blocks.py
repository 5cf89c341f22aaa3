"""Attention and MLP of Llama's family: their projections apart, or fused as Phi-3 has them."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jpeft_interop.models.activations import gated
from jpeft_interop.models.attention import attend
from jpeft_interop.models.cache import Cache, KeyValue, remember
from jpeft_interop.models.layers import linear
from jpeft_interop.models.llama_config import LlamaConfig
from jpeft_interop.models.norms import RMSNorm, UnitRMSNorm
from jpeft_interop.models.rope import rotate

Tables = tuple[Array, Array]


def norm(config: LlamaConfig, size: int, dtype: DTypeLike) -> RMSNorm | UnitRMSNorm:
    """A norm over `size`, of the family's kind."""
    return (UnitRMSNorm if config.unit_norms else RMSNorm)(size, config.rms_norm_eps, dtype)


def projection(config: LlamaConfig, sizes: tuple[int, int], bias: bool, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear map from and to `sizes`."""
    return linear(sizes, config.initializer_range, dtype, rngs, bias)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """One layer's attention."""
        self.head_dim, self.scale, self.cap = config.head_dim, config.scale, config.attention_cap
        self.widths = (config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim)
        self._make_inputs(config, dtype, rngs)
        self.o_proj = projection(config, (self.widths[0], config.hidden_size), config.o_bias, dtype, rngs)
        self.q_norm = norm(config, self.head_dim, dtype) if config.qk_norm else None
        self.k_norm = norm(config, self.head_dim, dtype) if config.qk_norm else None

    def _make_inputs(self, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        hidden, (queries, kv) = config.hidden_size, self.widths
        self.q_proj = projection(config, (hidden, queries), config.qkv_bias, dtype, rngs)
        self.k_proj = projection(config, (hidden, kv), config.qkv_bias, dtype, rngs)
        self.v_proj = projection(config, (hidden, kv), config.qkv_bias, dtype, rngs)

    def _inputs(self, x: Array) -> tuple[Array, Array, Array]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def __call__(
        self, x: Array, tables: Tables, mask: Array, cache: Cache | None, layer: int
    ) -> tuple[Array, KeyValue | None]:
        """The result, and the keys and values to keep."""
        query, key, value = (
            projected.reshape(*projected.shape[:2], -1, self.head_dim) for projected in self._inputs(x)
        )
        query = query if self.q_norm is None else self.q_norm(query)
        key = key if self.k_norm is None else self.k_norm(key)
        new = rotate(key, tables), value
        (keys, values), kept = remember(cache, layer, new)
        return self.o_proj(attend(rotate(query, tables), keys, values, mask, self.scale, self.cap)), kept


class FusedAttention(Attention):
    """Queries, keys and values from one projection, in this order."""

    def _make_inputs(self, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        queries, kv = self.widths
        self.qkv_proj = projection(config, (config.hidden_size, queries + 2 * kv), config.qkv_bias, dtype, rngs)

    def _inputs(self, x: Array) -> tuple[Array, Array, Array]:
        queries, kv = self.widths
        query, key, value = jnp.split(self.qkv_proj(x), (queries, queries + kv), axis=-1)
        return query, key, value


class MLP(nnx.Module):
    """down(act(gate(x)) · up(x))."""

    def __init__(self, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """One layer's MLP."""
        hidden, wide, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = projection(config, (hidden, wide), bias, dtype, rngs)
        self.up_proj = projection(config, (hidden, wide), bias, dtype, rngs)
        self.down_proj = projection(config, (wide, hidden), bias, dtype, rngs)
        self.hidden_act = config.hidden_act

    def __call__(self, x: Array) -> Array:
        """The MLP on `(batch, time, hidden)`."""
        return self.down_proj(gated(self.hidden_act, self.gate_proj(x), self.up_proj(x)))


class FusedMLP(nnx.Module):
    """The same with gate and up from one projection, in this order."""

    def __init__(self, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """One layer's MLP."""
        hidden, wide, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up_proj = projection(config, (hidden, 2 * wide), bias, dtype, rngs)
        self.down_proj = projection(config, (wide, hidden), bias, dtype, rngs)
        self.hidden_act = config.hidden_act

    def __call__(self, x: Array) -> Array:
        """The MLP on `(batch, time, hidden)`."""
        gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj(gated(self.hidden_act, gate, up))
