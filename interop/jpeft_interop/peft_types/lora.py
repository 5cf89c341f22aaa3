"""The config of a LoRA, and of a DoRA, which is a LoRA with `use_dora`."""

from __future__ import annotations

from typing import Any

import jpeft
from jpeft_interop.peft_types.fields import (
    BOOL,
    COMMON,
    COMMON_HISTORY,
    COUNT,
    MAYBE_NAMES,
    NUMBER,
    PEFT_VERSION,
    RATE,
    Config,
    Field,
    PeftType,
    is_count,
    is_names,
    is_number,
    listed,
    object_of,
    targeting,
    targeting_of,
)

DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": PEFT_VERSION,
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}

# The fields that LoRA and AdaLoRA have in common.
SHARED: dict[str, Field] = COMMON | {
    "bias": (lambda x: x in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'"),
    "ensure_weight_tying": BOOL,
    "layers_pattern": MAYBE_NAMES,
    "layers_to_transform": (
        lambda x: x is None or is_count(x) or (isinstance(x, list) and all(map(is_count, x))),
        "an integer, a list of integers or null",
    ),
    "lora_alpha": NUMBER,
    "lora_dropout": RATE,
}

FIELDS: dict[str, Field] = SHARED | {
    "alpha_pattern": (object_of(is_number), "an object of numbers"),
    "lora_bias": BOOL,
    "r": COUNT,
    "rank_pattern": (object_of(is_count), "an object of integers >= 0"),
    "target_modules": MAYBE_NAMES,
    "target_parameters": (lambda value: value is None or is_names(value), "a list of strings or null"),
    "use_dora": BOOL,
    "use_rslora": BOOL,
}

REFUSED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)

HISTORY = (
    *COMMON_HISTORY,
    "corda_config",
    "eva_config",
    "init_lora_weights",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "qalora_group_size",
)

# Initialisers that leave the base alone; PEFT runs the others again at load, and they change it.
HARMLESS_INITS = (True, False, "gaussian", "orthogonal", "eva")


def _check(config: Config) -> str | None:
    if config["target_modules"] is None and not config["target_parameters"]:
        return "'target_modules' must be a string or a list of strings, where there are no 'target_parameters'"
    start = config["init_lora_weights"]
    if isinstance(start, str | bool) and start in HARMLESS_INITS:
        return None
    return (
        f"'init_lora_weights' is {start!r:.100}, which changes the base weights when PEFT loads the file; save it in "
        "PEFT with path_initial_model_for_weight_conversion=... to get an ordinary LoRA"
    )


def shared(config: Config) -> dict[str, Any]:
    """The fields that LoRA and AdaLoRA have in common, as a spec's arguments."""
    return targeting(config) | {
        "alpha": config["lora_alpha"],
        "bias": config["bias"],
        "dropout": config["lora_dropout"],
        "layers_pattern": config["layers_pattern"] or (),
        "layers_to_transform": config["layers_to_transform"],
    }


def shared_of(spec: Any) -> dict[str, Any]:
    """The inverse of `shared`."""
    return targeting_of(spec) | {
        "bias": spec.bias,
        "layers_pattern": listed(spec.layers_pattern) or None,
        "layers_to_transform": listed(spec.layers_to_transform),
        "lora_alpha": spec.rank if spec.alpha is None else spec.alpha,
        "lora_dropout": spec.dropout,
    }


def _read(config: Config) -> jpeft.LoRA:
    method = jpeft.DoRA if config["use_dora"] else jpeft.LoRA
    return method(
        **shared(config),
        rank=config["r"],
        rank_pattern=config["rank_pattern"],
        alpha_pattern=config["alpha_pattern"],
        rank_stabilized=config["use_rslora"],
        factor_bias=config["lora_bias"],
        init="gaussian" if config["init_lora_weights"] == "gaussian" else "kaiming",
    )


def _write(spec: jpeft.LoRA) -> dict[str, Any]:
    return shared_of(spec) | {
        "alpha_pattern": dict(spec.alpha_pattern),
        "init_lora_weights": "gaussian" if spec.init == "gaussian" else True,
        "lora_bias": spec.factor_bias,
        "r": spec.rank,
        "rank_pattern": dict(spec.rank_pattern),
        "use_dora": isinstance(spec, jpeft.DoRA),
        "use_rslora": spec.rank_stabilized,
    }


LORA = PeftType("LORA", DEFAULTS, FIELDS, REFUSED, HISTORY, _read, _write, _check, ("lora_alpha",))
