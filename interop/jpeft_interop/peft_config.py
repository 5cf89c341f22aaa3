"""`adapter_config.json`, read into a spec and written from one. Field by field: none is ignored unseen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jpeft.errors import AdapterError, SpecError
from jpeft.spec import Spec
from jpeft.tree import nearest
from jpeft_interop.peft_types import TYPES, PeftType, type_of
from jpeft_interop.peft_types.fields import is_inert


@dataclass(frozen=True)
class PeftConfig:
    """An adapter's config: the spec, and what of the file has no place in it.

    `parameters` are PEFT's `target_parameters`, which are no modules' names; `ties` its `ensure_weight_tying`.
    """

    spec: Spec
    base_model: str | None
    task_type: str | None
    fan_in_fan_out: bool
    parameters: tuple[str, ...] = ()
    ties: bool = False


def read_config(found: Mapping[str, Any], file: str) -> PeftConfig:
    """The config in an `adapter_config.json`.

    Args:
      found: the file's JSON object.
      file: its name, for errors.

    Raises:
      AdapterError: a type not known here, a field unknown, malformed, or set to what is not done here.
    """
    peft_type = found.get("peft_type")
    kind = TYPES.get(peft_type) if isinstance(peft_type, str) else None
    if kind is None:
        raise AdapterError(
            f"{file}: 'peft_type' is {peft_type!r:.100}; this version reads {', '.join(map(repr, TYPES))}"
        )
    config = dict(kind.defaults) | dict(found)
    known = {*kind.fields, *kind.refused, *kind.history}
    for name in found:
        if name not in known and not is_inert(found[name]):
            raise AdapterError(
                f"{file}: unknown field {name!r:.100}, set to {found[name]!r:.100}: expected null, false or nothing "
                f"where it is not known what it means; the nearest known is {nearest(name, sorted(known), 1)}"
            )
    _check_fields(kind, config, file)
    try:
        spec = kind.read(config)
    except SpecError as error:
        raise AdapterError(f"{file}: {error}") from error
    names = tuple(config.get("target_parameters") or ())
    ties = bool(config.get("ensure_weight_tying"))
    base, task, transposed = (config[name] for name in ("base_model_name_or_path", "task_type", "fan_in_fan_out"))
    return PeftConfig(spec, base, task, transposed, names, ties)


def _check_fields(kind: PeftType, config: Mapping[str, Any], file: str) -> None:
    for name, (check, expected) in kind.fields.items():
        if not check(config[name]):
            raise AdapterError(f"{file}: field {name!r} must be {expected}; found {config[name]!r:.200}")
    for name in kind.refused:
        if config[name]:
            raise AdapterError(
                f"{file}: {name!r} is set ({config[name]!r:.200}); {kind.name} with it is not supported here"
            )
    if (wrong := kind.check(config)) is not None:
        raise AdapterError(f"{file}: {wrong}")


def write_config(config: PeftConfig) -> dict[str, Any]:
    """The inverse of `read_config`: the JSON object that PEFT itself would write.

    Raises:
      AdapterError: PEFT has no such method.
    """
    kind = type_of(config.spec)
    if kind is None:
        raise AdapterError(f"{config.spec}: {config.spec.method!r} is no type of PEFT's; jpeft.save keeps it")
    return (
        dict(kind.defaults)
        | kind.write(config.spec)
        | {
            "base_model_name_or_path": config.base_model,
            "task_type": config.task_type,
            "fan_in_fan_out": config.fan_in_fan_out,
        }
        | ({"target_parameters": list(config.parameters)} if config.parameters else {})
        | ({"ensure_weight_tying": True} if config.ties else {})
    )
