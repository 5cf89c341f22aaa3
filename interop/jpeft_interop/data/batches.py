"""Rows in batches, by grain: shuffled anew each epoch, without end, and with a position that can be saved."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from jpeft_interop.data.errors import DataError
from jpeft_interop.data.rows import IGNORE, size_of

Batch = dict[str, np.ndarray]


class _ByRow:
    """Rows as grain reads them: by number."""

    def __init__(self, rows: Mapping[str, np.ndarray]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return size_of(self.rows)

    def __getitem__(self, index: int) -> Batch:
        return {name: array[index] for name, array in self.rows.items()}

    def __repr__(self) -> str:
        return f"rows({len(self)})"


def shuffled(
    rows: Mapping[str, np.ndarray], size: int, seed: int, here: Sequence[int] | np.ndarray | None = None
) -> grain.DatasetIterator:
    """Batches of `size` rows, epoch after epoch without end, each epoch in another order that the seed decides.

    A batch at the seam of two epochs has rows of both. `get_state()` tells the position, a small dict of numbers, and
    `set_state()` goes there: the same position for any part of the batches.

    Args:
      rows: arrays of the same length.
      size: rows in a batch.
      seed: of the order.
      here: which rows of each batch to load, by number; all if None. Several processes each load their own.

    Raises:
      DataError: a batch would need more rows than there are.

    Example:
      >>> batches = shuffled({"input_ids": np.arange(6).reshape(6, 1)}, 2, seed=0)
      >>> next(batches)["input_ids"].shape
      (2, 1)
    """
    if not 1 <= size <= size_of(rows):
        raise DataError(
            f"batches of {size} need at least that many rows; the data makes {size_of(rows)}: shorten the batch"
        )
    # One thread, one batch ahead: rows are in memory, and more would only take the processor from the training step.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    source = grain.MapDataset.source(_ByRow(rows))
    endless = source.shuffle(seed=seed).repeat()
    if here is None:
        return iter(endless.batch(size, drop_remainder=True).to_iter_dataset(options))
    part = lambda batch: _stacked([endless[batch * size + int(row)] for row in here])
    return iter(grain.MapDataset.range(sys.maxsize // size).map(part).to_iter_dataset(options))


def _stacked(rows: Sequence[Any]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def in_order(rows: Mapping[str, np.ndarray], size: int) -> Iterator[Batch]:
    """All rows once, in batches of `size`; the last is filled up with rows that have nothing to learn."""
    for start in range(0, size_of(rows), size):
        batch = {name: array[start : start + size] for name, array in rows.items()}
        yield {name: _filled(name, array, size) for name, array in batch.items()}


def _filled(name: str, array: np.ndarray, size: int) -> np.ndarray:
    """A mask is filled with ones: a row that attends to nothing makes a softmax of nothing."""
    missing = [(0, size - len(array)), *[(0, 0)] * (array.ndim - 1)]
    value = {"labels": IGNORE, "attention_mask": 1}.get(name, 0)
    return np.pad(array, missing, constant_values=value)
