"""Llama, and what is made like it: Touvron et al. 2023, https://arxiv.org/abs/2302.13971.

That is Mistral, Mixtral, Qwen2, Qwen3 and its mixtures, Phi-3, and Gemma 1 to 3; their configs say wherein they differ.

Behaviour is that of transformers 5.23, attention "eager": the default positions count every slot, padding too (so a
left-padded prompt wants its own `position_ids`, as `generate` gives it).
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jpeft_interop.models.attention import causal_mask
from jpeft_interop.models.blocks import MLP, Attention, FusedAttention, FusedMLP, Tables, norm, projection
from jpeft_interop.models.cache import Cache, KeyValue, advance, next_slots
from jpeft_interop.models.heads import embed, with_class, with_logits
from jpeft_interop.models.layers import Embedding
from jpeft_interop.models.llama_config import LlamaConfig
from jpeft_interop.models.moe import SparseMLP
from jpeft_interop.models.output import Output
from jpeft_interop.models.rope import rope_tables


def _mlp(config: LlamaConfig, number: int, dtype: DTypeLike, rngs: nnx.Rngs) -> MLP | FusedMLP | SparseMLP:
    if config.mixture is not None and number in config.mixture.layers:
        return SparseMLP(config, config.mixture, dtype, rngs)
    return (FusedMLP if config.fused else MLP)(config, dtype, rngs)


class Layer(nnx.Module):
    """Attention, then MLP, each on the normed stream and added to it."""

    def __init__(self, config: LlamaConfig, number: int, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """The layer with that number, from 0."""
        self.self_attn = (FusedAttention if config.fused else Attention)(config, dtype, rngs)
        self.mlp = _mlp(config, number, dtype, rngs)
        self.input_layernorm = norm(config, config.hidden_size, dtype)
        self.post_attention_layernorm = norm(config, config.hidden_size, dtype)

    def __call__(
        self, x: Array, tables: Tables, mask: Array, cache: Cache | None, layer: int
    ) -> tuple[Array, KeyValue | None]:
        """The stream after this layer, and the keys and values to keep."""
        attended, kept = self.self_attn(self.input_layernorm(x), tables, mask, cache, layer)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), kept


class PostNormLayer(Layer):
    """Normed both before and after, as in Gemma 2: what attention and MLP give is normed, then added."""

    def __init__(self, config: LlamaConfig, number: int, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """The layer with that number, from 0."""
        super().__init__(config, number, dtype, rngs)
        self.pre_feedforward_layernorm = norm(config, config.hidden_size, dtype)
        self.post_feedforward_layernorm = norm(config, config.hidden_size, dtype)

    def __call__(
        self, x: Array, tables: Tables, mask: Array, cache: Cache | None, layer: int
    ) -> tuple[Array, KeyValue | None]:
        """The stream after this layer, and the keys and values to keep."""
        attended, kept = self.self_attn(self.input_layernorm(x), tables, mask, cache, layer)
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))), kept


class LlamaModel(nnx.Module):
    """The stack without a head (`LlamaModel`, `MistralModel`, `Gemma2Model`, …)."""

    def __init__(self, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Random weights of `dtype`, from the config's sizes."""
        self.embed_tokens = Embedding((config.vocab_size, config.hidden_size), config.initializer_range, dtype, rngs)
        layer = PostNormLayer if config.post_norms else Layer
        self.layers = nnx.List([layer(config, number, dtype, rngs) for number in range(config.num_hidden_layers)])
        self.norm = norm(config, config.hidden_size, dtype)
        self.config = config

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        *,
        position_ids: Array | None = None,
        inputs_embeds: Array | None = None,
        cache: Cache | None = None,
        output_hidden_states: bool = False,
    ) -> Output:
        """See `jpeft_interop.models.pure`."""
        x = embed(self.embed_tokens, input_ids, inputs_embeds)
        if inputs_embeds is None and self.config.embed_scale is not None:
            x = x * jnp.asarray(self.config.embed_scale, x.dtype)
        time = x.shape[1]
        windows = dict.fromkeys(self.config.windows)
        masks = {window: causal_mask(attention_mask, position_ids, time, cache, window) for window in windows}
        if position_ids is None:
            position_ids = next_slots(cache, time)
        tables = {rope: rope_tables(rope, position_ids, x.dtype) for rope in dict.fromkeys(self.config.ropes)}
        states, stored = [x], []
        settings = zip(self.layers, self.config.ropes, self.config.windows, strict=True)
        for number, (layer, rope, window) in enumerate(settings):
            x, kept = layer(x, tables[rope], masks[window], cache, number)
            states.append(x)
            stored.append(kept)
        states[-1] = x = self.norm(x)
        return Output(
            last_hidden_state=x,
            hidden_states=tuple(states) if output_hidden_states else None,
            cache=advance(cache, stored, time),
        )


class LlamaForCausalLM(nnx.Module):
    """A language model; its head is the embedding, transposed, where the config ties them."""

    def __init__(self, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Random weights of `dtype`, from the config's sizes."""
        self.model = LlamaModel(config, dtype, rngs)
        tied = config.tie_word_embeddings
        sizes = (config.hidden_size, config.vocab_size)
        self.lm_head = None if tied else projection(config, sizes, False, dtype, rngs)
        self.cap = config.logit_cap

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        *,
        logits_to_keep: Array | int | None = None,
        next_tokens: Array | None = None,
        **options,
    ) -> Output:
        """See `jpeft_interop.models.pure`; `logits_to_keep` and `next_tokens` as `heads.with_logits` has them."""
        output = self.model(input_ids, attention_mask, **options)
        return with_logits(output, self.lm_head, self.model.embed_tokens, logits_to_keep, next_tokens, self.cap)


class LlamaForSequenceClassification(nnx.Module):
    """A classifier on the last token that is not padding."""

    def __init__(self, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Random weights of `dtype`, from the config's sizes."""
        self.model = LlamaModel(config, dtype, rngs)
        self.score = projection(config, (config.hidden_size, config.num_labels), False, dtype, rngs)
        self.pad_token_id = config.pad_token_id

    def __call__(self, input_ids: Array | None = None, attention_mask: Array | None = None, **options) -> Output:
        """See `jpeft_interop.models.pure`."""
        return with_class(self.model(input_ids, attention_mask, **options), self.score, input_ids, self.pad_token_id)
