"""T5 and T5 v1.1 (Flan-T5), an encoder-decoder: Raffel et al. 2019, https://arxiv.org/abs/1910.10683.

Behaviour as transformers 5.23, "eager", in fp32 and bf16 (its clamps for fp16 are not here). No cache: `cache` is
refused, and each forward takes all of `decoder_input_ids`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jpeft_interop.models.activations import activation
from jpeft_interop.models.attention import causal_mask, padding_mask
from jpeft_interop.models.cache import Cache
from jpeft_interop.models.encoder_decoder import encoded, refuse_cache
from jpeft_interop.models.errors import ModelError
from jpeft_interop.models.heads import embed
from jpeft_interop.models.layers import Embedding, linear
from jpeft_interop.models.norms import RMSNorm
from jpeft_interop.models.output import Output
from jpeft_interop.models.reading import optional, refuse, required
from jpeft_interop.models.relative import relative_buckets


@dataclass(frozen=True)
class T5Config:
    """The numbers a T5 is made from; names as in `config.json`.

    Attributes:
      act: the activation of the MLPs.
      gated: whether those have a gate.
      tie_word_embeddings: whether the head is the word embeddings, transposed.
      scale_decoder_outputs: whether the head reads the stream scaled by 1/sqrt(d_model).
    """

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    relative_attention_num_buckets: int
    relative_attention_max_distance: int
    layer_norm_epsilon: float
    act: str
    gated: bool
    tie_word_embeddings: bool
    scale_decoder_outputs: bool
    initializer_factor: float


def read_t5(config: Mapping[str, Any]) -> T5Config:
    """Reads the config of a `t5` model; what it leaves out is as transformers has it.

    An untied head (`"tie_word_embeddings": false`, T5 v1.1) reads the stream unscaled, a tied one scaled, unless
    `scale_decoder_outputs` says otherwise.

    Raises:
      ModelError: a size is missing, or the activation is not known.
    """
    refuse(config, is_decoder=False)
    tied = optional(config, "tie_word_embeddings", True)
    act, gated = _feed_forward(optional(config, "feed_forward_proj", "relu"))
    layers = required(config, "num_layers")
    return T5Config(
        vocab_size=required(config, "vocab_size"),
        d_model=required(config, "d_model"),
        d_kv=required(config, "d_kv"),
        d_ff=required(config, "d_ff"),
        num_layers=layers,
        num_decoder_layers=optional(config, "num_decoder_layers", layers),
        num_heads=required(config, "num_heads"),
        relative_attention_num_buckets=optional(config, "relative_attention_num_buckets", 32),
        relative_attention_max_distance=optional(config, "relative_attention_max_distance", 128),
        layer_norm_epsilon=optional(config, "layer_norm_epsilon", 1e-6),
        act=act,
        gated=gated,
        tie_word_embeddings=tied,
        scale_decoder_outputs=optional(config, "scale_decoder_outputs", tied),
        initializer_factor=optional(config, "initializer_factor", 1.0),
    )


def _feed_forward(name: str) -> tuple[str, bool]:
    """The activation that a `feed_forward_proj` names, and whether there is a gate."""
    gate, _, act = name.rpartition("-")
    if gate not in ("", "gated"):
        raise ModelError(f"feed_forward_proj {name!r} is not supported; 'gated-' and an activation, or an activation")
    act = "gelu_new" if name == "gated-gelu" else act
    activation(act)
    return act, gate == "gated"


def _linear(config: T5Config, sizes: tuple[int, int], variance: float, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    """Without bias, normal with that variance, scaled."""
    return linear(sizes, config.initializer_factor * variance**0.5, dtype, rngs, bias=False)


def _norm(config: T5Config, dtype: DTypeLike) -> RMSNorm:
    return RMSNorm(config.d_model, config.layer_norm_epsilon, dtype)


class Attention(nnx.Module):
    """softmax(Q Kᵀ + bias) V: no scale, for it is in the weights' start."""

    def __init__(self, config: T5Config, dtype: DTypeLike, rngs: nnx.Rngs, relative: bool = False) -> None:
        """The four projections; `relative` with the table of the biases, which all layers of a stack share."""
        width, inner = config.d_model, config.num_heads * config.d_kv
        self.q = _linear(config, (width, inner), 1 / (width * config.d_kv), dtype, rngs)
        self.k = _linear(config, (width, inner), 1 / width, dtype, rngs)
        self.v = _linear(config, (width, inner), 1 / width, dtype, rngs)
        self.o = _linear(config, (inner, width), 1 / inner, dtype, rngs)
        sizes = (config.relative_attention_num_buckets, config.num_heads)
        deviation = config.initializer_factor * width**-0.5
        self.relative_attention_bias = Embedding(sizes, deviation, dtype, rngs) if relative else None
        self.num_heads, self.longest = config.num_heads, config.relative_attention_max_distance

    def __call__(self, x: Array, source: Array, bias: Array) -> Array:
        """Attention of `x`, `(batch, time, hidden)`, to `source`; `bias` is `(batch or 1, heads or 1, time, slots)`."""
        query, key, value = (
            projected.reshape(*projected.shape[:2], self.num_heads, -1)
            for projected in (self.q(x), self.k(source), self.v(source))
        )
        scores = jnp.einsum("bthd,bshd->bhts", query, key, preferred_element_type=jnp.float32) + bias
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        return self.o(jnp.einsum("bhts,bshd->bthd", weights, value).reshape(*x.shape[:2], -1))

    def biases(self, time: int, both_ways: bool) -> Array:
        """What is added to the scores for how far a token is, `(1, heads, time, time)`, fp32."""
        table = self.relative_attention_bias
        assert table is not None
        buckets = relative_buckets(time, time, both_ways, table.embedding.shape[0], self.longest)
        return table(jnp.asarray(buckets)).transpose(2, 0, 1)[None].astype(jnp.float32)


class SelfAttentionLayer(nnx.Module):
    """x + attention(norm(x))."""

    def __init__(self, config: T5Config, relative: bool, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """The attention and the norm before it."""
        self.SelfAttention = Attention(config, dtype, rngs, relative)
        self.layer_norm = _norm(config, dtype)

    def __call__(self, x: Array, bias: Array) -> Array:
        """The stream after it."""
        normed = self.layer_norm(x)
        return x + self.SelfAttention(normed, normed, bias)


class CrossAttentionLayer(nnx.Module):
    """x + attention(norm(x), to what the encoder gave)."""

    def __init__(self, config: T5Config, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """The attention and the norm before it."""
        self.EncDecAttention = Attention(config, dtype, rngs)
        self.layer_norm = _norm(config, dtype)

    def __call__(self, x: Array, source: Array, bias: Array) -> Array:
        """The stream after it."""
        return x + self.EncDecAttention(self.layer_norm(x), source, bias)


class MLP(nnx.Module):
    """wo(act(wi(x))), or wo(act(wi_0(x)) · wi_1(x))."""

    def __init__(self, config: T5Config, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """The two or three projections."""
        width, inner = config.d_model, config.d_ff
        wide = lambda: _linear(config, (width, inner), 1 / width, dtype, rngs)
        self.wi = None if config.gated else wide()
        self.wi_0 = wide() if config.gated else None
        self.wi_1 = wide() if config.gated else None
        self.wo = _linear(config, (inner, width), 1 / inner, dtype, rngs)
        self.act = config.act

    def __call__(self, x: Array) -> Array:
        """On `(batch, time, hidden)`."""
        act = activation(self.act)
        if self.wi_0 is None or self.wi_1 is None:
            assert self.wi is not None
            return self.wo(act(self.wi(x)))
        return self.wo(act(self.wi_0(x)) * self.wi_1(x))


class MLPLayer(nnx.Module):
    """x + mlp(norm(x))."""

    def __init__(self, config: T5Config, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """The MLP and the norm before it."""
        self.DenseReluDense = MLP(config, dtype, rngs)
        self.layer_norm = _norm(config, dtype)

    def __call__(self, x: Array) -> Array:
        """The stream after it."""
        return x + self.DenseReluDense(self.layer_norm(x))


class EncoderBlock(nnx.Module):
    """Attention, then MLP."""

    def __init__(self, config: T5Config, first: bool, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """One layer."""
        self.layer: nnx.List[Any] = nnx.List(
            [SelfAttentionLayer(config, first, dtype, rngs), MLPLayer(config, dtype, rngs)]
        )

    def __call__(self, x: Array, bias: Array) -> Array:
        """The stream after this layer."""
        attention, mlp = self.layer
        return mlp(attention(x, bias))


class DecoderBlock(nnx.Module):
    """Attention, attention to the encoder, then MLP."""

    def __init__(self, config: T5Config, first: bool, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """One layer."""
        own, cross = SelfAttentionLayer(config, first, dtype, rngs), CrossAttentionLayer(config, dtype, rngs)
        self.layer: nnx.List[Any] = nnx.List([own, cross, MLPLayer(config, dtype, rngs)])

    def __call__(self, x: Array, bias: Array, source: Array, source_bias: Array) -> Array:
        """The stream after this layer."""
        own, cross, mlp = self.layer
        return mlp(cross(own(x, bias), source, source_bias))


class Encoder(nnx.Module):
    """The stack that sees both ways. The words are looked up outside, in `shared`."""

    def __init__(self, config: T5Config, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """All layers and the final norm."""
        self.block = nnx.List([EncoderBlock(config, n == 0, dtype, rngs) for n in range(config.num_layers)])
        self.final_layer_norm = _norm(config, dtype)

    def __call__(self, x: Array, attention_mask: Array | None) -> tuple[Array, ...]:
        """The stream before the first layer and after each, the last one normed."""
        relative = self.block[0].layer[0].SelfAttention.biases(x.shape[1], both_ways=True)
        bias = _masked(relative, padding_mask(attention_mask, x.shape[1]))
        states = [x]
        for block in self.block:
            states.append(block(states[-1], bias))
        return (*states[:-1], self.final_layer_norm(states[-1]))


class Decoder(nnx.Module):
    """The stack that sees what is before, and what the encoder gave."""

    def __init__(self, config: T5Config, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """All layers and the final norm."""
        self.block = nnx.List([DecoderBlock(config, n == 0, dtype, rngs) for n in range(config.num_decoder_layers)])
        self.final_layer_norm = _norm(config, dtype)

    def __call__(
        self, x: Array, attention_mask: Array | None, source: Array, source_mask: Array | None
    ) -> tuple[Array, ...]:
        """The stream before the first layer and after each, the last one normed."""
        time = x.shape[1]
        relative = self.block[0].layer[0].SelfAttention.biases(time, both_ways=False)
        bias = _masked(relative, causal_mask(attention_mask, None, time, None, None))
        source_bias = _masked(jnp.zeros((1, 1, 1, 1), jnp.float32), padding_mask(source_mask, source.shape[1]))
        states = [x]
        for block in self.block:
            states.append(block(states[-1], bias, source, source_bias))
        return (*states[:-1], self.final_layer_norm(states[-1]))


def _masked(bias: Array, mask: Array | None) -> Array:
    """The bias, and so little where attention is not allowed that nothing is left."""
    return bias if mask is None else jnp.where(mask[:, None], bias, jnp.finfo(jnp.float32).min)


def _shared(config: T5Config, dtype: DTypeLike, rngs: nnx.Rngs) -> Embedding:
    return Embedding((config.vocab_size, config.d_model), config.initializer_factor, dtype, rngs)


class T5EncoderModel(nnx.Module):
    """The encoder alone."""

    def __init__(self, config: T5Config, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Random weights of `dtype`, from the config's sizes."""
        self.shared = _shared(config, dtype, rngs)
        self.encoder = Encoder(config, dtype, rngs)

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        *,
        inputs_embeds: Array | None = None,
        output_hidden_states: bool = False,
    ) -> Output:
        """See `jpeft_interop.models.pure`."""
        states = self.encoder(embed(self.shared, input_ids, inputs_embeds), attention_mask)
        return Output(last_hidden_state=states[-1], hidden_states=states if output_hidden_states else None)


class T5ForConditionalGeneration(nnx.Module):
    """Encoder, decoder, and a language model's head."""

    def __init__(self, config: T5Config, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Random weights of `dtype`, from the config's sizes."""
        self.shared = _shared(config, dtype, rngs)
        self.encoder = Encoder(config, dtype, rngs)
        self.decoder = Decoder(config, dtype, rngs)
        sizes = (config.d_model, config.vocab_size)
        self.lm_head = None if config.tie_word_embeddings else _linear(config, sizes, 1.0, dtype, rngs)
        self.scale = config.d_model**-0.5 if config.scale_decoder_outputs else None

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        decoder_input_ids: Array | None = None,
        decoder_attention_mask: Array | None = None,
        *,
        encoder_outputs: Sequence[Array] | None = None,
        inputs_embeds: Array | None = None,
        decoder_inputs_embeds: Array | None = None,
        cache: Cache | None = None,
        output_hidden_states: bool = False,
    ) -> Output:
        """See `jpeft_interop.models.pure`.

        The first of `encoder_outputs` is an `encoder_last_hidden_state` of before; then the encoder is not run, and
        `input_ids` are not looked at. `cache` is refused.
        """
        refuse_cache(cache)
        encode = lambda: self.encoder(embed(self.shared, input_ids, inputs_embeds), attention_mask)
        source = encoded(encode, encoder_outputs)
        x = embed(self.shared, decoder_input_ids, decoder_inputs_embeds, "decoder_")
        states = self.decoder(x, decoder_attention_mask, source[-1], attention_mask)
        return Output(
            logits=self._logits(states[-1]),
            last_hidden_state=states[-1],
            hidden_states=states if output_hidden_states else None,
            encoder_last_hidden_state=source[-1],
            encoder_hidden_states=source if output_hidden_states and encoder_outputs is None else None,
        )

    def _logits(self, x: Array) -> Array:
        x = x if self.scale is None else x * self.scale
        return self.shared.attend(x) if self.lm_head is None else self.lm_head(x)
