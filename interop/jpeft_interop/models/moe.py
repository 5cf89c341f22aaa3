"""A mixture of experts in place of an MLP: Shazeer et al. 2017, https://arxiv.org/abs/1701.06538.

Each token goes to the few experts that its router likes best. Tokens are sorted by expert, so that the experts'
products are ragged ones over stacked kernels: no token is computed by an expert that it was not sent to.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jpeft_interop.models.activations import gated
from jpeft_interop.models.llama_config import LlamaConfig, Mixture


def _drawn(config: LlamaConfig, sizes: tuple[int, ...], dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param(jax.nn.initializers.normal(config.initializer_range)(rngs.params(), sizes, dtype))


class Router(nnx.Module):
    """Says which experts a token goes to, and how much each counts."""

    def __init__(self, config: LlamaConfig, mixture: Mixture, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """A `weight` of (experts, hidden)."""
        self.weight = _drawn(config, (mixture.experts, config.hidden_size), dtype, rngs)
        self.mixture = mixture

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """The experts' weights and numbers, both `(tokens, chosen)`, the likeliest first, of `(tokens, hidden)`."""
        logits = x @ self.weight[...].T
        weights, experts = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32)), self.mixture.chosen)
        if self.mixture.normalise:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return weights if self.mixture.wide else weights.astype(logits.dtype), experts


class Experts(nnx.Module):
    """down(act(gate(x)) · up(x)), each expert with kernels of its own: torch's stacks, rows out and columns in."""

    def __init__(self, config: LlamaConfig, mixture: Mixture, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """`gate_up_proj` is (experts, 2 · width, hidden), `down_proj` (experts, hidden, width)."""
        experts, hidden, width = mixture.experts, config.hidden_size, mixture.width
        self.gate_up_proj = _drawn(config, (experts, 2 * width, hidden), dtype, rngs)
        self.down_proj = _drawn(config, (experts, hidden, width), dtype, rngs)
        self.hidden_act = config.hidden_act

    def __call__(self, x: Array, sizes: Array) -> Array:
        """Of `(rows, hidden)`, sorted by expert, the first `sizes[0]` of which are the first expert's, and so on."""
        gate, up = jnp.split(jax.lax.ragged_dot(x, self.gate_up_proj[...].transpose(0, 2, 1), sizes), 2, axis=-1)
        x = gated(self.hidden_act, gate, up)
        return jax.lax.ragged_dot(x, self.down_proj[...].transpose(0, 2, 1), sizes)


class SparseMLP(nnx.Module):
    """The weighted sum of what a token's experts make of it."""

    def __init__(self, config: LlamaConfig, mixture: Mixture, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """One layer's router and experts."""
        self.gate = Router(config, mixture, dtype, rngs)
        self.experts = Experts(config, mixture, dtype, rngs)
        self.mixture = mixture

    def __call__(self, x: Array) -> Array:
        """On `(batch, time, hidden)`."""
        tokens = x.reshape(-1, x.shape[-1])
        weights, experts = self.gate(tokens)
        order = jnp.argsort(experts.reshape(-1))
        sizes = jnp.bincount(experts.reshape(-1), length=self.mixture.experts)
        rows = self.experts(tokens[order // self.mixture.chosen], sizes.astype(jnp.int32))
        made = rows[jnp.argsort(order)].reshape(*experts.shape, -1)
        return jnp.sum((made * weights[..., None]).astype(x.dtype), axis=1).reshape(x.shape)
