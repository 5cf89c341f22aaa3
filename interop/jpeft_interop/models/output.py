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
      losses: `(batch, time)` of a language model that was given `next_tokens`: each one's negative log-likelihood in
        fp32, 0 where it is -100. It then gives no logits.
      hits: `(batch, time)`, with `losses`: whether that token was the likeliest one.
      last_hidden_state: `(batch, time, hidden)`, after the final norm.
      hidden_states: with `output_hidden_states=True`, `layers + 1` arrays `(batch, time, hidden)` in transformers'
        order: the embeddings first, then each layer's output; of a decoder the last one is after the final norm.
        Of an encoder-decoder they are the decoder's, as `last_hidden_state` is. Of ViT and CLIP the last one is before
        the final norm.
      pooled: `(batch, hidden)`, BERT's pooler (`pooler_output` in transformers).
      cache: the keys and values so far, where a cache was passed in.
      encoder_last_hidden_state: `(batch, length, hidden)`, what the encoder of an encoder-decoder gave.
      encoder_hidden_states: with `output_hidden_states=True`, an encoder-decoder's encoder's.
      image_embeds: `(images, projected)`, CLIP's; of length 1 in the model with both towers.
      text_embeds: `(texts, projected)`, CLIP's; of length 1 in the model with both towers.
      logits_per_image: `(images, texts)`, the scaled similarities of CLIP.
      logits_per_text: `(texts, images)`, the same, transposed.
      vision_model_output: what the image tower of a model with both gave, `pooled` projected.
      text_model_output: what its text tower gave, `pooled` projected.
    """

    logits: Array | None = None
    losses: Array | None = None
    hits: Array | None = None
    last_hidden_state: Array | None = None
    hidden_states: tuple[Array, ...] | None = None
    pooled: Array | None = None
    cache: Cache | None = None
    encoder_last_hidden_state: Array | None = None
    encoder_hidden_states: tuple[Array, ...] | None = None
    image_embeds: Array | None = None
    text_embeds: Array | None = None
    logits_per_image: Array | None = None
    logits_per_text: Array | None = None
    vision_model_output: Output | None = None
    text_model_output: Output | None = None
