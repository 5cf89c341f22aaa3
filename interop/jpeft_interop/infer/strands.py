"""Pieces whose names differ in numbers only, as one: the numbers are the index along an axis of the leaf."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jpeft_interop.infer.digits import AxisDigit
from jpeft_interop.infer.names import NUMBER
from jpeft_interop.infer.piece import Piece

KEY = -1  # in place of torch's axis: the digit is a number in the key


@dataclass(frozen=True)
class Slot:
    """A number in a key that counts up along a leaf's axis: `first`, `first + step`, ..."""

    position: int
    first: int
    step: int
    digit: AxisDigit


@dataclass(frozen=True)
class Strand:
    """Pieces as one.

    Attributes:
      piece: that of the lowest numbers.
      slots: the numbers that count.
      count: how many pieces.
    """

    piece: Piece
    slots: tuple[Slot, ...]

    @property
    def digits(self) -> tuple[AxisDigit, ...]:
        """All, those of the numbers included."""
        return (*self.piece.digits, *(slot.digit for slot in self.slots))

    @property
    def size(self) -> int:
        """How many of the leaf's values."""
        return math.prod(digit.size for digit in self.digits)


def strands(pieces: Sequence[Piece]) -> Iterator[Strand]:
    """The pieces of one leaf, joined where they can be."""
    groups: dict[object, list[Piece]] = defaultdict(list)
    for piece in pieces:
        groups[NUMBER.sub("{}", piece.key), frozenset(piece.digits), piece.box, piece.scale, piece.offset].append(piece)
    for group in groups.values():
        joined = _join(group)
        yield from [joined] if joined else (Strand(piece, ()) for piece in group)


def _join(group: Sequence[Piece]) -> Strand | None:
    table = {tuple(int(n) for n in NUMBER.findall(piece.key)): piece for piece in group}
    columns = [sorted(set(column)) for column in zip(*table, strict=True)]
    counting = [position for position, values in enumerate(columns) if len(values) > 1]
    if len(table) != len(group) or len(table) != math.prod(len(columns[p]) for p in counting):
        return None
    first = min(table)
    slots = [_slot(position, columns[position], first, table) for position in counting]
    if any(slot is None for slot in slots):
        return None
    strand = Strand(table[first], tuple(slot for slot in slots if slot is not None))
    return strand if all(_is_at(strand, numbers, piece) for numbers, piece in table.items()) else None


def _slot(position: int, values: list[int], first: tuple[int, ...], table: dict[tuple[int, ...], Piece]) -> Slot | None:
    steps = np.diff(values)
    if (steps != steps[0]).any():
        return None
    second = (*first[:position], values[1], *first[position + 1 :])
    if second not in table:
        return None
    moved = np.subtract(table[second].start, table[first].start)
    axes = np.flatnonzero(moved)
    if len(axes) != 1 or moved[axes[0]] < 0:
        return None
    digit = AxisDigit(len(values), KEY, position, int(axes[0]), int(moved[axes[0]]))
    return Slot(position, values[0], int(steps[0]), digit)


def _is_at(strand: Strand, numbers: Sequence[int], piece: Piece) -> bool:
    expected = list(strand.piece.start)
    for slot in strand.slots:
        expected[slot.digit.leaf_axis] += (numbers[slot.position] - slot.first) // slot.step * slot.digit.leaf
    return tuple(expected) == piece.start
