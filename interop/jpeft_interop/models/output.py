"""What a forward returns."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jax import Array

from jpeft_interop.models.cache import Cache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Output:
    """The result of a forward, a pytree. What the model's class does not have, or nobody asked for, is None.

    Attributes:
      logits: `(batch, time, vocab)` of a language model, `(batch, labels)` of a classifier; in the params' dtype.
      last_hidden_state: `(batch, time, hidden)`, after the final norm.
      hidden_states: with `output_hidden_states=True`, `layers + 1` arrays `(batch, time, hidden)` in transformers'
        order: the embeddings first, then each layer's output; of a decoder the last one is after the final norm.
      pooled: `(batch, hidden)`, BERT's pooler (`pooler_output` in transformers).
      cache: the keys and values so far, where a cache was passed in.
    """

    logits: Array | None = None
    last_hidden_state: Array | None = None
    hidden_states: tuple[Array, ...] | None = None
    pooled: Array | None = None
    cache: Cache | None = None
