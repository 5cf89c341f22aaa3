"""The config of an IA³."""

from __future__ import annotations

from typing import Any

import jpeft
from jpeft_interop.peft_types.fields import (
    COMMON,
    COMMON_HISTORY,
    ENDS,
    PEFT_VERSION,
    Config,
    Field,
    PeftType,
    listed,
    targeting,
    targeting_of,
)

DEFAULTS: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "feedforward_modules": None,
    "inference_mode": True,
    "init_ia3_weights": True,
    "modules_to_save": None,
    "peft_type": "IA3",
    "peft_version": PEFT_VERSION,
    "revision": None,
    "target_modules": None,
    "task_type": None,
}

FIELDS: dict[str, Field] = COMMON | {"feedforward_modules": ENDS}


def _read(config: Config) -> jpeft.IA3:
    return jpeft.IA3(**targeting(config), feedforward=config["feedforward_modules"])


def _write(spec: jpeft.IA3) -> dict[str, Any]:
    return targeting_of(spec) | {"feedforward_modules": listed(spec.feedforward)}


IA3 = PeftType("IA3", DEFAULTS, FIELDS, (), (*COMMON_HISTORY, "init_ia3_weights"), _read, _write)
