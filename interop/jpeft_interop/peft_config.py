"""`adapter_config.json` of a LoRA, read into a spec and written from one. Field by field: none is ignored unseen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jpeft
from jpeft.errors import AdapterError
from jpeft.tree import nearest

PEFT_VERSION = "0.21.2"  # whose files these are

# What PEFT writes for a LoRA that uses none of its options.
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

# Options that change the maths in ways not done here; each is refused when it is set.
REFUSED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)

# Fields that say how an adapter came about and do not change what its saved weights mean.
HISTORY = (
    "auto_mapping",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
)

# Initialisers that leave the base alone; PEFT runs the others again at load, and they change it.
HARMLESS_INITS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class PeftConfig:
    """A LoRA's config: the spec, and what of the file has no place in it."""

    spec: jpeft.LoRA
    base_model: str | None
    task_type: str | None
    fan_in_fan_out: bool


Check = Callable[[Any], bool]
_number: Check = lambda x: isinstance(x, (int, float)) and not isinstance(x, bool)
_rank: Check = lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= 0
_names: Check = lambda x: isinstance(x, list) and all(isinstance(name, str) for name in x)
_maybe_names: Check = lambda x: x is None or isinstance(x, str) or _names(x)
_text: Check = lambda x: x is None or isinstance(x, str)
_bool: Check = lambda x: isinstance(x, bool)
_map: Callable[[Check], Check] = lambda check: lambda x: isinstance(x, dict) and all(map(check, x.values()))

FIELDS: dict[str, tuple[Check, str]] = {
    "r": (_rank, "an integer >= 0"),
    "lora_alpha": (_number, "a number"),
    "lora_dropout": (lambda x: _number(x) and 0 <= x < 1, "a number in [0, 1)"),
    "bias": (lambda x: x in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'"),
    "use_rslora": (_bool, "true or false"),
    "lora_bias": (_bool, "true or false"),
    "fan_in_fan_out": (_bool, "true or false"),
    "rank_pattern": (_map(_rank), "an object of integers >= 0"),
    "alpha_pattern": (_map(_number), "an object of numbers"),
    "target_modules": (lambda x: isinstance(x, str) or _names(x), "a string or a list of strings"),
    "exclude_modules": (_maybe_names, "a string, a list of strings or null"),
    "layers_pattern": (_maybe_names, "a string, a list of strings or null"),
    "layers_to_transform": (
        lambda x: x is None or _rank(x) or (isinstance(x, list) and all(map(_rank, x))),
        "an integer, a list of integers or null",
    ),
    "modules_to_save": (lambda x: x is None or _names(x), "a list of strings or null"),
    "base_model_name_or_path": (_text, "a string or null"),
    "task_type": (_text, "a string or null"),
}


def read_config(found: Mapping[str, Any], file: str) -> PeftConfig:
    """The config in an `adapter_config.json`.

    Args:
      found: the file's JSON object.
      file: its name, for errors.

    Raises:
      AdapterError: not a LoRA, a field unknown, malformed, or set to what is not done here.
    """
    peft_type = found.get("peft_type")
    if peft_type != "LORA":
        raise AdapterError(f"{file}: 'peft_type' is {peft_type!r}; this version reads 'LORA'")
    config = DEFAULTS | dict(found)
    known = {*FIELDS, *REFUSED, *HISTORY, "init_lora_weights", "peft_type"}
    for name in found:
        if name not in known:
            raise AdapterError(
                f"{file}: unknown field {name!r}; the nearest known is {nearest(name, sorted(known), 1)}"
            )
    _check_fields(config, file)
    return PeftConfig(_spec(config), config["base_model_name_or_path"], config["task_type"], config["fan_in_fan_out"])


def _check_fields(config: Mapping[str, Any], file: str) -> None:
    for name, (check, expected) in FIELDS.items():
        if not check(config[name]):
            raise AdapterError(f"{file}: field {name!r} must be {expected}; found {config[name]!r}")
    for name in REFUSED:
        if config[name]:
            raise AdapterError(f"{file}: {name!r} is set ({config[name]!r}); LoRA with it is not supported here yet")
    start = config["init_lora_weights"]
    if start not in HARMLESS_INITS:
        raise AdapterError(
            f"{file}: 'init_lora_weights' is {start!r}, which changes the base weights when PEFT loads the file; save "
            "it in PEFT with path_initial_model_for_weight_conversion=... to get an ordinary LoRA"
        )


def _spec(config: Mapping[str, Any]) -> jpeft.LoRA:
    names = lambda name: config[name] or ()
    return jpeft.LoRA(
        rank=config["r"],
        alpha=config["lora_alpha"],
        targets=config["target_modules"],
        exclude=names("exclude_modules"),
        layers_to_transform=config["layers_to_transform"],
        layers_pattern=names("layers_pattern"),
        rank_pattern=config["rank_pattern"],
        alpha_pattern=config["alpha_pattern"],
        rank_stabilized=config["use_rslora"],
        dropout=config["lora_dropout"],
        factor_bias=config["lora_bias"],
        bias=config["bias"],
        modules_to_save=names("modules_to_save"),
        init="gaussian" if config["init_lora_weights"] == "gaussian" else "kaiming",
    )


def write_config(config: PeftConfig) -> dict[str, Any]:
    """The inverse of `read_config`: the JSON object that PEFT itself would write."""
    spec, listed = config.spec, lambda value: list(value) if isinstance(value, tuple) else value
    return DEFAULTS | {
        "r": spec.rank,
        "lora_alpha": spec.rank if spec.alpha is None else spec.alpha,
        "target_modules": listed(spec.targets),
        "exclude_modules": listed(spec.exclude) or None,
        "layers_to_transform": listed(spec.layers_to_transform),
        "layers_pattern": listed(spec.layers_pattern) or None,
        "rank_pattern": dict(spec.rank_pattern),
        "alpha_pattern": dict(spec.alpha_pattern),
        "use_rslora": spec.rank_stabilized,
        "lora_dropout": spec.dropout,
        "lora_bias": spec.factor_bias,
        "bias": spec.bias,
        "modules_to_save": listed(spec.modules_to_save) or None,
        "init_lora_weights": "gaussian" if spec.init == "gaussian" else True,
        "base_model_name_or_path": config.base_model,
        "task_type": config.task_type,
        "fan_in_fan_out": config.fan_in_fan_out,
    }
