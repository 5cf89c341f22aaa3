"""Records from JSON, each field of just the type that it is annotated with: true is no number, "8" is no 8."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from jpeft.errors import AdapterError

R = TypeVar("R")
LARGEST = 2**53  # of the integers: floats know no larger ones apart


def from_json(kind: type[R], found: Any, where: str, **known: Any) -> R:
    """A dataclass from a JSON object, lists as tuples.

    Args:
      kind: the dataclass.
      found: the object.
      where: what it is called in errors.
      known: fields that are not taken from it.

    Raises:
      AdapterError: no object, a field unknown, missing, or of another type; names it, what was expected and found.
      SpecError: what the class itself refuses.

    Example:
      >>> from jpeft.methods.lora import LoRA
      >>> from_json(LoRA, {"rank": 2, "targets": ["q_proj"]}, "spec")
      LoRA(rank=2, alpha=None, targets=('q_proj',))
    """
    if not isinstance(found, dict):
        raise AdapterError(f"{where}: expected an object, found {found!r:.100}")
    hints, names = _hints(kind), {field.name: field for field in fields(kind)}  # pyright: ignore[reportArgumentType]
    for name, value in found.items():
        if name not in names or name in known:
            raise AdapterError(f"{where}: unknown field {name!r:.100}; those are {', '.join(names)}")
        if not is_of(value, hints[name]):
            raise AdapterError(f"{where}: field {name!r}: expected {_told(hints[name])}, found {value!r:.100}")
    for name, field in names.items():
        if name not in found and name not in known and field.default is field.default_factory is MISSING:
            raise AdapterError(f"{where}: field {name!r} is missing")
    return kind(**known, **{name: _tuples(value) for name, value in found.items()})


def is_of(value: Any, hint: Any) -> bool:
    """Whether a value from JSON is of an annotated type; a mapping may also lie there as a list of pairs."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return any(is_of(value, one) for one in inner)
    if kind is Literal:
        return isinstance(value, str) and value in inner
    if hint is type(None):
        return value is None
    if hint is float:
        return type(value) in (int, float) and abs(value) < 2**1000
    if hint is int:
        return type(value) is int and abs(value) <= LARGEST
    if hint in (str, bool):
        return type(value) is hint
    if kind is not None and issubclass(kind, Mapping):
        return False  # `_tuples` keeps lists alone; the other form of a mapping is pairs
    if kind is tuple and inner[-1] is not Ellipsis:
        return isinstance(value, list) and len(value) == len(inner) and all(map(is_of, value, inner))
    if kind is not None and issubclass(kind, Sequence):
        return isinstance(value, list) and all(is_of(one, inner[0]) for one in value)
    return False


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _told(hint: Any) -> str:
    told = hint.__name__ if isinstance(hint, type) and get_origin(hint) is None else str(hint)
    return told.replace("typing.", "").replace("collections.abc.", "").replace("NoneType", "None")
