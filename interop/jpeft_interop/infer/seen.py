"""One array of either side as the search sees it: read when used, its axes of length one left out."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from jpeft_interop.arrays import host
from jpeft_interop.layout.layout import as_numpy


@dataclass(frozen=True)
class Seen:
    """An array.

    Attributes:
      name: a leaf's path, or a torch name.
      full: its shape.
      axes: those of its axes that are longer than one.
      dtype: of the values.
      read: makes the values, of the full shape.
      release: gives mapped memory back.
    """

    name: str
    full: tuple[int, ...]
    axes: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    release: Callable[[], None]

    @property
    def shape(self) -> tuple[int, ...]:
        """Without the axes of length one."""
        return tuple(self.full[axis] for axis in self.axes)

    @property
    def is_float(self) -> bool:
        """Whether it holds floats: integers, masks and random keys are no weights."""
        return self.dtype.kind not in "iubO"

    @property
    def size(self) -> int:
        """How many values."""
        return math.prod(self.full)

    def values(self) -> np.ndarray:
        """Of the shape without axes of length one; a view where there can be one."""
        return self.read().reshape(self.shape)


def seen_leaves(flat: Mapping[str, Any]) -> dict[str, Seen]:
    """The leaves of params, by path."""
    make = lambda leaf: (lambda: host(leaf), lambda: give_back(leaf))
    return {path: _seen(path, leaf, *make(leaf)) for path, leaf in flat.items()}


def seen_tensors(state: Mapping[str, Any]) -> dict[str, Seen]:
    """The tensors of a state, by name."""
    release = getattr(state, "release", lambda _: None)
    make = lambda key: (lambda: as_numpy(state[key], key), lambda: release(key))
    return {key: _seen(key, state[key], *make(key)) for key in state}


def _seen(name: str, array: Any, read: Callable[[], np.ndarray], release: Callable[[], None]) -> Seen:
    full = tuple(array.shape)
    axes = tuple(axis for axis, length in enumerate(full) if length != 1)
    return Seen(name, full, axes, _dtype(array.dtype), read, release)


def _dtype(dtype: Any) -> np.dtype:
    """NumPy's, of torch's as well; of objects for what NumPy has not (random keys)."""
    name = str(dtype).removeprefix("torch.")
    try:
        return np.dtype(getattr(ml_dtypes, name, name))
    except TypeError:
        return np.dtype(object)


def give_back(array: Any) -> None:
    """Lets the system have the memory of a read-only array on a mapped file; it is read again if used."""
    base = array
    while isinstance(base, (np.ndarray, memoryview)):
        base = base.obj if isinstance(base, memoryview) else base.base
    if not isinstance(base, mmap.mmap) or array.flags.writeable or not hasattr(base, "madvise"):
        return
    begin = array.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data
    first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages, and no neighbour's
    if begin + array.nbytes > first:
        base.madvise(mmap.MADV_DONTNEED, first, begin + array.nbytes - first)
