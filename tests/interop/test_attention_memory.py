"""Attention on long sequences: in parts, and without scores kept for the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft_interop.models import attention
from jpeft_interop.models.attention import attend

BATCH, HEADS, KV, DIM = 2, 4, 2, 8


def inputs(time, key=0):
    keys = jax.random.split(jax.random.key(key), 3)
    shape = lambda heads: (BATCH, time, heads, DIM)
    return [jax.random.normal(k, shape(heads)) for k, heads in zip(keys, (HEADS, KV, KV), strict=True)]


def causal(time):
    return jnp.tril(jnp.ones((time, time), bool))[None]


def padded(time):
    return jnp.arange(time)[None, None] < jnp.array([time, time - 5])[:, None, None]


@pytest.mark.parametrize("mask", [None, causal, padded], ids=["all", "causal", "padding"])
def test_parts_are_the_whole(monkeypatch, mask):
    time = 37
    q, k, v = inputs(time)
    mask = None if mask is None else mask(time)
    both = lambda q, k, v: (attend(q, k, v, mask, 0.3) ** 2).sum()
    whole, gradients = jax.value_and_grad(both, (0, 1, 2))(q, k, v)
    monkeypatch.setattr(attention, "SCORES", 0)
    monkeypatch.setattr(attention, "ROWS", 10)  # 7 in the last part
    np.testing.assert_allclose(attend(q, k, v, mask, 0.3), _plain(q, k, v, mask), atol=2e-6)
    parts, again = jax.value_and_grad(both, (0, 1, 2))(q, k, v)
    np.testing.assert_allclose(parts, whole, rtol=1e-6)
    for one, other in zip(again, gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6 * float(jnp.abs(other).max()))


def _plain(q, k, v, mask):
    k, v = (jnp.repeat(x, HEADS // KV, axis=2) for x in (k, v))
    scores = 0.3 * jnp.einsum("bqhd,bkhd->bhqk", q, k)
    scores = scores if mask is None else jnp.where(mask[:, None], scores, -1e30)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(*q.shape[:2], -1)


def temporaries(time, layers):
    """Bytes that the gradient through so many layers of attention needs."""
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.eval_shape(lambda: inputs(time))]

    def loss(q, k, v):
        for _ in range(layers):
            q = q + attend(q, k, v, causal(time), 0.3).reshape(q.shape)
        return q.sum()

    return jax.jit(jax.grad(loss)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def test_no_layer_keeps_its_scores():
    time = 512
    scores = 4 * BATCH * HEADS * time * time
    assert temporaries(time, 6) < 6 * scores / 2
