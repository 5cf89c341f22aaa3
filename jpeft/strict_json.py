"""Files that come from elsewhere, opened and read with suspicion: JSON objects, and any file before it is mapped."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np

from jpeft.errors import AdapterError, JpeftError

MAX_JSON_BYTES, MAX_DEPTH = 100_000_000, 100
OTHERS = bytes(sorted(set(range(256)) - set(b'"[]{},')))  # what is no mark of JSON's structure
NOT_FILES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def read_json_object(
    path: str | os.PathLike[str],
    error: type[JpeftError] = AdapterError,
    limit: int = MAX_JSON_BYTES,
    depth: int = MAX_DEPTH,
) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
      path: an ordinary file.
      error: what to raise.
      limit: the most bytes the file may have.
      depth: how deep lists and objects may lie in each other.

    Raises:
      JpeftError: of the type `error`; the file is missing or no ordinary file, too large, not UTF-8, not JSON (NaN and
        Infinity are not), not an object, or an object in it has a key twice.
    """
    descriptor = open_file(path, error)
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise error(f"{path}: expected at most {limit} bytes of JSON, found more")
    return parse_json_object(data, str(path), error, depth)


def parse_json_object(
    data: bytes,
    where: str,
    error: type[JpeftError],
    depth: int = MAX_DEPTH,
    floats: bool = True,
    most: int | None = None,
) -> dict[str, Any]:
    """The object that `data` is the JSON of; `where` names it in errors, which are of the type `error`.

    Args:
      data: UTF-8, without a byte order mark.
      where: the file, or the part of it.
      error: what to raise.
      depth: how deep lists and objects may lie in each other. Seen before anything is parsed: the parser recurses.
      floats: False where no number with a point or an exponent has a place.
      most: how many values there may be, if that is limited; lists and objects are values, too.
    """
    if data.startswith(b"\xef\xbb\xbf"):
        raise error(f"{where}: expected JSON, found a byte order mark before it")
    deepest, values = _extent(data, depth if most is None else min(depth, most))
    if deepest > depth:
        raise error(f"{where}: the JSON is nested too deeply: expected at most {depth} levels")
    if most is not None and values > most:
        raise error(f"{where}: expected at most {most} values in the JSON, found {values}")
    number = _finite if floats else _no_float
    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse, parse_float=number)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as reason:
        raise error(f"{where}: expected UTF-8, found the byte {data[reason.start]:#04x} at {reason.start}") from None
    except UnicodeEncodeError:
        raise error(f"{where}: expected text, found half of a surrogate pair") from None
    except (ValueError, RecursionError) as reason:
        raise error(f"{where}: not valid JSON: {reason!s:.200}") from None
    if not isinstance(value, dict):
        raise error(f"{where}: expected a JSON object, found {_json_kind(value)}")
    return value


def _extent(data: bytes, enough: int) -> tuple[int, int]:
    """How deep lists and objects lie in each other, and how many values there are, about; 0 where both are few.

    Nothing is made for a value or a string here: only the marks of structure are kept, and of those the ones outside
    strings. A string that does not end goes on to the end.
    """
    if sum(map(data.count, (b"[", b"{", b","))) <= enough:
        return 0, 0
    marks = data.replace(rb"\\", b"").replace(rb"\"", b"").translate(None, OTHERS)
    found = np.frombuffer(marks, np.uint8)
    found = found[np.bitwise_xor.accumulate(found == ord('"')) == (found == ord('"'))]
    begins, ends = np.isin(found, list(b"[{")), np.isin(found, list(b"]}"))
    deepest = np.cumsum(begins.astype(np.int8) - ends.astype(np.int8), dtype=np.int32).max(initial=0)
    return int(deepest), int(np.count_nonzero(begins) + np.count_nonzero(found == ord(",")))


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number:.50} is more than a number can be")
    return value


def _no_float(number: str) -> float:
    raise ValueError(f"{number:.50} is no integer")


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
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r:.100} stands there twice")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _json_kind(value: Any) -> str:
    kinds = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")
