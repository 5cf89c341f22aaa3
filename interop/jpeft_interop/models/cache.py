"""The keys and values of past tokens, in buffers whose shapes never change: every decoding step is one program."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jpeft_interop.models.errors import ModelError

KeyValue = tuple[Array, Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values by layer, a pytree.

    An empty cache holds no buffers: the first forward that gets it makes them (and attends among its own tokens only).

    Attributes:
      keys: one `(batch, max_length, kv_heads, head_dim)` a layer, already rotated; `()` when empty.
      values: the same.
      length: how many slots are filled, an int32 scalar; None when empty.
      max_length: how many slots there are.
      dtype: what the buffers are kept in; None is the dtype of the keys that come.
    """

    keys: tuple[Array, ...] = ()
    values: tuple[Array, ...] = ()
    length: Array | None = None
    max_length: int = field(default=0, metadata={"static": True})
    dtype: str | None = field(default=None, metadata={"static": True})

    @property
    def empty(self) -> bool:
        """Whether no forward has written yet: known while tracing."""
        return not self.keys

    @property
    def start(self) -> Array | int:
        """The slot that the next token takes."""
        return 0 if self.length is None else self.length


def init_cache(max_length: int, dtype: DTypeLike | None = None) -> Cache:
    """An empty cache for sequences of at most `max_length` tokens, padding included.

    It fits every decoder and batch: the first forward shapes it.

    Args:
      max_length: the number of slots. A token written past the end makes every logit of that step NaN.
      dtype: the dtype of the buffers; None for that of the keys.

    Example:
      >>> init_cache(16).empty
      True
    """
    return Cache(max_length=max_length, dtype=None if dtype is None else jnp.dtype(dtype).name)


def next_slots(cache: Cache | None, time: int) -> Array:
    """The slots that the next `time` tokens take, `(1, time)`: their positions, unless the caller knows better."""
    return ((0 if cache is None else cache.start) + jnp.arange(time))[None]


def remember(cache: Cache | None, layer: int, new: KeyValue) -> tuple[KeyValue, KeyValue | None]:
    """What layers attend to, and what to keep, given its `new` keys and values `(batch, time, kv_heads, head_dim)`."""
    if cache is None:
        return new, None
    if cache.empty:
        return new, (_fresh(cache, new[0]), _fresh(cache, new[1]))
    kept = _write(cache, cache.keys[layer], new[0]), _write(cache, cache.values[layer], new[1])
    return (kept[0].astype(new[0].dtype), kept[1].astype(new[1].dtype)), kept


def advance(cache: Cache | None, kept: list[KeyValue | None], time: int) -> Cache | None:
    """The cache after a forward over `time` tokens, `kept` being what `remember` gave for each layer."""
    if cache is None:
        return None
    pairs = [pair for pair in kept if pair is not None]
    return Cache(
        keys=tuple(k for k, _ in pairs),
        values=tuple(v for _, v in pairs),
        length=jnp.asarray(cache.start + time, jnp.int32),
        max_length=cache.max_length,
        dtype=cache.dtype,
    )


def _fresh(cache: Cache, new: Array) -> Array:
    room = cache.max_length - new.shape[1]
    if room < 0:
        raise ModelError(
            f"{new.shape[1]} tokens do not fit a cache of {cache.max_length} slots; make it with "
            f"`init_cache({new.shape[1]} + what you mean to generate)`"
        )
    return jnp.pad(new.astype(cache.dtype or new.dtype), ((0, 0), (0, room), (0, 0), (0, 0)))


def _write(cache: Cache, buffer: Array, new: Array) -> Array:
    # dynamic_update_slice would move a slice that does not fit back, over older tokens: better NaN than that.
    fits = cache.start + new.shape[1] <= cache.max_length
    new = jnp.where(fits, new, jnp.nan).astype(buffer.dtype)
    return jax.lax.dynamic_update_slice_in_dim(buffer, new, cache.start, axis=1)
