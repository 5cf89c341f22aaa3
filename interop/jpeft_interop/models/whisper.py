"""Whisper, speech to text: Radford et al. 2022, https://arxiv.org/abs/2212.04356.

Behaviour as transformers 5.23, "eager", out of training, in fp32 and bf16 (its clamp for fp16 is not here). No cache:
`cache` is refused, and each forward takes all of `decoder_input_ids`. The encoder's sinusoids are a leaf as in torch,
where they are never trained: freeze them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jpeft_interop.models.activations import activation
from jpeft_interop.models.attention import attend, causal_mask
from jpeft_interop.models.cache import Cache
from jpeft_interop.models.encoder_decoder import encoded, refuse_cache
from jpeft_interop.models.errors import ModelError
from jpeft_interop.models.heads import embed, with_logits
from jpeft_interop.models.layers import Embedding, linear
from jpeft_interop.models.norms import LayerNorm
from jpeft_interop.models.output import Output
from jpeft_interop.models.reading import heads_divide, optional, required

EPS = 1e-5
STEP = 2  # frames to a position: the second convolution's stride


@dataclass(frozen=True)
class StackConfig:
    """What the layers of one side are made from."""

    width: int
    layers: int
    heads: int
    inner: int
    act: str
    deviation: float


@dataclass(frozen=True)
class WhisperConfig:
    """The numbers a Whisper is made from; names as in `config.json`."""

    vocab_size: int
    num_mel_bins: int
    max_source_positions: int
    max_target_positions: int
    encoder: StackConfig
    decoder: StackConfig
    tie_word_embeddings: bool


def read_whisper(config: Mapping[str, Any]) -> WhisperConfig:
    """Reads the config of a `whisper` model; what it leaves out is as transformers has it.

    Raises:
      ModelError: a size is missing or does not fit, or the activation is not known.
    """
    return WhisperConfig(
        vocab_size=required(config, "vocab_size"),
        num_mel_bins=optional(config, "num_mel_bins", 80),
        max_source_positions=optional(config, "max_source_positions", 1500),
        max_target_positions=optional(config, "max_target_positions", 448),
        encoder=_stack(config, "encoder"),
        decoder=_stack(config, "decoder"),
        tie_word_embeddings=optional(config, "tie_word_embeddings", True),
    )


def _stack(config: Mapping[str, Any], side: str) -> StackConfig:
    act, width = optional(config, "activation_function", "gelu"), required(config, "d_model")
    activation(act)
    heads_divide(config, width, required(config, f"{side}_attention_heads"))
    return StackConfig(
        width=width,
        layers=required(config, f"{side}_layers"),
        heads=config[f"{side}_attention_heads"],
        inner=required(config, f"{side}_ffn_dim"),
        act=act,
        deviation=optional(config, "init_std", 0.02),
    )


def sinusoids(length: int, width: int) -> Array:
    """Sines, then cosines, of the positions at wavelengths from 2π to 20000π, `(length, width)`."""
    steps = jnp.exp(-math.log(10000) / (width // 2 - 1) * jnp.arange(width // 2))
    angles = jnp.arange(length)[:, None] * steps[None]
    return jnp.concatenate((jnp.sin(angles), jnp.cos(angles)), axis=1)


class Attention(nnx.Module):
    """Attention to the stream itself, or to what the encoder gave. Keys have no bias."""

    def __init__(self, config: StackConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """The four projections."""
        sizes, deviation = (config.width, config.width), config.deviation
        self.k_proj = linear(sizes, deviation, dtype, rngs, bias=False)
        self.v_proj = linear(sizes, deviation, dtype, rngs)
        self.q_proj = linear(sizes, deviation, dtype, rngs)
        self.out_proj = linear(sizes, deviation, dtype, rngs)
        self.head_dim = config.width // config.heads

    def __call__(self, x: Array, source: Array, mask: Array | None) -> Array:
        """Attention of `x`, `(batch, time, width)`, to `source`."""
        query, key, value = (
            projected.reshape(*projected.shape[:2], -1, self.head_dim)
            for projected in (self.q_proj(x), self.k_proj(source), self.v_proj(source))
        )
        return self.out_proj(attend(query, key, value, mask, self.head_dim**-0.5))


class Layer(nnx.Module):
    """Attention and MLP, each on the normed stream and added to it."""

    def __init__(self, config: StackConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """One layer."""
        self.self_attn = Attention(config, dtype, rngs)
        self.self_attn_layer_norm = LayerNorm(config.width, EPS, dtype)
        self.fc1 = linear((config.width, config.inner), config.deviation, dtype, rngs)
        self.fc2 = linear((config.inner, config.width), config.deviation, dtype, rngs)
        self.final_layer_norm = LayerNorm(config.width, EPS, dtype)
        self.act = config.act

    def attention(self, x: Array, mask: Array | None) -> Array:
        """The stream after the attention to itself."""
        normed = self.self_attn_layer_norm(x)
        return x + self.self_attn(normed, normed, mask)

    def mlp(self, x: Array) -> Array:
        """The stream after the MLP."""
        return x + self.fc2(activation(self.act)(self.fc1(self.final_layer_norm(x))))


class EncoderLayer(Layer):
    """Attention, then MLP."""

    def __call__(self, x: Array) -> Array:
        """The stream after this layer."""
        return self.mlp(self.attention(x, None))


class DecoderLayer(Layer):
    """Attention, attention to the encoder, then MLP."""

    def __init__(self, config: StackConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """One layer."""
        super().__init__(config, dtype, rngs)
        self.encoder_attn = Attention(config, dtype, rngs)
        self.encoder_attn_layer_norm = LayerNorm(config.width, EPS, dtype)

    def __call__(self, x: Array, mask: Array, source: Array) -> Array:
        """The stream after this layer."""
        x = self.attention(x, mask)
        return self.mlp(x + self.encoder_attn(self.encoder_attn_layer_norm(x), source, None))


class Encoder(nnx.Module):
    """Two convolutions over the frames, positions, then the stack."""

    def __init__(self, config: WhisperConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """The convolutions, the sinusoids, all layers and the final norm."""
        stack = config.encoder
        self.conv1 = _convolution(config.num_mel_bins, stack, 1, dtype, rngs)
        self.conv2 = _convolution(stack.width, stack, STEP, dtype, rngs)
        self.embed_positions = Embedding((config.max_source_positions, stack.width), stack.deviation, dtype, rngs)
        self.embed_positions.embedding[...] = sinusoids(config.max_source_positions, stack.width).astype(dtype)
        self.layers = nnx.List([EncoderLayer(stack, dtype, rngs) for _ in range(stack.layers)])
        self.layer_norm = LayerNorm(stack.width, EPS, dtype)
        self.wanted = (config.num_mel_bins, STEP * config.max_source_positions)

    def __call__(self, input_features: Array | None) -> tuple[Array, ...]:
        """The stream before the first layer and after each, the last one normed."""
        frames = _features(input_features, self.wanted).transpose(0, 2, 1)
        x = jnp.asarray(frames, self.conv1.kernel.dtype)
        for convolution in (self.conv1, self.conv2):
            x = jax.nn.gelu(convolution(x), approximate=False)
        states = [x + self.embed_positions.embedding[...]]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return (*states[:-1], self.layer_norm(states[-1]))


class Decoder(nnx.Module):
    """Words + positions, then the stack."""

    def __init__(self, config: WhisperConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """The two tables, all layers and the final norm."""
        stack, longest = config.decoder, config.max_target_positions
        self.embed_tokens = Embedding((config.vocab_size, stack.width), stack.deviation, dtype, rngs)
        self.embed_positions = Embedding((longest, stack.width), stack.deviation, dtype, rngs)
        self.layers = nnx.List([DecoderLayer(stack, dtype, rngs) for _ in range(stack.layers)])
        self.layer_norm = LayerNorm(stack.width, EPS, dtype)
        self.longest = longest

    def __call__(
        self, x: Array, attention_mask: Array | None, positions: Array | None, source: Array
    ) -> tuple[Array, ...]:
        """The stream before the first layer and after each, the last one normed."""
        time = x.shape[1]
        if time > self.longest:
            raise ModelError(f"{time} tokens; this model has {self.longest} positions (max_target_positions)")
        mask = causal_mask(attention_mask, positions, time, None, None)
        states = [x + self.embed_positions(jnp.arange(time)[None] if positions is None else positions)]
        for layer in self.layers:
            states.append(layer(states[-1], mask, source))
        return (*states[:-1], self.layer_norm(states[-1]))


def _convolution(channels: int, stack: StackConfig, step: int, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Conv:
    """Over three frames, `step` at a time, one frame of zeros on either side."""
    init = nnx.initializers.normal(stack.deviation)
    return nnx.Conv(
        channels, stack.width, (3,), strides=step, padding=1, param_dtype=dtype, kernel_init=init, rngs=rngs
    )


def _features(input_features: Array | None, wanted: tuple[int, int]) -> Array:
    if input_features is None:
        raise ModelError("give input_features (batch, mel bins, frames), or encoder_outputs")
    if input_features.ndim != 3 or tuple(input_features.shape[1:]) != wanted:
        raise ModelError(
            f"input_features must be of shape (batch, {wanted[0]}, {wanted[1]}), (mel bins, frames) as the config has "
            f"them; found {tuple(input_features.shape)}: pad or cut the frames"
        )
    return input_features


class WhisperModel(nnx.Module):
    """Encoder and decoder without a head."""

    def __init__(self, config: WhisperConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Random weights of `dtype`, from the config's sizes."""
        self.encoder = Encoder(config, dtype, rngs)
        self.decoder = Decoder(config, dtype, rngs)

    def __call__(
        self,
        input_features: Array | None = None,
        attention_mask: Array | None = None,
        decoder_input_ids: Array | None = None,
        decoder_attention_mask: Array | None = None,
        *,
        encoder_outputs: Sequence[Array] | None = None,
        decoder_inputs_embeds: Array | None = None,
        decoder_position_ids: Array | None = None,
        cache: Cache | None = None,
        output_hidden_states: bool = False,
    ) -> Output:
        """See `jpeft_interop.models.pure`; `input_features` are `(batch, mel bins, frames)`, of the model's length.

        `attention_mask` is taken and not looked at, as in transformers: silence is heard. The first of
        `encoder_outputs` is an `encoder_last_hidden_state` of before; then the encoder is not run. `cache` is refused.
        """
        del attention_mask
        refuse_cache(cache)
        source = encoded(lambda: self.encoder(input_features), encoder_outputs)
        x = embed(self.decoder.embed_tokens, decoder_input_ids, decoder_inputs_embeds, "decoder_")
        states = self.decoder(x, decoder_attention_mask, decoder_position_ids, source[-1])
        return Output(
            last_hidden_state=states[-1],
            hidden_states=states if output_hidden_states else None,
            encoder_last_hidden_state=source[-1],
            encoder_hidden_states=source if output_hidden_states and encoder_outputs is None else None,
        )


class WhisperForConditionalGeneration(nnx.Module):
    """Encoder, decoder, and a language model's head; that is the embedding, transposed, where the config ties them."""

    def __init__(self, config: WhisperConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Random weights of `dtype`, from the config's sizes."""
        self.model = WhisperModel(config, dtype, rngs)
        tied, sizes = config.tie_word_embeddings, (config.decoder.width, config.vocab_size)
        self.proj_out = None if tied else linear(sizes, config.decoder.deviation, dtype, rngs, bias=False)

    def __call__(self, input_features: Array | None = None, attention_mask: Array | None = None, **options) -> Output:
        """See `WhisperModel`."""
        output = self.model(input_features, attention_mask, **options)
        return with_logits(output, self.proj_out, self.model.decoder.embed_tokens, None)
