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
from typing import Any

import numpy as np

from jpeft.errors import AdapterError, JpeftError, WeightsError
from jpeft.safetensors_header import DTYPES, MAX_HEADER_BYTES, Entry, open_safetensors, tensor_at
from jpeft_interop.arrays import host
from jpeft_interop.blocks import Blocks, Piece, as_bytes, fill, run, synced_on_the_way
from jpeft_interop.fit import ArraySpec


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

    def __init__(self, path: str, entries: Mapping[str, Entry], mapped: mmap.mmap | bytes):
        self.path = path
        self._entries = entries
        self._mapped = mapped

    def __getitem__(self, key: str) -> np.ndarray:
        return tensor_at(self._mapped, self._entries[key])

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
        if not isinstance(self._mapped, bytes) and hasattr(self._mapped, "madvise") and last > first:
            self._mapped.madvise(mmap.MADV_DONTNEED, first, last - first)


def read_safetensors(
    path: str | os.PathLike[str],
    error: type[JpeftError] = AdapterError,
    header_bytes: int = MAX_HEADER_BYTES,
    most: int | None = None,
) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a safetensors file, and its metadata. The header is checked in full, the data is not touched.

    Args:
      path: an ordinary file.
      error: what to raise.
      header_bytes: how long the header may be; an adapter's is shorter than a model's.
      most: how many tensors there may be; as many as the header has room for if None.

    Raises:
      JpeftError: of the type `error`; the file is truncated, too long, a pickle, or no safetensors. Names file, key,
        expected and found.
    """
    mapped, entries, metadata = open_safetensors(path, error, header_bytes, most)
    return Tensors(str(path), entries, mapped), metadata


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
