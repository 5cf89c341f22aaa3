"""CLIP, texts and images in one space: Radford et al. 2021, https://arxiv.org/abs/2103.00020.

Behaviour as transformers 5.23, "eager". Images have the size that the model was made for: positions are not
interpolated.
"""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jpeft_interop.models.activations import activation
from jpeft_interop.models.attention import attend, causal_mask
from jpeft_interop.models.clip_config import ClipConfig, TextConfig, TowerConfig, VisionConfig
from jpeft_interop.models.errors import ModelError
from jpeft_interop.models.heads import embed, images
from jpeft_interop.models.layers import Embedding, Patches, linear
from jpeft_interop.models.norms import LayerNorm
from jpeft_interop.models.output import Output

# Until transformers 4.31 configs had this number for the end of a text, whatever the vocabulary had.
WRONG_EOS = 2


class Attention(nnx.Module):
    """Attention, causal where the mask is."""

    def __init__(self, config: TowerConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """The four projections."""
        width, factor = config.hidden_size, config.initializer_factor
        sizes, deviation = (width, width), factor * (2 * width * config.num_hidden_layers) ** -0.5
        self.k_proj = linear(sizes, deviation, dtype, rngs)
        self.v_proj = linear(sizes, deviation, dtype, rngs)
        self.q_proj = linear(sizes, deviation, dtype, rngs)
        self.out_proj = linear(sizes, factor * width**-0.5, dtype, rngs)
        self.head_dim = width // config.num_attention_heads

    def __call__(self, x: Array, mask: Array | None) -> Array:
        """Attention on `(batch, tokens, hidden)`."""
        query, key, value = (
            projected.reshape(*projected.shape[:2], -1, self.head_dim)
            for projected in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        return self.out_proj(attend(query, key, value, mask, self.head_dim**-0.5))


class MLP(nnx.Module):
    """fc2(act(fc1(x)))."""

    def __init__(self, config: TowerConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """The two projections."""
        width, wide, factor = config.hidden_size, config.intermediate_size, config.initializer_factor
        self.fc1 = linear((width, wide), factor * (2 * width) ** -0.5, dtype, rngs)
        self.fc2 = linear((wide, width), factor * (2 * width * config.num_hidden_layers) ** -0.5, dtype, rngs)
        self.hidden_act = config.hidden_act

    def __call__(self, x: Array) -> Array:
        """On `(batch, tokens, hidden)`."""
        return self.fc2(activation(self.hidden_act)(self.fc1(x)))


class Layer(nnx.Module):
    """Attention, then MLP, each on the normed stream and added to it."""

    def __init__(self, config: TowerConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """One layer."""
        self.self_attn = Attention(config, dtype, rngs)
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype)
        self.mlp = MLP(config, dtype, rngs)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype)

    def __call__(self, x: Array, mask: Array | None) -> Array:
        """The stream after this layer."""
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    """The stack of layers."""

    def __init__(self, config: TowerConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """All layers."""
        self.layers = nnx.List([Layer(config, dtype, rngs) for _ in range(config.num_hidden_layers)])

    def __call__(self, x: Array, mask: Array | None) -> tuple[Array, ...]:
        """The stream before the first layer and after each."""
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1], mask))
        return tuple(states)


class TextEmbeddings(nnx.Module):
    """Words + positions."""

    def __init__(self, config: TextConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """The two tables."""
        deviation, longest = 0.02 * config.initializer_factor, config.max_position_embeddings
        self.token_embedding = Embedding((config.vocab_size, config.hidden_size), deviation, dtype, rngs)
        self.position_embedding = Embedding((longest, config.hidden_size), deviation, dtype, rngs)
        self.longest = longest

    def __call__(self, input_ids: Array, positions: Array | None) -> Array:
        """The stream `(batch, time, hidden)`; positions are counted from 0 where not given."""
        x = embed(self.token_embedding, input_ids, None)
        if x.shape[1] > self.longest:
            raise ModelError(f"{x.shape[1]} tokens; this model has {self.longest} positions (max_position_embeddings)")
        return x + self.position_embedding(jnp.arange(x.shape[1])[None] if positions is None else positions)


class CLIPTextModel(nnx.Module):
    """The tower of texts; it reads from left to right, and pools where the text ends."""

    def __init__(self, config: TextConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Random weights of `dtype`, from the config's sizes."""
        self.embeddings = TextEmbeddings(config, dtype, rngs)
        self.encoder = Encoder(config, dtype, rngs)
        self.final_layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype)
        self.eos_token_id = config.eos_token_id

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        *,
        position_ids: Array | None = None,
        output_hidden_states: bool = False,
    ) -> Output:
        """See `jpeft_interop.models.pure`."""
        if input_ids is None:
            raise ModelError("give input_ids (batch, time): the text is pooled where they end")
        x = self.embeddings(input_ids, position_ids)
        states = self.encoder(x, causal_mask(attention_mask, None, x.shape[1], None, None))
        x = self.final_layer_norm(states[-1])
        return Output(
            last_hidden_state=x,
            hidden_states=states if output_hidden_states else None,
            pooled=jnp.take_along_axis(x, self._end(input_ids)[:, None, None], axis=1)[:, 0],
        )

    def _end(self, input_ids: Array) -> Array:
        """Where each text ends: at its first end-of-text token, or its largest id where the config's is of old."""
        if self.eos_token_id == WRONG_EOS:
            return jnp.argmax(input_ids, axis=1)
        return jnp.argmax(input_ids == self.eos_token_id, axis=1)


class VisionEmbeddings(nnx.Module):
    """A learned first token, then the patches; each with its position."""

    def __init__(self, config: VisionConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """The token, the positions and the projection of the patches."""
        width, factor = config.hidden_size, config.initializer_factor
        deviation = factor * config.initializer_range
        first = nnx.initializers.normal(factor * width**-0.5)
        self.class_embedding = nnx.Param(first(rngs.params(), (width,), dtype))
        self.patch_embedding = Patches(
            config.patch_size, (config.num_channels, width), deviation, dtype, rngs, bias=False
        )
        self.position_embedding = Embedding((config.patches + 1, width), deviation, dtype, rngs)
        self.wanted = (config.num_channels, *config.image_size)

    def __call__(self, pixel_values: Array | None) -> Array:
        """The stream `(batch, 1 + patches, hidden)`."""
        patches = self.patch_embedding(images(pixel_values, self.wanted))
        first = jnp.broadcast_to(self.class_embedding[...], (patches.shape[0], 1, patches.shape[2]))
        return jnp.concatenate((first, patches), axis=1) + self.position_embedding(jnp.arange(patches.shape[1] + 1))


class CLIPVisionModel(nnx.Module):
    """The tower of images; it pools the first token, and norms that alone."""

    def __init__(self, config: VisionConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Random weights of `dtype`, from the config's sizes."""
        width, eps = config.hidden_size, config.layer_norm_eps
        self.embeddings = VisionEmbeddings(config, dtype, rngs)
        self.pre_layrnorm = LayerNorm(width, eps, dtype)
        self.encoder = Encoder(config, dtype, rngs)
        self.post_layernorm = LayerNorm(width, eps, dtype)

    def __call__(self, pixel_values: Array | None = None, *, output_hidden_states: bool = False) -> Output:
        """See `jpeft_interop.models.pure`; `pixel_values` are `(batch, channels, height, width)`."""
        states = self.encoder(self.pre_layrnorm(self.embeddings(pixel_values)), None)
        return Output(
            last_hidden_state=states[-1],
            hidden_states=states if output_hidden_states else None,
            pooled=self.post_layernorm(states[-1][:, 0]),
        )


class CLIPTextModelWithProjection(nnx.Module):
    """The tower of texts, projected to the common space."""

    def __init__(self, config: TextConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Random weights of `dtype`, from the config's sizes."""
        self.text_model = CLIPTextModel(config, dtype, rngs)
        self.text_projection = _projection(config, config.projection_dim, config.initializer_factor, dtype, rngs)

    def __call__(self, input_ids: Array | None = None, attention_mask: Array | None = None, **options) -> Output:
        """See `jpeft_interop.models.pure`."""
        output = self.text_model(input_ids, attention_mask, **options)
        assert output.pooled is not None
        return replace(output, text_embeds=self.text_projection(output.pooled))


class CLIPVisionModelWithProjection(nnx.Module):
    """The tower of images, projected to the common space."""

    def __init__(self, config: VisionConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Random weights of `dtype`, from the config's sizes."""
        self.vision_model = CLIPVisionModel(config, dtype, rngs)
        self.visual_projection = _projection(config, config.projection_dim, config.initializer_factor, dtype, rngs)

    def __call__(self, pixel_values: Array | None = None, **options) -> Output:
        """See `jpeft_interop.models.pure`."""
        output = self.vision_model(pixel_values, **options)
        assert output.pooled is not None
        return replace(output, image_embeds=self.visual_projection(output.pooled))


class CLIPModel(nnx.Module):
    """Both towers, and how alike each text and each image are."""

    def __init__(self, config: ClipConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Random weights of `dtype`, from the config's sizes."""
        width, factor = config.projection_dim, config.initializer_factor
        self.logit_scale = nnx.Param(jnp.asarray(config.logit_scale_init_value, dtype))
        self.text_model = CLIPTextModel(config.text, dtype, rngs)
        self.vision_model = CLIPVisionModel(config.vision, dtype, rngs)
        self.visual_projection = _projection(config.vision, width, factor, dtype, rngs)
        self.text_projection = _projection(config.text, width, factor, dtype, rngs)

    def __call__(
        self,
        input_ids: Array | None = None,
        pixel_values: Array | None = None,
        attention_mask: Array | None = None,
        *,
        position_ids: Array | None = None,
        output_hidden_states: bool = False,
    ) -> Output:
        """See `jpeft_interop.models.pure`; texts and images may differ in number."""
        vision = self.vision_model(pixel_values, output_hidden_states=output_hidden_states)
        text = self.text_model(
            input_ids, attention_mask, position_ids=position_ids, output_hidden_states=output_hidden_states
        )
        assert vision.pooled is not None and text.pooled is not None
        vision = replace(vision, pooled=self.visual_projection(vision.pooled))
        text = replace(text, pooled=self.text_projection(text.pooled))
        image_embeds, text_embeds = _normed(vision.pooled), _normed(text.pooled)
        similar = text_embeds @ image_embeds.T * jnp.exp(self.logit_scale[...])
        return Output(
            logits_per_text=similar,
            logits_per_image=similar.T,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            vision_model_output=vision,
            text_model_output=text,
        )


def _projection(config: TowerConfig, width: int, factor: float, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    return linear((config.hidden_size, width), factor * config.hidden_size**-0.5, dtype, rngs, bias=False)


def _normed(x: Array | None) -> Array:
    assert x is not None
    return x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True))
