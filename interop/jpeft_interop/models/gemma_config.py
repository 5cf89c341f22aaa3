"""What the configs of Gemma, Gemma 2 and Gemma 3 (its text model) say: Llama with other norms, scales and caps.

Gemma Team 2024, https://arxiv.org/abs/2403.08295 and https://arxiv.org/abs/2408.00118; 2025,
https://arxiv.org/abs/2503.19786.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jpeft_interop.models.activations import activation
from jpeft_interop.models.llama_config import LlamaConfig, read_llama, sliding_layers, typed_windows
from jpeft_interop.models.reading import optional, refuse, required
from jpeft_interop.models.rope import Rope, read_rope

GELU = "gelu_pytorch_tanh"
NEWER = {
    "num_key_value_heads": 4,
    "hidden_activation": GELU,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
# What transformers has where a config is silent, unless it is what Llama has.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "gemma": {"num_key_value_heads": 16, "hidden_act": GELU, "max_position_embeddings": 8192},
    "gemma2": NEWER
    | {"max_position_embeddings": 8192, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    "gemma3_text": NEWER | {"max_position_embeddings": 131072},
}
SHARED = {"head_dim": 256, "tie_word_embeddings": True, "pad_token_id": 0}


def read_gemma(config: Mapping[str, Any]) -> LlamaConfig:
    """Reads the config of a `gemma`, `gemma2` or `gemma3_text` model; what it leaves out is as transformers has it.

    Raises:
      ModelError: a size is missing or does not fit, or the config asks for what is not here (attention both ways).
    """
    kind = config["model_type"]
    config = {**SHARED, **DEFAULTS[kind], **config}
    refuse(config, use_bidirectional_attention=False)
    plain = read_llama({**config, "hidden_act": _activation(config), "rope_scaling": None, "rope_parameters": None})
    model = replace(plain, unit_norms=True, embed_scale=plain.hidden_size**0.5, ropes=_ropes(config, plain.head_dim))
    if kind == "gemma":
        return model
    model = replace(
        model,
        post_norms=True,
        scale=config["query_pre_attn_scalar"] ** -0.5,
        windows=typed_windows(config, config.get("sliding_window"), _slides(config)),
        logit_cap=config.get("final_logit_softcapping"),
    )
    # Gemma 3's config has attn_logit_softcapping, too, but its attention in transformers does not look at it.
    is_third = kind == "gemma3_text"
    return replace(model, qk_norm=is_third, attention_cap=None if is_third else config.get("attn_logit_softcapping"))


def _activation(config: Mapping[str, Any]) -> str:
    """Gemma's first files say `gelu` and mean its approximation."""
    if config["model_type"] != "gemma":
        name = optional(config, "hidden_activation", GELU)
    else:
        name = GELU if config.get("hidden_act") == "gelu" else optional(config, "hidden_act", GELU)
    activation(name)
    return name


def _slides(config: Mapping[str, Any]) -> list[bool]:
    """Which layers slide where `layer_types` is absent: every other one of Gemma 2, all but each sixth of Gemma 3."""
    every = 2 if config["model_type"] == "gemma2" else optional(config, "sliding_window_pattern", 6)
    return [(number + 1) % every != 0 for number in range(required(config, "num_hidden_layers"))]


def _ropes(config: Mapping[str, Any], head_dim: int) -> tuple[Rope, ...]:
    if config["model_type"] != "gemma3_text":
        return (read_rope(config, head_dim),) * config["num_hidden_layers"]
    whole, local = _third_ropes(config, head_dim)
    return tuple(local if sliding else whole for sliding in sliding_layers(config, _slides(config)))


def _third_ropes(config: Mapping[str, Any], head_dim: int) -> tuple[Rope, Rope]:
    """Those of the layers that see everything, and of those that slide; older files scale the former alone."""
    given = optional(config, "rope_parameters", {})
    whole = {**(given.get("full_attention") or {}), **(config.get("rope_scaling") or {})}
    local = dict(given.get("sliding_attention") or {})
    whole.setdefault("rope_theta", optional(config, "rope_theta", 1e6))
    local.setdefault("rope_theta", optional(config, "rope_local_base_freq", 1e4))
    lengths = {"max_position_embeddings": config["max_position_embeddings"]}
    first, second = (read_rope({"rope_parameters": one, **lengths}, head_dim) for one in (whole, local))
    return first, second
