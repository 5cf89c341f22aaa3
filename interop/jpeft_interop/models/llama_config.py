"""What the configs of Llama's family say: Llama, Mistral, Qwen, Phi-3, Mixtral are one model with other settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jpeft_interop.models.activations import activation
from jpeft_interop.models.errors import ModelError
from jpeft_interop.models.reading import number_of_labels, optional, required
from jpeft_interop.models.rope import Rope, read_rope


@dataclass(frozen=True)
class Mixture:
    """Experts in place of an MLP.

    Attributes:
      experts: how many there are.
      chosen: how many of them a token goes to.
      width: the inner width of each.
      normalise: whether the chosen ones' weights are made to add up to 1.
      wide: whether their outputs are weighted in fp32, or in the params' dtype.
      layers: the numbers of the layers that have them.
    """

    experts: int
    chosen: int
    width: int
    normalise: bool
    wide: bool
    layers: tuple[int, ...]


@dataclass(frozen=True)
class LlamaConfig:
    """The numbers a model of the family is made from; names as in `config.json`.

    Attributes:
      ropes: each layer's rotary positions.
      qkv_bias: whether `q_proj`, `k_proj` and `v_proj` have biases.
      o_bias: whether `o_proj` has one.
      windows: each layer's sliding window, or None where it sees everything before it.
      scale: what attention scores are multiplied by.
      qk_norm: whether queries and keys are normed, head by head.
      fused: whether query, key and value are one projection, and gate and up another.
      mixture: the experts, where there are any.
      unit_norms: whether norms keep their weight as the distance from 1.
      post_norms: whether what attention and the MLP give is normed, too, before it is added.
      embed_scale: what looked-up embeddings are multiplied by.
      attention_cap: what attention scores stay below by a tanh.
      logit_cap: the same of the logits.
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
    ropes: tuple[Rope, ...]
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    windows: tuple[int | None, ...]
    scale: float
    tie_word_embeddings: bool
    pad_token_id: int | None
    num_labels: int
    initializer_range: float
    qk_norm: bool = False
    fused: bool = False
    mixture: Mixture | None = None
    unit_norms: bool = False
    post_norms: bool = False
    embed_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None


# What transformers has where a config is silent, unless it is what Llama has.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
    "phi3": {
        "rms_norm_eps": 1e-5,
        "pad_token_id": 32000,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
    },
    "mixtral": {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 131072},
    "qwen3_moe": {"num_key_value_heads": 4, "sliding_window": 4096},
}


def read_llama(config: Mapping[str, Any]) -> LlamaConfig:
    """Reads the config of a `llama`, `mistral`, `qwen2`, `qwen3`, `phi3`, `mixtral` or `qwen3_moe` model.

    What it leaves out is as transformers has it.

    Raises:
      ModelError: a size is missing or does not fit, or the config asks for what is not here.
    """
    kind = config["model_type"]
    config = {**DEFAULTS.get(kind, {}), **config}
    heads, hidden = required(config, "num_attention_heads"), required(config, "hidden_size")
    kv_heads = optional(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise ModelError(f"{heads} attention heads can't share {kv_heads} key-value heads evenly")
    head_dim = optional(config, "head_dim", hidden // heads)
    activation(optional(config, "hidden_act", "silu"))
    layers = required(config, "num_hidden_layers")
    return LlamaConfig(
        vocab_size=required(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=required(config, "intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        hidden_act=optional(config, "hidden_act", "silu"),
        rms_norm_eps=optional(config, "rms_norm_eps", 1e-6),
        ropes=(_rope(config, head_dim),) * layers,
        windows=_windows(config),
        scale=head_dim**-0.5,
        tie_word_embeddings=optional(config, "tie_word_embeddings", False),
        pad_token_id=config.get("pad_token_id"),
        num_labels=number_of_labels(config),
        initializer_range=optional(config, "initializer_range", 0.02),
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        fused=kind == "phi3",
        mixture=_mixture(config),
        **_biases(config),
    )


def _rope(config: Mapping[str, Any], head_dim: int) -> Rope:
    if config["model_type"] != "phi3":
        return read_rope(config, head_dim)
    rope = read_rope(config, head_dim, partial=True)
    if rope.rope_type not in ("default", "longrope"):
        raise ModelError(f"rope_type {rope.rope_type!r} is not supported in a 'phi3' model; only default, longrope")
    return rope


def _biases(config: Mapping[str, Any]) -> dict[str, bool]:
    """Mistral, Mixtral and Phi-3 have none, Qwen2 always those of q, k and v; the others' configs say."""
    attention = optional(config, "attention_bias", False)
    match config["model_type"]:
        case "mistral" | "mixtral" | "phi3":
            return {"qkv_bias": False, "o_bias": False, "mlp_bias": False}
        case "qwen2":
            return {"qkv_bias": True, "o_bias": False, "mlp_bias": False}
        case "llama":
            return {"qkv_bias": attention, "o_bias": attention, "mlp_bias": optional(config, "mlp_bias", False)}
        case _:
            return {"qkv_bias": attention, "o_bias": attention, "mlp_bias": False}


def _windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    layers = config["num_hidden_layers"]
    used = config.get("sliding_window") if config.get("use_sliding_window") else None
    match config["model_type"]:
        case "mistral" | "mixtral" | "phi3":
            # Absent is transformers' default; null says that there is none.
            return (config.get("sliding_window"),) * layers
        case "qwen3_moe":
            return (used,) * layers
        case "qwen2" | "qwen3":
            first = optional(config, "max_window_layers", 28)
            return typed_windows(config, used, [used is not None and i >= first for i in range(layers)])
        case _:
            return (None,) * layers


def typed_windows(config: Mapping[str, Any], window: int | None, slides: list[bool]) -> tuple[int | None, ...]:
    """The windows of a model whose `layer_types` say which of its layers have one.

    Args:
      config: the model's.
      window: the width of each.
      slides: which layers have one where the config has no `layer_types`.

    Raises:
      ModelError: `layer_types` are not one of the two that are known a layer.
    """
    return tuple(window if sliding else None for sliding in sliding_layers(config, slides))


def sliding_layers(config: Mapping[str, Any], slides: list[bool]) -> list[bool]:
    """Which layers are of the type `sliding_attention`; see `typed_windows`."""
    types = optional(config, "layer_types", None)
    if types is None:
        return slides
    if set(types) - {"sliding_attention", "full_attention"} or len(types) != len(slides):
        raise ModelError(
            f"layer_types must be {len(slides)} of 'full_attention', 'sliding_attention'; "
            f"found {len(types)}: {list(types)}"
        )
    return [kind == "sliding_attention" for kind in types]


def _mixture(config: Mapping[str, Any]) -> Mixture | None:
    layers = range(config["num_hidden_layers"])
    experts = config.get("num_local_experts") or config.get("num_experts")
    match config["model_type"]:
        case "mixtral":
            chosen, width = optional(config, "num_experts_per_tok", 2), config["intermediate_size"]
            return _chosen(Mixture(experts or 8, chosen, width, True, True, tuple(layers)))
        case "qwen3_moe":
            step, dense = optional(config, "decoder_sparse_step", 1), optional(config, "mlp_only_layers", ())
            sparse = tuple(i for i in layers if i not in dense and (i + 1) % step == 0)
            chosen, width = optional(config, "num_experts_per_tok", 8), optional(config, "moe_intermediate_size", 768)
            normalise = optional(config, "norm_topk_prob", False)
            return _chosen(Mixture(experts or 128, chosen, width, normalise, False, sparse))
        case _:
            return None


def _chosen(mixture: Mixture) -> Mixture:
    if not 0 < mixture.chosen <= mixture.experts:
        raise ModelError(f"num_experts_per_tok must be from 1 to the {mixture.experts} experts; found {mixture.chosen}")
    return mixture
