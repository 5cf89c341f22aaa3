"""Files that come from elsewhere, opened and read with suspicion: JSON objects, and any file before it is mapped."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from jpeft.errors import AdapterError, JpeftError

MAX_JSON_BYTES = 100_000_000
NOT_FILES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def read_json_object(
    path: str | os.PathLike[str], error: type[JpeftError] = AdapterError, limit: int = MAX_JSON_BYTES
) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
      path: an ordinary file.
      error: what to raise.
      limit: the most bytes the file may have.

    Raises:
      JpeftError: of the type `error`; the file is missing or no ordinary file, too large, not UTF-8, not JSON (NaN and
        Infinity are not), not an object, or an object in it has a key twice.
    """
    descriptor = open_file(path, error)
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise error(f"{path}: expected at most {limit} bytes of JSON, found more")
    return parse_json_object(data, str(path), error)


def parse_json_object(data: bytes, where: str, error: type[JpeftError]) -> dict[str, Any]:
    """The object that `data` is the JSON of; `where` names it in errors, which are of the type `error`."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_refuse)
    except UnicodeDecodeError as reason:
        raise error(f"{where}: expected UTF-8, found the byte {data[reason.start]:#04x} at {reason.start}") from None
    except RecursionError:
        raise error(f"{where}: the JSON is nested too deeply") from None
    except ValueError as reason:
        raise error(f"{where}: not valid JSON: {reason}") from None
    if not isinstance(value, dict):
        raise error(f"{where}: expected a JSON object, found {_json_kind(value)}")
    return value


def open_file(path: str | os.PathLike[str], error: type[JpeftError] = AdapterError) -> int:
    """A descriptor of an ordinary file, for the caller to close. Nothing else is opened: a pipe could block for ever.

    Raises:
      JpeftError: of the type `error`, where there is no such file or it can't be read.
    """
    try:
        _require_ordinary(os.stat(path).st_mode, path, error)
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as reason:
        if isinstance(reason, JpeftError):
            raise
        raise error(f"{path}: can't be read: {getattr(reason, 'strerror', None) or reason}") from None
    try:
        _require_ordinary(os.fstat(descriptor).st_mode, path, error)  # it may have changed since
    except JpeftError:
        os.close(descriptor)
        raise
    return descriptor


def is_plain_name(name: Any) -> bool:
    """Whether a name found in a file names a file of the same folder, and can't lead anywhere else."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not set(name) & set("/\\\0:")
        and Path(name).name == name
    )


def _require_ordinary(mode: int, path: str | os.PathLike[str], error: type[JpeftError]) -> None:
    if not stat.S_ISREG(mode):
        raise error(f"{path}: expected an ordinary file, found {NOT_FILES.get(stat.S_IFMT(mode), 'something else')}")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands there twice")
        found[key] = value
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _json_kind(value: Any) -> str:
    kinds = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")
