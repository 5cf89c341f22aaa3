"""A language model's loss without all of its logits: these are worked out for some of the tokens at a time."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jpeft_interop.models.errors import ModelError

LOGITS = 1 << 25  # logits worked on at once, 128 MiB in fp32
IGNORE = -100  # nothing to learn here; the number that data sets are made with, and torch's

Scores = tuple[Array, Array]


def scored(logits: Array, labels: Array) -> Scores:
    """Each label's negative log-likelihood, its softmax in fp32, and whether it was the likeliest.

    Args:
      logits: (..., classes).
      labels: (...), integers.

    Returns:
      `losses` (...), fp32, and `hits` (...), bool; 0 and False where the label is `IGNORE`.

    Example:
      >>> scored(jnp.zeros((2, 3)), jnp.array([0, IGNORE]))[1]
      Array([ True, False], dtype=bool)
    """
    counted, logits = labels != IGNORE, logits.astype(jnp.float32)
    safe = jnp.where(counted, labels, 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, safe)
    return jnp.where(counted, losses, 0), (jnp.argmax(logits, axis=-1) == safe) & counted


def token_scores(head: Callable[[Array], Array], hidden: Array, next_tokens: Array, vocabulary: int) -> Scores:
    """What `scored` says of every token, no more than about `LOGITS` logits being there at once.

    Where all of them are few enough, nothing is gained and nothing is paid. Else the tokens are cut into chunks along
    time (so that a batch that is split over devices stays split), one is worked on after the other, and the backward
    pass makes each chunk's logits again: one product with the head more than without chunks.

    Args:
      head: the logits `(batch, some, vocabulary)` of states `(batch, some, hidden)`.
      hidden: the states, `(batch, time, hidden)`.
      next_tokens: the labels, `(batch, time)`.
      vocabulary: how many logits a token has.

    Raises:
      ModelError: `next_tokens` is of another shape.
    """
    batch, time, _ = hidden.shape
    if next_tokens.shape != (batch, time):
        raise ModelError(
            f"next_tokens must be (batch, time) at the places of the logits, {(batch, time)}; "
            f"found shape {tuple(next_tokens.shape)}"
        )
    score = lambda part: scored(head(part[0]), part[1])
    chunks = -(-time // max(1, LOGITS // (batch * vocabulary)))
    if chunks <= 1:
        return score((hidden, next_tokens))
    size = -(-time // chunks)
    parts = (_parted(hidden, size, 0), _parted(next_tokens, size, IGNORE))
    # A turn of a loop is a barrier already: XLA can't take the second product for the first.
    losses, hits = jax.lax.map(jax.checkpoint(score, prevent_cse=False), parts)
    return _whole(losses, time), _whole(hits, time)


def _parted(x: Array, size: int, filling: int) -> Array:
    """`(batch, time, ...)` as `(chunks, batch, size, ...)`, the last chunk filled up."""
    batch, time, *rest = x.shape
    full = jnp.pad(x, ((0, 0), (0, -time % size), *[(0, 0)] * len(rest)), constant_values=filling)
    return jnp.moveaxis(full.reshape(batch, -1, size, *rest), 1, 0)


def _whole(x: Array, time: int) -> Array:
    """The inverse of `_parted`."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, :time]
