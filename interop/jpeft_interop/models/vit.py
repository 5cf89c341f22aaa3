"""ViT, an encoder of images: Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929.

Behaviour as transformers 5.23, "eager". Images have the size that the model was made for: positions are not
interpolated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jpeft_interop.models.activations import activation
from jpeft_interop.models.attention import attend, padding_mask
from jpeft_interop.models.heads import images
from jpeft_interop.models.layers import Patches, linear
from jpeft_interop.models.norms import LayerNorm
from jpeft_interop.models.output import Output
from jpeft_interop.models.reading import heads_divide, number_of_labels, optional, required, sides


@dataclass(frozen=True)
class ViTConfig:
    """The numbers a ViT is made from; names as in `config.json`.

    Attributes:
      image_size: height and width.
      patch_size: height and width.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    intermediate_size: int
    hidden_act: str
    layer_norm_eps: float
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    num_channels: int
    qkv_bias: bool
    pooler_output_size: int
    pooler_act: str
    num_labels: int
    initializer_range: float

    @property
    def patches(self) -> int:
        """How many patches an image has; what is left over at the edges is not looked at."""
        return (self.image_size[0] // self.patch_size[0]) * (self.image_size[1] // self.patch_size[1])


def read_vit(config: Mapping[str, Any]) -> ViTConfig:
    """Reads the config of a `vit` model; what it leaves out is as transformers has it.

    Raises:
      ModelError: a size is missing or does not fit, or an activation is not known.
    """
    width = required(config, "hidden_size")
    even = heads_divide(config, width, required(config, "num_attention_heads"))
    activation(optional(config, "hidden_act", "gelu"))
    activation(optional(config, "pooler_act", "tanh"))
    return ViTConfig(
        hidden_size=width,
        num_hidden_layers=required(config, "num_hidden_layers"),
        num_attention_heads=config["num_attention_heads"],
        head_dim=optional(config, "head_dim", even),
        intermediate_size=required(config, "intermediate_size"),
        hidden_act=optional(config, "hidden_act", "gelu"),
        layer_norm_eps=optional(config, "layer_norm_eps", 1e-12),
        image_size=sides(config, "image_size", 224),
        patch_size=sides(config, "patch_size", 16),
        num_channels=optional(config, "num_channels", 3),
        qkv_bias=optional(config, "qkv_bias", True),
        pooler_output_size=config.get("pooler_output_size") or width,
        pooler_act=optional(config, "pooler_act", "tanh"),
        num_labels=number_of_labels(config),
        initializer_range=optional(config, "initializer_range", 0.02),
    )


def _linear(
    config: ViTConfig, sizes: tuple[int, int], dtype: DTypeLike, rngs: nnx.Rngs, bias: bool = True
) -> nnx.Linear:
    return linear(sizes, config.initializer_range, dtype, rngs, bias)


class PatchEmbeddings(nnx.Module):
    """Torch's name for what holds the projection of the patches."""

    def __init__(self, config: ViTConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """The projection."""
        sizes = (config.num_channels, config.hidden_size)
        self.projection = Patches(config.patch_size, sizes, config.initializer_range, dtype, rngs)


class Embeddings(nnx.Module):
    """A learned first token, then the patches; each with its position."""

    def __init__(self, config: ViTConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """The token, the positions and the projection of the patches."""
        normal = nnx.initializers.normal(config.initializer_range)
        self.cls_token = nnx.Param(normal(rngs.params(), (1, 1, config.hidden_size), dtype))
        self.position_embeddings = nnx.Param(normal(rngs.params(), (1, config.patches + 1, config.hidden_size), dtype))
        self.patch_embeddings = PatchEmbeddings(config, dtype, rngs)
        self.wanted = (config.num_channels, *config.image_size)

    def __call__(self, pixel_values: Array | None) -> Array:
        """The stream `(batch, 1 + patches, hidden)`."""
        patches = self.patch_embeddings.projection(images(pixel_values, self.wanted))
        first = jnp.broadcast_to(self.cls_token[...], (patches.shape[0], 1, patches.shape[2]))
        return jnp.concatenate((first, patches), axis=1) + self.position_embeddings[...]


class Attention(nnx.Module):
    """Attention in all directions."""

    def __init__(self, config: ViTConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """The four projections."""
        width, inner, bias = config.hidden_size, config.num_attention_heads * config.head_dim, config.qkv_bias
        self.q_proj = _linear(config, (width, inner), dtype, rngs, bias)
        self.k_proj = _linear(config, (width, inner), dtype, rngs, bias)
        self.v_proj = _linear(config, (width, inner), dtype, rngs, bias)
        self.o_proj = _linear(config, (inner, width), dtype, rngs)
        self.head_dim = config.head_dim

    def __call__(self, x: Array, mask: Array | None) -> Array:
        """Attention on `(batch, tokens, hidden)`."""
        query, key, value = (
            projected.reshape(*projected.shape[:2], -1, self.head_dim)
            for projected in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        return self.o_proj(attend(query, key, value, mask, self.head_dim**-0.5))


class MLP(nnx.Module):
    """fc2(act(fc1(x)))."""

    def __init__(self, config: ViTConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """The two projections."""
        self.fc1 = _linear(config, (config.hidden_size, config.intermediate_size), dtype, rngs)
        self.fc2 = _linear(config, (config.intermediate_size, config.hidden_size), dtype, rngs)
        self.hidden_act = config.hidden_act

    def __call__(self, x: Array) -> Array:
        """On `(batch, tokens, hidden)`."""
        return self.fc2(activation(self.hidden_act)(self.fc1(x)))


class Layer(nnx.Module):
    """Attention, then MLP, each on the normed stream and added to it."""

    def __init__(self, config: ViTConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """One layer."""
        self.attention = Attention(config, dtype, rngs)
        self.layernorm_before = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype)
        self.layernorm_after = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype)
        self.mlp = MLP(config, dtype, rngs)

    def __call__(self, x: Array, mask: Array | None) -> Array:
        """The stream after this layer."""
        x = x + self.attention(self.layernorm_before(x), mask)
        return x + self.mlp(self.layernorm_after(x))


class Pooler(nnx.Module):
    """act(dense(first token))."""

    def __init__(self, config: ViTConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """The projection."""
        self.dense = _linear(config, (config.hidden_size, config.pooler_output_size), dtype, rngs)
        self.pooler_act = config.pooler_act

    def __call__(self, x: Array) -> Array:
        """`(batch, size)` of `(batch, tokens, hidden)`."""
        return activation(self.pooler_act)(self.dense(x[:, 0]))


class ViTModel(nnx.Module):
    """The encoder with its pooler."""

    def __init__(self, config: ViTConfig, dtype: DTypeLike, rngs: nnx.Rngs, pooler: bool = True) -> None:
        """Random weights of `dtype`, from the config's sizes."""
        self.embeddings = Embeddings(config, dtype, rngs)
        self.layers = nnx.List([Layer(config, dtype, rngs) for _ in range(config.num_hidden_layers)])
        self.layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype)
        self.pooler = Pooler(config, dtype, rngs) if pooler else None

    def __call__(
        self,
        pixel_values: Array | None = None,
        *,
        attention_mask: Array | None = None,
        output_hidden_states: bool = False,
    ) -> Output:
        """See `jpeft_interop.models.pure`; `pixel_values` are `(batch, channels, height, width)`.

        An `attention_mask`, `(batch, 1 + patches)`, is of the first token and the patches.
        """
        states = [self.embeddings(pixel_values)]
        mask = padding_mask(attention_mask, states[0].shape[1])
        for layer in self.layers:
            states.append(layer(states[-1], mask))
        x = self.layernorm(states[-1])
        return Output(
            last_hidden_state=x,
            hidden_states=tuple(states) if output_hidden_states else None,
            pooled=None if self.pooler is None else self.pooler(x),
        )


class ViTForImageClassification(nnx.Module):
    """A classifier on the first token."""

    def __init__(self, config: ViTConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Random weights of `dtype`, from the config's sizes."""
        self.vit = ViTModel(config, dtype, rngs, pooler=False)
        self.classifier = _linear(config, (config.hidden_size, config.num_labels), dtype, rngs)

    def __call__(self, pixel_values: Array | None = None, **options) -> Output:
        """See `jpeft_interop.models.pure`."""
        output = self.vit(pixel_values, **options)
        assert output.last_hidden_state is not None
        return replace(output, logits=self.classifier(output.last_hidden_state[:, 0]))
