"""Llama, and what is made like it (Mistral, Qwen2, SmolLM2): Touvron et al. 2023, https://arxiv.org/abs/2302.13971.

Behaviour is that of transformers 5.23, attention "eager": the default positions count every slot, padding too (so a
left-padded prompt wants its own `position_ids`, as `generate` gives it).
"""

from __future__ import annotations

from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jpeft_interop.models.activations import activation
from jpeft_interop.models.attention import attend, causal_mask
from jpeft_interop.models.cache import Cache, KeyValue, advance, next_slots, remember
from jpeft_interop.models.heads import embed, with_class, with_logits
from jpeft_interop.models.layers import Embedding, linear
from jpeft_interop.models.llama_config import LlamaConfig
from jpeft_interop.models.norms import RMSNorm
from jpeft_interop.models.output import Output
from jpeft_interop.models.rope import rope_tables, rotate

Tables = tuple[Array, Array]


def _linear(config: LlamaConfig, sizes: tuple[int, int], bias: bool, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    return linear(sizes, config.initializer_range, dtype, rngs, bias)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """One layer's attention."""
        hidden, head_dim = config.hidden_size, config.head_dim
        queries, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        self.q_proj = _linear(config, (hidden, queries), config.qkv_bias, dtype, rngs)
        self.k_proj = _linear(config, (hidden, kv), config.qkv_bias, dtype, rngs)
        self.v_proj = _linear(config, (hidden, kv), config.qkv_bias, dtype, rngs)
        self.o_proj = _linear(config, (queries, hidden), config.o_bias, dtype, rngs)
        self.head_dim = head_dim

    def __call__(
        self, x: Array, tables: Tables, mask: Array, cache: Cache | None, layer: int
    ) -> tuple[Array, KeyValue | None]:
        """The result, and the keys and values to keep."""
        query, key, value = (
            projected.reshape(*projected.shape[:2], -1, self.head_dim)
            for projected in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        new = rotate(key, tables), value
        (keys, values), kept = remember(cache, layer, new)
        return self.o_proj(attend(rotate(query, tables), keys, values, mask, self.head_dim**-0.5)), kept


class MLP(nnx.Module):
    """down(act(gate(x)) · up(x))."""

    def __init__(self, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """One layer's MLP."""
        hidden, wide, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = _linear(config, (hidden, wide), bias, dtype, rngs)
        self.up_proj = _linear(config, (hidden, wide), bias, dtype, rngs)
        self.down_proj = _linear(config, (wide, hidden), bias, dtype, rngs)
        self.hidden_act = config.hidden_act

    def __call__(self, x: Array) -> Array:
        """The MLP on `(batch, time, hidden)`."""
        return self.down_proj(activation(self.hidden_act)(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    """Attention, then MLP, each on the normed stream and added to it."""

    def __init__(self, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """One layer."""
        self.self_attn = Attention(config, dtype, rngs)
        self.mlp = MLP(config, dtype, rngs)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)

    def __call__(
        self, x: Array, tables: Tables, mask: Array, cache: Cache | None, layer: int
    ) -> tuple[Array, KeyValue | None]:
        """The stream after this layer, and the keys and values to keep."""
        attended, kept = self.self_attn(self.input_layernorm(x), tables, mask, cache, layer)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), kept


class LlamaModel(nnx.Module):
    """The stack without a head (`LlamaModel`, `MistralModel`, `Qwen2Model`)."""

    def __init__(self, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Random weights of `dtype`, from the config's sizes."""
        self.embed_tokens = Embedding((config.vocab_size, config.hidden_size), config.initializer_range, dtype, rngs)
        self.layers = nnx.List([Layer(config, dtype, rngs) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
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
        time = x.shape[1]
        windows = dict.fromkeys(self.config.windows)
        masks = {window: causal_mask(attention_mask, position_ids, time, cache, window) for window in windows}
        if position_ids is None:
            position_ids = next_slots(cache, time)
        tables = rope_tables(self.config.rope, position_ids, x.dtype)
        states, stored = [x], []
        for number, (layer, window) in enumerate(zip(self.layers, self.config.windows, strict=True)):
            x, kept = layer(x, tables, masks[window], cache, number)
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
        self.lm_head = None if tied else _linear(config, (config.hidden_size, config.vocab_size), False, dtype, rngs)

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        *,
        logits_to_keep: Array | int | None = None,
        **options,
    ) -> Output:
        """See `jpeft_interop.models.pure`; `logits_to_keep` as `heads.with_logits` has it."""
        output = self.model(input_ids, attention_mask, **options)
        return with_logits(output, self.lm_head, self.model.embed_tokens, logits_to_keep)


class LlamaForSequenceClassification(nnx.Module):
    """A classifier on the last token that is not padding."""

    def __init__(self, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Random weights of `dtype`, from the config's sizes."""
        self.model = LlamaModel(config, dtype, rngs)
        self.score = _linear(config, (config.hidden_size, config.num_labels), False, dtype, rngs)
        self.pad_token_id = config.pad_token_id

    def __call__(self, input_ids: Array | None = None, attention_mask: Array | None = None, **options) -> Output:
        """See `jpeft_interop.models.pure`."""
        return with_class(self.model(input_ids, attention_mask, **options), self.score, input_ids, self.pad_token_id)
