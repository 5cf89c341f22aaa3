"""What a field of an `adapter_config.json` may hold, and what the description of one PEFT type consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jpeft.spec import Spec
from jpeft_interop.peft_resolution import TASKS

LARGEST, MOST = 1e30, 2**53
MOST_ENDS = 10_000  # names that are the ends of paths at any letter, which are tried one by one
PEFT_VERSION = "0.21.2"  # whose files these are

Config = Mapping[str, Any]
Check = Callable[[Any], bool]
Field = tuple[Check, str]


def is_number(value: Any) -> bool:
    """Whether it is a number, of a size that fp32 has; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST


def is_count(value: Any) -> bool:
    """Whether it is an integer >= 0."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST


def is_inert(value: Any) -> bool:
    """Whether a field that a newer PEFT writes does nothing, by its value: a number always says something."""
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def is_names(value: Any) -> bool:
    """Whether it is a list of strings."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def is_ends(value: Any) -> bool:
    """Whether it is a list of the ends of names, and not too long a one."""
    return is_names(value) and len(value) <= MOST_ENDS


def object_of(check: Check) -> Check:
    """A check of an object's values."""
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def between(least: float, below: float) -> Check:
    """A check of a number's range; `below` is not in it."""
    return lambda value: is_number(value) and least <= value < below


BOOL: Field = (lambda value: isinstance(value, bool), "true or false")
COUNT: Field = (is_count, "an integer >= 0")
POSITIVE: Field = (lambda value: is_count(value) and value > 0, "an integer >= 1")
NUMBER: Field = (is_number, "a number")
RATE: Field = (between(0, 1), "a number in [0, 1)")
TEXT: Field = (lambda value: value is None or isinstance(value, str), "a string or null")
NAMES: Field = (lambda value: isinstance(value, str) or is_names(value), "a string or a list of strings")
ENDS: Field = (
    lambda value: isinstance(value, str) or is_ends(value),
    f"a string or a list of at most {MOST_ENDS} strings",
)
MAYBE_NAMES: Field = (
    lambda value: value is None or isinstance(value, str) or is_names(value),
    "a string, a list of strings or null",
)

COMMON: dict[str, Field] = {
    "base_model_name_or_path": TEXT,
    "exclude_modules": MAYBE_NAMES,
    "fan_in_fan_out": BOOL,
    "modules_to_save": (
        lambda value: value is None or is_ends(value),
        f"a list of at most {MOST_ENDS} strings, or null",
    ),
    "target_modules": NAMES,
    "task_type": (
        lambda value: value is None or (isinstance(value, str) and value in TASKS),
        f"one of {', '.join(TASKS)}, or null",
    ),
}

# Fields that say how an adapter came about and do not change what its saved weights mean.
COMMON_HISTORY = ("auto_mapping", "inference_mode", "peft_type", "peft_version", "revision", "runtime_config")


@dataclass(frozen=True)
class PeftType:
    """One `peft_type`: its fields, and the spec that they stand for.

    Attributes:
      name: what the file calls it.
      defaults: every field that PEFT writes, as it is where none of the options is used.
      fields: those that are read, and what each may hold.
      refused: those that change the maths in ways not done here; each is refused when it is set.
      history: those that have no bearing on what the saved weights mean.
      read: the spec of a config that was checked.
      write: the fields that a spec in torch's names stands for.
      check: `(config, found)`: what is wrong with values that no single field shows, or None.
      stated: fields without which the weights mean something else, if the default is not what was trained.
    """

    name: str
    defaults: Config
    fields: Mapping[str, Field]
    refused: tuple[str, ...]
    history: tuple[str, ...]
    read: Callable[[Config], Spec]
    write: Callable[[Any], dict[str, Any]]
    check: Callable[[Config], str | None] = lambda config: None
    stated: tuple[str, ...] = ()


def listed(value: Any) -> Any:
    """A tuple as JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def targeting(config: Config) -> dict[str, Any]:
    """The targeting fields that all types have, as a spec's arguments."""
    return {
        "targets": config["target_modules"] or (),
        "exclude": config["exclude_modules"] or (),
        "modules_to_save": config["modules_to_save"] or (),
    }


def targeting_of(spec: Spec) -> dict[str, Any]:
    """The inverse of `targeting`."""
    return {
        "target_modules": listed(spec.targets),
        "exclude_modules": listed(spec.exclude) or None,
        "modules_to_save": listed(spec.modules_to_save) or None,
    }
