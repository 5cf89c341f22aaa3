"""A tensor written block by block, several blocks at a time: one thread computes while another writes.

NumPy and the system's calls let go of Python's lock, so that threads are enough.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from io import FileIO

import numpy as np

from jpeft.errors import WeightsError

Write = Callable[[np.ndarray], object]
Block = tuple[int, Callable[[Write], None]]
WORKERS = min(os.cpu_count() or 1, 8)
SYNC = 1 << 27  # bytes


@dataclass(frozen=True)
class Blocks:
    """An array that is never there as a whole.

    Attributes:
      shape: of the whole.
      dtype: its own.
      blocks: in the order of memory (C), each with how many entries it has, and a function that hands them over in
        turn, as arrays of any shape. Several of these run at once, in threads; the iterator is drawn in one.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Callable[[], Iterator[Block]]


def fill(path: str | os.PathLike[str], start: int, key: str, tensor: Blocks) -> Iterator[Piece]:
    """What writes a tensor into a file that exists, from byte `start` on: calls, to be made in any order."""
    for entries, hand_over in tensor.blocks():
        end = start + entries * tensor.dtype.itemsize
        yield Piece(path, key, start, end, hand_over)
        start = end


@dataclass(frozen=True)
class Piece:
    """The call that writes a block: bytes `start` up to `end` of a file, of the tensor `key`."""

    path: str | os.PathLike[str]
    key: str
    start: int
    end: int
    hand_over: Callable[[Write], None]

    def __call__(self) -> None:
        """Write it."""
        with open(self.path, "r+b", buffering=0) as file:
            file.seek(self.start)
            self.hand_over(lambda array: _write_all(file, as_bytes(array)))
            if (found := file.tell()) != self.end:
                size = self.end - self.start
                raise WeightsError(
                    f"{self.key!r}: a block of {size} bytes was announced, and {found - self.start} came"
                )


def _write_all(file: FileIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def as_bytes(array: np.ndarray) -> memoryview:
    """The entries in the order of memory (C), copied if they do not lie so."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def synced_on_the_way(path: str | os.PathLike[str], calls: Iterable[Piece]) -> Iterator[Callable[[], None]]:
    """The calls, and now and then one to bring to the disk what is there: whoever syncs at the end has less to wait."""
    unsynced = 0
    for call in calls:
        yield call
        unsynced += call.end - call.start
        if unsynced >= SYNC:
            yield partial(_sync, path)
            unsynced = 0


def _sync(path: str | os.PathLike[str]) -> None:
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def run(calls: Iterable[Callable[[], None]]) -> None:
    """Make calls in threads, and draw the next only when there is a thread for it. The first error ends it."""
    waiting: set[Future[None]] = set()
    with ThreadPoolExecutor(WORKERS + 1) as pool:
        for call in calls:
            waiting.add(pool.submit(call))
            if len(waiting) > WORKERS:
                waiting = _some_done(waiting)
        while waiting:
            waiting = _some_done(waiting)


def _some_done(waiting: set[Future[None]]) -> set[Future[None]]:
    """Those that are left when one is done, or more."""
    done, left = wait(waiting, return_when=FIRST_COMPLETED)
    try:
        for future in done:
            future.result()
    except BaseException:
        for future in left:
            future.cancel()
        raise
    return left
