"""What the Llama family's configs say: Llama, Mistral and Qwen2 are one model with other defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jpeft_interop.models.activations import activation
from jpeft_interop.models.errors import ModelError
from jpeft_interop.models.reading import number_of_labels, optional, required
from jpeft_interop.models.rope import Rope, read_rope


@dataclass(frozen=True)
class LlamaConfig:
    """The numbers a model of the family is made from; names as in `config.json`.

    Attributes:
      qkv_bias: whether `q_proj`, `k_proj` and `v_proj` have biases.
      o_bias: whether `o_proj` has one.
      windows: each layer's sliding window, or None where it sees everything before it.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    rope: Rope
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    windows: tuple[int | None, ...]
    tie_word_embeddings: bool
    pad_token_id: int | None
    num_labels: int
    initializer_range: float


def read_llama(config: Mapping[str, Any]) -> LlamaConfig:
    """Reads the config of a `llama`, `mistral` or `qwen2` model; what it leaves out is as transformers has it.

    Raises:
      ModelError: a size is missing or does not fit, or the config asks for what is not here.
    """
    heads, hidden = required(config, "num_attention_heads"), required(config, "hidden_size")
    kv_heads = optional(config, "num_key_value_heads", 8 if config["model_type"] == "mistral" else heads)
    if heads % kv_heads:
        raise ModelError(f"{heads} attention heads can't share {kv_heads} key-value heads evenly")
    head_dim = optional(config, "head_dim", hidden // heads)
    activation(optional(config, "hidden_act", "silu"))
    return LlamaConfig(
        vocab_size=required(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=required(config, "intermediate_size"),
        num_hidden_layers=required(config, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        hidden_act=optional(config, "hidden_act", "silu"),
        rms_norm_eps=optional(config, "rms_norm_eps", 1e-6),
        rope=read_rope(config, head_dim),
        windows=_windows(config),
        tie_word_embeddings=optional(config, "tie_word_embeddings", False),
        pad_token_id=config.get("pad_token_id"),
        num_labels=number_of_labels(config),
        initializer_range=optional(config, "initializer_range", 0.02),
        **_biases(config),
    )


def _biases(config: Mapping[str, Any]) -> dict[str, bool]:
    """Only Llama reads its biases from the config; Mistral has none, Qwen2 always those of q, k and v."""
    if config["model_type"] != "llama":
        return {"qkv_bias": config["model_type"] == "qwen2", "o_bias": False, "mlp_bias": False}
    attention = optional(config, "attention_bias", False)
    return {"qkv_bias": attention, "o_bias": attention, "mlp_bias": optional(config, "mlp_bias", False)}


def _windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    layers = required(config, "num_hidden_layers")
    match config["model_type"]:
        case "mistral":
            # Absent is transformers' default; null says that there is none.
            return (config.get("sliding_window", 4096),) * layers
        case "qwen2":
            return _qwen2_windows(config, layers)
        case _:
            return (None,) * layers


def _qwen2_windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    first = optional(config, "max_window_layers", 28)
    by_number = ["sliding_attention" if window and i >= first else "full_attention" for i in range(layers)]
    types = optional(config, "layer_types", by_number)
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown or len(types) != layers:
        raise ModelError(
            f"layer_types must be {layers} of 'full_attention', 'sliding_attention'; found {len(types)}: {list(types)}"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)
