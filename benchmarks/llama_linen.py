"""The model that the benchmarks train: Llama-shaped, Linen, written by someone who knows nothing of adapters."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Block(nn.Module):
    """Attention and a gated MLP, both with RMSNorm in front and a residual around."""

    d: int
    ff: int
    heads: int

    @nn.compact
    def __call__(self, x):
        """x (batch, tokens, d) -> the same."""
        dense = lambda n, name: nn.Dense(n, use_bias=False, name=name)
        b, t, d = x.shape
        y = nn.RMSNorm(name="norm1")(x)
        q, k, v = (dense(d, n)(y).reshape(b, t, self.heads, -1) for n in ("q_proj", "k_proj", "v_proj"))
        s = jnp.einsum("bthd,bshd->bhts", q, k) / (d // self.heads) ** 0.5
        s = jnp.where(jnp.tril(jnp.ones((t, t), bool)), s, -1e30)
        o = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(s), v).reshape(b, t, d)
        x = x + dense(d, "o_proj")(o)
        y = nn.RMSNorm(name="norm2")(x)
        return x + dense(d, "down_proj")(nn.silu(dense(self.ff, "gate_proj")(y)) * dense(self.ff, "up_proj")(y))


class LM(nn.Module):
    """Tokens (batch, tokens) to logits (batch, tokens, vocab)."""

    vocab: int = 8192
    d: int = 512
    ff: int = 1376
    layers: int = 8
    heads: int = 8
    scan: bool = False  # the layers as one, its params stacked

    @nn.compact
    def __call__(self, tokens):
        """Logits (batch, tokens, vocab)."""
        x = nn.Embed(self.vocab, self.d, name="embed")(tokens)
        block = lambda name: Block(self.d, self.ff, self.heads, name=name)
        if self.scan:
            over = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": self.layers}
            x, _ = nn.scan(lambda layer, x, _: (layer(x), None), **over)(block("layers"), x, None)
        else:
            for i in range(self.layers):
                x = block(f"layers_{i}")(x)
        return nn.Dense(self.vocab, use_bias=False, name="lm_head")(nn.RMSNorm(name="norm")(x))
