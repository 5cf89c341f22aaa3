"""The numbers a CLIP is made from, as `config.json` has them: of a tower alone, or of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jpeft_interop.models.activations import activation
from jpeft_interop.models.reading import heads_divide, optional, sides


@dataclass(frozen=True)
class TowerConfig:
    """What both towers have: a stack of layers, and a projection of what it pools."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    layer_norm_eps: float
    projection_dim: int
    initializer_factor: float
    initializer_range: float


@dataclass(frozen=True)
class TextConfig(TowerConfig):
    """The tower of texts."""

    vocab_size: int
    max_position_embeddings: int
    eos_token_id: int


@dataclass(frozen=True)
class VisionConfig(TowerConfig):
    """The tower of images; sizes are height and width."""

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    num_channels: int

    @property
    def patches(self) -> int:
        """How many patches an image has; what is left over at the edges is not looked at."""
        return (self.image_size[0] // self.patch_size[0]) * (self.image_size[1] // self.patch_size[1])


@dataclass(frozen=True)
class ClipConfig:
    """Both towers, projected to one width."""

    text: TextConfig
    vision: VisionConfig
    projection_dim: int
    logit_scale_init_value: float
    initializer_factor: float


def read_clip_text(config: Mapping[str, Any]) -> TextConfig:
    """Reads the config of a `clip_text_model`; what it leaves out is as transformers has it.

    Raises:
      ModelError: a size does not fit, or the activation is not known.
    """
    return TextConfig(
        **_tower(config, {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}),
        vocab_size=optional(config, "vocab_size", 49408),
        max_position_embeddings=optional(config, "max_position_embeddings", 77),
        eos_token_id=optional(config, "eos_token_id", 49407),
    )


def read_clip_vision(config: Mapping[str, Any]) -> VisionConfig:
    """Reads the config of a `clip_vision_model`; what it leaves out is as transformers has it.

    Raises:
      ModelError: a size does not fit, or the activation is not known.
    """
    return VisionConfig(
        **_tower(config, {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}),
        image_size=sides(config, "image_size", 224),
        patch_size=sides(config, "patch_size", 32),
        num_channels=optional(config, "num_channels", 3),
    )


def read_clip(config: Mapping[str, Any]) -> ClipConfig:
    """Reads the config of a `clip` model: those of its towers, and what joins them.

    Raises:
      ModelError: a size does not fit, or an activation is not known.
    """
    return ClipConfig(
        text=read_clip_text(_part(config, "text_config")),
        vision=read_clip_vision(_part(config, "vision_config")),
        projection_dim=optional(config, "projection_dim", 512),
        logit_scale_init_value=optional(config, "logit_scale_init_value", 2.6592),
        initializer_factor=optional(config, "initializer_factor", 1.0),
    )


def _part(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The config of a tower. Of the two that old files have, transformers takes the one of the longer name."""
    return optional(config, f"{key}_dict", optional(config, key, {}))


def _tower(config: Mapping[str, Any], defaults: Mapping[str, int]) -> dict[str, Any]:
    sizes = {key: optional(config, key, default) for key, default in defaults.items()}
    heads_divide(config, sizes["hidden_size"], sizes["num_attention_heads"])
    activation(optional(config, "hidden_act", "quick_gelu"))
    return sizes | dict(
        num_hidden_layers=optional(config, "num_hidden_layers", 12),
        hidden_act=optional(config, "hidden_act", "quick_gelu"),
        layer_norm_eps=optional(config, "layer_norm_eps", 1e-5),
        projection_dim=optional(config, "projection_dim", 512),
        initializer_factor=optional(config, "initializer_factor", 1.0),
        initializer_range=optional(config, "initializer_range", 0.02),
    )
