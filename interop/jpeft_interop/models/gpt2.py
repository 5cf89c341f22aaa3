"""GPT-2: Radford et al. 2019. Behaviour as transformers 5.23, "eager": the default positions count padding too.

Torch's `Conv1D` is a linear map whose weight is stored (in, out): here every one is a plain linear with a `kernel`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jpeft_interop.models.activations import activation
from jpeft_interop.models.attention import attend, causal_mask
from jpeft_interop.models.cache import Cache, KeyValue, advance, next_slots, remember
from jpeft_interop.models.errors import ModelError
from jpeft_interop.models.heads import embed, with_class, with_logits
from jpeft_interop.models.layers import Embedding, linear
from jpeft_interop.models.norms import LayerNorm
from jpeft_interop.models.output import Output
from jpeft_interop.models.reading import heads_divide, number_of_labels, optional, refuse, required


@dataclass(frozen=True)
class GPT2Config:
    """The numbers a GPT-2 is made from; names as in `config.json`.

    Attributes:
      scales: what each layer multiplies its attention scores by.
    """

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    activation_function: str
    layer_norm_epsilon: float
    scales: tuple[float, ...]
    tie_word_embeddings: bool
    pad_token_id: int | None
    num_labels: int
    initializer_range: float


def read_gpt2(config: Mapping[str, Any]) -> GPT2Config:
    """Reads the config of a `gpt2` model; what it leaves out is as transformers has it.

    Raises:
      ModelError: a size is missing or does not fit, or the config asks for what is not here (cross-attention).
    """
    refuse(config, add_cross_attention=False)
    width = required(config, "n_embd")
    head_dim = heads_divide(config, width, required(config, "n_head"))
    activation(optional(config, "activation_function", "gelu_new"))
    return GPT2Config(
        vocab_size=required(config, "vocab_size"),
        n_positions=optional(config, "n_positions", 1024),
        n_embd=width,
        n_layer=required(config, "n_layer"),
        n_head=config["n_head"],
        n_inner=optional(config, "n_inner", 4 * width),
        activation_function=optional(config, "activation_function", "gelu_new"),
        layer_norm_epsilon=optional(config, "layer_norm_epsilon", 1e-5),
        scales=_scales(config, head_dim),
        tie_word_embeddings=optional(config, "tie_word_embeddings", True),
        pad_token_id=config.get("pad_token_id"),
        num_labels=number_of_labels(config),
        initializer_range=optional(config, "initializer_range", 0.02),
    )


def _scales(config: Mapping[str, Any], head_dim: int) -> tuple[float, ...]:
    scale = head_dim**-0.5 if optional(config, "scale_attn_weights", True) else 1.0
    deeper = optional(config, "scale_attn_by_inverse_layer_idx", False)
    return tuple(scale / (number + 1 if deeper else 1) for number in range(config["n_layer"]))


def _linear(
    config: GPT2Config, sizes: tuple[int, int], dtype: DTypeLike, rngs: nnx.Rngs, bias: bool = True
) -> nnx.Linear:
    return linear(sizes, config.initializer_range, dtype, rngs, bias)


class Attention(nnx.Module):
    """Causal attention, the three projections in one."""

    def __init__(self, config: GPT2Config, scale: float, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """One layer's attention."""
        self.c_attn = _linear(config, (config.n_embd, 3 * config.n_embd), dtype, rngs)
        self.c_proj = _linear(config, (config.n_embd, config.n_embd), dtype, rngs)
        self.n_head, self.scale = config.n_head, scale

    def __call__(self, x: Array, mask: Array, cache: Cache | None, layer: int) -> tuple[Array, KeyValue | None]:
        """The result, and the keys and values to keep."""
        heads = (*x.shape[:2], self.n_head, -1)
        query, key, value = (part.reshape(heads) for part in jnp.split(self.c_attn(x), 3, axis=-1))
        (keys, values), kept = remember(cache, layer, (key, value))
        return self.c_proj(attend(query, keys, values, mask, self.scale)), kept


class MLP(nnx.Module):
    """c_proj(act(c_fc(x)))."""

    def __init__(self, config: GPT2Config, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """One layer's MLP."""
        self.c_fc = _linear(config, (config.n_embd, config.n_inner), dtype, rngs)
        self.c_proj = _linear(config, (config.n_inner, config.n_embd), dtype, rngs)
        self.activation_function = config.activation_function

    def __call__(self, x: Array) -> Array:
        """The MLP on `(batch, time, hidden)`."""
        return self.c_proj(activation(self.activation_function)(self.c_fc(x)))


class Block(nnx.Module):
    """Attention, then MLP, each on the normed stream and added to it."""

    def __init__(self, config: GPT2Config, scale: float, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """One layer."""
        self.ln_1 = LayerNorm(config.n_embd, config.layer_norm_epsilon, dtype)
        self.attn = Attention(config, scale, dtype, rngs)
        self.ln_2 = LayerNorm(config.n_embd, config.layer_norm_epsilon, dtype)
        self.mlp = MLP(config, dtype, rngs)

    def __call__(self, x: Array, mask: Array, cache: Cache | None, layer: int) -> tuple[Array, KeyValue | None]:
        """The stream after this layer, and the keys and values to keep."""
        attended, kept = self.attn(self.ln_1(x), mask, cache, layer)
        x = x + attended
        return x + self.mlp(self.ln_2(x)), kept


class GPT2Model(nnx.Module):
    """The stack without a head."""

    def __init__(self, config: GPT2Config, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Random weights of `dtype`, from the config's sizes."""
        self.wte = Embedding((config.vocab_size, config.n_embd), config.initializer_range, dtype, rngs)
        self.wpe = Embedding((config.n_positions, config.n_embd), config.initializer_range, dtype, rngs)
        self.h = nnx.List([Block(config, scale, dtype, rngs) for scale in config.scales])
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon, dtype)
        self.n_positions = config.n_positions

    def _positions(self, time: int, cache: Cache | None) -> Array:
        longest = time if cache is None else cache.max_length
        if longest > self.n_positions:
            raise ModelError(f"{longest} tokens or slots; this model has {self.n_positions} positions (n_positions)")
        return next_slots(cache, time)

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        *,
        position_ids: Array | None = None,
        token_type_ids: Array | None = None,
        inputs_embeds: Array | None = None,
        cache: Cache | None = None,
        output_hidden_states: bool = False,
    ) -> Output:
        """See `jpeft_interop.models.pure`; token types are looked up among the words, as torch does."""
        x = embed(self.wte, input_ids, inputs_embeds)
        time = x.shape[1]
        mask = causal_mask(attention_mask, position_ids, time, cache, None)
        x = x + self.wpe(self._positions(time, cache) if position_ids is None else position_ids)
        if token_type_ids is not None:
            x = x + self.wte(token_type_ids)
        states, stored = [x], []
        for number, block in enumerate(self.h):
            x, kept = block(x, mask, cache, number)
            states.append(x)
            stored.append(kept)
        states[-1] = x = self.ln_f(x)
        return Output(
            last_hidden_state=x,
            hidden_states=tuple(states) if output_hidden_states else None,
            cache=advance(cache, stored, time),
        )


class GPT2LMHeadModel(nnx.Module):
    """A language model; its head is the embedding, transposed, where the config ties them."""

    def __init__(self, config: GPT2Config, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Random weights of `dtype`, from the config's sizes."""
        self.transformer = GPT2Model(config, dtype, rngs)
        sizes = (config.n_embd, config.vocab_size)
        self.lm_head = None if config.tie_word_embeddings else _linear(config, sizes, dtype, rngs, bias=False)

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
        output = self.transformer(input_ids, attention_mask, **options)
        return with_logits(output, self.lm_head, self.transformer.wte, logits_to_keep, next_tokens)


class GPT2ForSequenceClassification(nnx.Module):
    """A classifier on the last token that is not padding."""

    def __init__(self, config: GPT2Config, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Random weights of `dtype`, from the config's sizes."""
        self.transformer = GPT2Model(config, dtype, rngs)
        self.score = _linear(config, (config.n_embd, config.num_labels), dtype, rngs, bias=False)
        self.pad_token_id = config.pad_token_id

    def __call__(self, input_ids: Array | None = None, attention_mask: Array | None = None, **options) -> Output:
        """See `jpeft_interop.models.pure`."""
        output = self.transformer(input_ids, attention_mask, **options)
        return with_class(output, self.score, input_ids, self.pad_token_id)
