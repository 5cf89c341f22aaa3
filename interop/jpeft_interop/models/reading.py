"""Reading a config: a dict as `config.json` or `PretrainedConfig.to_dict()` gives it, unknown to be complete."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jpeft_interop.models.errors import ModelError


def required(config: Mapping[str, Any], key: str) -> Any:
    """The value at `key`.

    Raises:
      ModelError: there is none.
    """
    if config.get(key) is None:
        raise ModelError(f"the config of a {config.get('model_type')!r} model needs {key!r}; it has {sorted(config)}")
    return config[key]


def optional(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value at `key`, or `default` where the config leaves it out or says null."""
    value = config.get(key)
    return default if value is None else value


def refuse(config: Mapping[str, Any], **known: Any) -> None:
    """Raises a ModelError where a key of the config is neither absent nor null nor the one value that is supported."""
    for key, value in known.items():
        if optional(config, key, value) != value:
            model = config.get("model_type")
            raise ModelError(f"{key}={config[key]!r} is not supported in a {model!r} model; only {value!r}")


def heads_divide(config: Mapping[str, Any], hidden: int, heads: int) -> int:
    """The width of a head where heads share the hidden width evenly."""
    if hidden % heads:
        model = config.get("model_type")
        raise ModelError(f"a {model!r} model of width {hidden} can't be split evenly into {heads} heads")
    return hidden // heads


def number_of_labels(config: Mapping[str, Any]) -> int:
    """How many classes a classification head has: `num_labels`, else the names in `id2label`, else 2."""
    return int(config.get("num_labels") or len(config.get("id2label") or (0, 1)))


def sides(config: Mapping[str, Any], key: str, default: int) -> tuple[int, int]:
    """A height and a width; one number is both."""
    value = optional(config, key, default)
    height, width = value if isinstance(value, list | tuple) else (value, value)
    return int(height), int(width)
