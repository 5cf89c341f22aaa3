"""Attention with grouped heads, and the masks it takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jpeft_interop.models.cache import Cache, next_slots
from jpeft_interop.models.errors import ModelError

# Queries are worked on in blocks, of so many scores (4 MiB in fp32) or at least so many queries. Measured on two CPU
# cores: from 512 tokens on it takes no longer than all at once, which keeps (time, time) for the backward pass.
SCORES = 1 << 20
ROWS = 128


def attend(query: Array, key: Array, value: Array, mask: Array | None, scale: float, cap: float | None = None) -> Array:
    """softmax(scale · Q Kᵀ) V, the softmax in fp32.

    A row with nothing to attend to (a padding token on the left) averages all values, as transformers' eager attention
    does; it is finite, and no real token ever reads it.

    Args:
      query: `(batch, time, heads, head_dim)`.
      key: `(batch, slots, kv_heads, head_dim)`; each serves `heads / kv_heads` queries next to each other.
      value: as `key`.
      mask: True where attention is allowed, `(batch or 1, time or 1, slots)`; None allows all.
      scale: what the scores are multiplied by.
      cap: what the scores stay below by a tanh, see `capped`.

    Returns:
      `(batch, time, heads * head_dim)`, in the query's dtype.
    """
    block = partial(_attend, scale=scale, cap=cap)
    batch, time, heads, _ = query.shape
    rows = max(ROWS, SCORES // (batch * heads * key.shape[1]))
    return block(query, key, value, mask) if time <= rows else _by_rows(block, rows, query, key, value, mask)


def _by_rows(block: Callable, rows: int, query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    """`block` on so many queries at a time; those that fill up the last block are dropped.

    A block's scores are made again in the backward pass, so there are never more than one block's.
    """
    block = jax.checkpoint(block)
    batch, time = query.shape[:2]
    blocks = -(-time // rows)

    def parted(x: Array) -> Array:
        whole = jnp.pad(x, ((0, 0), (0, blocks * rows - time), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(whole.reshape(x.shape[0], blocks, rows, *x.shape[2:]), 1, 0)

    if mask is not None and mask.shape[1] > 1:
        mixed = jax.lax.map(lambda part: block(part[0], key, value, part[1]), (parted(query), parted(mask)))
    else:
        mixed = jax.lax.map(lambda part: block(part, key, value, mask), parted(query))
    return jnp.moveaxis(mixed, 0, 1).reshape(batch, blocks * rows, -1)[:, :time]


def _attend(query: Array, key: Array, value: Array, mask: Array | None, scale: float, cap: float | None) -> Array:
    batch, time, heads, head_dim = query.shape
    kv_heads, slots = key.shape[2], key.shape[1]
    group = heads // kv_heads
    # The queries that share a key-value head are rows of one product: no key is repeated, and each product is large.
    rows = query.reshape(batch, time, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, kv_heads, group * time, head_dim)
    scores = jnp.einsum("bkrd,bksd->bkrs", rows, key.transpose(0, 2, 1, 3), preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, group, time, slots) * scale
    scores = capped(scores, cap)
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype).reshape(batch, kv_heads, group * time, slots)
    mixed = jnp.einsum("bkrs,bksd->bkrd", weights, value.transpose(0, 2, 1, 3))
    return mixed.reshape(batch, heads, time, head_dim).transpose(0, 2, 1, 3).reshape(batch, time, heads * head_dim)


def capped(x: Array, cap: float | None) -> Array:
    """cap · tanh(x / cap): nearly `x` where it is small, never beyond ±cap; `x` itself where that is None."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def causal_mask(
    attention_mask: Array | None, position_ids: Array | None, time: int, cache: Cache | None, window: int | None
) -> Array:
    """Which slot each token may attend to: none after its own, none that is padding, none `window` or more before it.

    Args:
      attention_mask: `(batch, length)`, nonzero for real tokens. With a cache its columns are the slots (a shorter one
        says nothing about later slots); without, the tokens.
      position_ids: those the caller gave, `(batch or 1, time)`. Given with neither mask nor cache, a jump in them
        starts a new sequence (packing), and tokens attend within theirs.
      time: the number of tokens.
      cache: the cache before this forward.
      window: the sliding window's width.

    Returns:
      `(batch or 1, time, slots)`, bool.
    """
    filled = cache is not None and not cache.empty
    slots = cache.max_length if cache is not None and filled else time
    query = next_slots(cache, time)[0, :, None]
    slot = jnp.arange(slots)[None, :]
    allowed = (slot <= query)[None]
    if window is not None:
        allowed &= (slot > query - window)[None]
    if attention_mask is not None:
        allowed &= _padding(attention_mask, slots, cache)[:, None, :]
    elif position_ids is not None and cache is None:
        sequence = _sequences(position_ids)
        allowed &= sequence[:, :, None] == sequence[:, None, :]
    return allowed


def padding_mask(attention_mask: Array | None, time: int) -> Array | None:
    """For a model that sees both ways: `(batch, 1, time)`, bool, or None where every token is real."""
    return None if attention_mask is None else _padding(attention_mask, time, None)[:, None, :]


def _padding(attention_mask: Array, slots: int, cache: Cache | None) -> Array:
    length = attention_mask.shape[-1]
    most = slots if cache is None else cache.max_length
    if attention_mask.ndim != 2 or length > most or (cache is None and length != slots):
        raise ModelError(
            f"attention_mask has shape {attention_mask.shape}; expected (batch, {most}): one column a "
            f"{'token' if cache is None else 'slot of the cache, or fewer from the first on'}, nonzero where it is real"
        )
    real = attention_mask.astype(bool)[:, :slots]
    return jnp.pad(real, ((0, 0), (0, slots - real.shape[1])))


def _sequences(position_ids: Array) -> Array:
    """The number of each token's sequence along its row: a new one starts where positions do not go up by one."""
    jump = jnp.diff(position_ids, axis=1, prepend=position_ids[:, :1] - 1) != 1
    return jnp.cumsum(jump, axis=1)
