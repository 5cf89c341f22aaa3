"""The header of a safetensors file, read with suspicion: what it claims is checked before anything is made by it.

The format (https://github.com/huggingface/safetensors#format): 8 bytes with the length N of the header, little-endian;
N bytes of JSON, `{key: {"dtype", "shape", "data_offsets": [begin, end]}}` and perhaps `"__metadata__"`; then the data.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jpeft.errors import JpeftError
from jpeft.strict_json import open_file, parse_json_object

MAX_HEADER_BYTES, ADAPTER_HEADER_BYTES = 100_000_000, 8_000_000
MAX_DIMENSIONS, DEPTH, LARGEST = 32, 4, 2**63
VALUES, OTHER_VALUES = 12, 10_000  # of JSON: in the entry of a tensor, as they are, and in the metadata
MAX_NAME = 1_000  # characters of a tensor's name
ENTRY_BYTES = 160  # of a tensor's entry with a name as they are, which limits how many there may be
SPARSE, HOLLOW = 1 << 26, 64  # a file larger than that, of which the disk holds less than one part in so many
DTYPES: Mapping[str, np.dtype] = {
    "BOOL": np.dtype("bool"),
    "U8": np.dtype("<u1"),
    "I8": np.dtype("<i1"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
}
FIELDS = {"dtype", "shape", "data_offsets"}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Entry(NamedTuple):
    """Where a tensor lies: its dtype and shape, and the bytes of the file from `begin` up to `end`."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def open_safetensors(
    path: str | os.PathLike[str], error: type[JpeftError], header_bytes: int, most: int | None = None
) -> tuple[mmap.mmap, dict[str, Entry], dict[str, str]]:
    """A file mapped into memory, where its tensors lie in it, in the order of the file, and its metadata.

    Raises:
      JpeftError: of the type `error`; no ordinary file, a pickle, or a header that is none or lies.
    """
    if os.fspath(path).endswith(PICKLES):
        raise error(
            f"{path}: a pickle can run any code and is never read; convert it to safetensors where you trust it"
        )
    descriptor = open_file(path, error)
    try:
        found = os.fstat(descriptor)
        if found.st_size < 8:
            raise error(f"{path}: truncated: expected at least 8 bytes, found {found.st_size}")
        blocks = getattr(found, "st_blocks", 0)  # some file systems don't count them
        if found.st_size > SPARSE and 0 < blocks * 512 < found.st_size // HOLLOW:
            raise error(f"{path}: {found.st_size} bytes long, and only {blocks * 512} of them are on the disk")
        mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    except (OSError, OverflowError, ValueError) as reason:
        if isinstance(reason, JpeftError):
            raise
        raise error(f"{path}: can't be read: {reason}") from None
    finally:
        os.close(descriptor)
    return mapped, *parse_header(mapped, str(path), error, header_bytes, most)


def parse_header(
    data: mmap.mmap | bytes, path: str, error: type[JpeftError], header_bytes: int, most: int | None = None
) -> tuple[dict[str, Entry], dict[str, str]]:
    """Where the tensors lie in `data`, the whole of a file, and its metadata; `path` names it in errors.

    `header_bytes` and `most` are how long the header and how many its tensors may be.
    """
    start, size = 8 + int.from_bytes(data[:8], "little"), len(data)
    if start > size or start > header_bytes:
        pickled = data[:4] == b"PK\3\4" or (data[:1] == b"\x80" and data[1] < 6)
        what = "a pickle, which is never read" if pickled else "truncated, or no safetensors"
        limit = min(size, header_bytes)
        raise error(f"{path}: {what}: expected the header to end by byte {limit}, found {start}")
    text = bytes(data[8:start])
    most = header_bytes // ENTRY_BYTES if most is None else min(most, header_bytes // ENTRY_BYTES)
    values = VALUES * most + OTHER_VALUES
    header = parse_json_object(text, f"{path}: the header", error, DEPTH, floats=False, most=values)
    metadata = _metadata(header.pop("__metadata__", {}), path, error)
    if len(header) > most:
        raise error(f"{path}: expected at most {most} tensors, found {len(header)}")
    entries = {key: _entry(key, value, start, path, error) for key, value in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: item[1].begin))
    _require_gapless(entries, start, size, path, error)
    return entries, metadata


def _metadata(value: Any, path: str, error: type[JpeftError]) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise error(f"{path}: the header's '__metadata__': expected an object of strings, found {value!r:.200}")
    return value


def _entry(key: str, value: Any, start: int, path: str, error: type[JpeftError]) -> Entry:
    where = lambda: f"{path}: the header's entry {key!r:.200}"
    if len(key) > MAX_NAME:
        raise error(f"{where()}…: expected a name of at most {MAX_NAME} characters, found {len(key)}")
    if not isinstance(value, dict) or value.keys() != FIELDS:
        raise error(f"{where()}: expected an object with dtype, shape and data_offsets, found {value!r:.200}")
    name, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(name, str) or name not in DTYPES:
        raise error(f"{where()}: the dtype {name!r:.50} is not known; those are: {', '.join(DTYPES)}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS or _size(shape) >= 2**59:
        raise error(f"{where()}: expected a list of at most {MAX_DIMENSIONS} sizes, found {shape!r:.200}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise error(f"{where()}: expected two data_offsets, found {offsets!r:.200}")
    needed, (begin, end) = math.prod(shape) * DTYPES[name].itemsize, offsets
    if end - begin != needed:
        raise error(
            f"{where()}: a {name} of shape {shape} has {needed} bytes, but data_offsets {offsets} span {end - begin}"
        )
    return Entry(DTYPES[name], tuple(shape), start + begin, start + end)


def _size(shape: list[int]) -> int:
    """As if no axis were empty: NumPy has limits of its own for the others."""
    return math.prod(shape) or math.prod(size or 1 for size in shape)


def _are_sizes(value: Any) -> bool:
    if type(value) is not list or not set(map(type, value)) <= {int}:
        return False
    return not value or (min(value) >= 0 and max(value) < LARGEST)


def _require_gapless(entries: Mapping[str, Entry], start: int, size: int, path: str, error: type[JpeftError]) -> None:
    """The tensors fill the data exactly: no hole, no overlap, nothing missing and nothing after."""
    position = start
    for key, entry in entries.items():
        if entry.begin != position:
            what = "overlaps the one before" if entry.begin < position else "leaves a hole before it"
            raise error(
                f"{path}: {key!r:.200} {what}: expected it at byte {position - start}, found {entry.begin - start}"
            )
        position = entry.end
    if position != size:
        what = "truncated" if position > size else "bytes after the last tensor"
        raise error(f"{path}: {what}: expected {position} bytes in all, found {size}")


def tensor_at(data: mmap.mmap | bytes, entry: Entry) -> np.ndarray:
    """The tensor of an entry: a read-only view of the file."""
    if entry.begin == entry.end:
        return np.empty(entry.shape, entry.dtype)
    return np.frombuffer(data, entry.dtype, math.prod(entry.shape), entry.begin).reshape(entry.shape)
