"""One safetensors file: read by mapping it into memory, written tensor by tensor.

The format (https://github.com/huggingface/safetensors#format): 8 bytes with the length N of the header, little-endian;
N bytes of JSON, `{key: {"dtype", "shape", "data_offsets": [begin, end]}}` and perhaps `"__metadata__"`; then the data.
It is read and written here, not by the library, because the library's NumPy side refuses bfloat16 and float8 files,
loads whole files, and can only save what is in memory all at once.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jpeft.errors import AdapterError, JpeftError, WeightsError
from jpeft_interop.arrays import host
from jpeft_interop.blocks import Blocks, Piece, as_bytes, fill, run, synced_on_the_way
from jpeft_interop.fit import ArraySpec
from jpeft_interop.json_file import open_file, parse_json_object

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 32
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
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Entry(NamedTuple):
    """Where a tensor lies: its dtype and shape, and the bytes of the file from `begin` up to `end`."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class LazyArray:
    """An array that is not there yet: `read` makes it, of this shape and dtype."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a file, in the order of the file: read-only arrays on mapped memory, read when they are used.

    Who truncates the file meanwhile kills the process (as with any mapped file); one replaced by renaming is safe.
    """

    def __init__(self, path: str, entries: Mapping[str, Entry], mapped: mmap.mmap):
        self.path = path
        self._entries = entries
        self._mapped = mapped

    def __getitem__(self, key: str) -> np.ndarray:
        dtype, shape, begin, end = self._entries[key]
        if begin == end:
            return np.empty(shape, dtype)
        return np.frombuffer(self._mapped, dtype, math.prod(shape), begin).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def spec(self, key: str) -> ArraySpec:
        """Shape and dtype, from the header."""
        entry = self._entries[key]
        return ArraySpec(entry.shape, entry.dtype)

    def release(self, key: str, begin: int = 0, end: int | None = None) -> None:
        """Give the tensor's memory back to the system; arrays stay valid, and are read from the file again if used.

        Args:
          key: which tensor.
          begin: the first of its bytes.
          end: the byte after the last; that of the tensor if None.
        """
        entry = self._entries[key]
        first = -(-(entry.begin + begin) // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages, and no neighbour's
        last = entry.end if end is None else entry.begin + end
        if hasattr(self._mapped, "madvise") and last > first:
            self._mapped.madvise(mmap.MADV_DONTNEED, first, last - first)


def read_safetensors(
    path: str | os.PathLike[str], error: type[JpeftError] = AdapterError
) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a safetensors file, and its metadata. The header is checked in full, the data is not touched.

    Args:
      path: an ordinary file.
      error: what to raise.

    Raises:
      JpeftError: of the type `error`; the file is truncated, too long, a pickle, or no safetensors. Names file, key,
        expected and found.
    """
    if os.fspath(path).endswith(PICKLES):
        raise error(
            f"{path}: a pickle can run any code and is never read; convert it to safetensors where you trust it"
        )
    descriptor = open_file(path, error)
    try:
        size = os.fstat(descriptor).st_size
        if size < 8:
            raise error(f"{path}: truncated: expected at least 8 bytes, found {size}")
        mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)
    return _parse(str(path), mapped, error)


def _parse(path: str, mapped: mmap.mmap, error: type[JpeftError]) -> tuple[Tensors, dict[str, str]]:
    start, size = 8 + int.from_bytes(mapped[:8], "little"), len(mapped)
    if start > size or start > MAX_HEADER_BYTES:
        pickled = mapped[:4] == b"PK\3\4" or (mapped[:1] == b"\x80" and mapped[1] < 6)
        what = "a pickle, which is never read" if pickled else "truncated, or no safetensors"
        most = min(size, MAX_HEADER_BYTES)
        raise error(f"{path}: {what}: expected the header to end by byte {most}, found {start}")
    header = parse_json_object(mapped[8:start], f"{path}: the header", error)
    metadata = _metadata(header.pop("__metadata__", {}), path, error)
    entries = {key: _entry(key, value, start, path, error) for key, value in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: item[1].begin))
    _require_gapless(entries, start, size, path, error)
    return Tensors(path, entries, mapped), metadata


def _metadata(value: Any, path: str, error: type[JpeftError]) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise error(f"{path}: the header's '__metadata__': expected an object of strings, found {value!r:.200}")
    return value


def _entry(key: str, value: Any, start: int, path: str, error: type[JpeftError]) -> Entry:
    where = f"{path}: the header's entry {key!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise error(f"{where}: expected an object with dtype, shape and data_offsets, found {value!r:.200}")
    name, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(name, str) or name not in DTYPES:
        raise error(f"{where}: the dtype {name!r:.50} is not known; those are: {', '.join(DTYPES)}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS or math.prod(size or 1 for size in shape) >= 2**59:
        raise error(f"{where}: expected a list of at most {MAX_DIMENSIONS} sizes, found {shape!r:.200}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise error(f"{where}: expected two data_offsets, found {offsets!r:.200}")
    needed, (begin, end) = math.prod(shape) * DTYPES[name].itemsize, offsets
    if end - begin != needed:
        raise error(
            f"{where}: a {name} of shape {shape} has {needed} bytes, but data_offsets {offsets} span {end - begin}"
        )
    return Entry(DTYPES[name], tuple(shape), start + begin, start + end)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _require_gapless(entries: Mapping[str, Entry], start: int, size: int, path: str, error: type[JpeftError]) -> None:
    """The tensors fill the data exactly: no hole, no overlap, nothing missing and nothing after."""
    position = start
    for key, entry in entries.items():
        if entry.begin != position:
            what = "overlaps the one before" if entry.begin < position else "leaves a hole before it"
            raise error(f"{path}: {key!r} {what}: expected it at byte {position - start}, found {entry.begin - start}")
        position = entry.end
    if position != size:
        what = "truncated" if position > size else "bytes after the last tensor"
        raise error(f"{path}: {what}: expected {position} bytes in all, found {size}")


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file of tensors, one after the other: no more than one is copied at a time.

    Args:
      path: the file; what was there is overwritten.
      tensors: NumPy or JAX arrays, `LazyArray`s, or `Blocks`, of which several are in memory at once.
      metadata: strings by string.

    Raises:
      WeightsError: a dtype that the format lacks, or a lazy array that is not what it said.
    """
    # the widest first, so that every tensor begins at a multiple of its item size
    order = sorted(tensors, key=lambda key: (-np.dtype(tensors[key].dtype).itemsize, key))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for key in order:
        end = position + nbytes(tensors[key])
        header[key] = {
            "dtype": _dtype_name(key, tensors[key].dtype),
            "shape": list(tensors[key].shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
    start = 8 + len(text)
    calls = (call for key in order for call in _calls(path, start + header[key]["data_offsets"][0], key, tensors[key]))
    run(synced_on_the_way(path, calls))


def _calls(path: str | os.PathLike[str], start: int, key: str, tensor: Any) -> Iterator[Piece]:
    """What is left to call to write a tensor at byte `start`: one that is not in blocks is written when asked."""
    if isinstance(tensor, Blocks):
        yield from fill(path, start, key, tensor)
        return
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(_bytes(key, tensor))


def nbytes(tensor: Any) -> int:
    """The bytes of a tensor's data."""
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


def _dtype_name(key: str, dtype: Any) -> str:
    names = {known: name for name, known in DTYPES.items()}
    if np.dtype(dtype) not in names:
        raise WeightsError(f"{key!r} has the dtype {np.dtype(dtype).name}, which safetensors lacks; cast it first")
    return names[np.dtype(dtype)]


def _bytes(key: str, tensor: Any) -> memoryview:
    array = tensor.read() if isinstance(tensor, LazyArray) else host(tensor)
    if tuple(array.shape) != tuple(tensor.shape) or array.dtype != np.dtype(tensor.dtype):
        raise WeightsError(
            f"{key!r} was announced as {np.dtype(tensor.dtype).name} {tuple(tensor.shape)}, "
            f"and is {array.dtype.name} {tuple(array.shape)}"
        )
    return as_bytes(array)
