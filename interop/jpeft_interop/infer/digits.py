"""A rearrangement as digits: where the index of one side is a number of several digits, each has a weight in the other.

Told where the values of one side lie in the other, the digits are read off: the step between neighbours is the weight
of the fastest digit, as far as it stays the same; then the steps between the blocks, and so on. Places that are not
known (of values that occur twice) are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

UNKNOWN = -1
AGREEMENT = 0.9  # of the known places; what disagrees was changed, or occurs twice, and is for the proof to judge


class Digit(NamedTuple):
    """One digit: how many values it has, its weight in torch's index, and in the leaf's."""

    size: int
    torch: int
    leaf: int


class AxisDigit(NamedTuple):
    """The same, of one axis on each side."""

    size: int
    torch_axis: int
    torch: int
    leaf_axis: int
    leaf: int


def read_digits(places: np.ndarray) -> tuple[int, list[Digit]] | None:
    """Where index 0 lies, and the digits, the fastest first; None where the places are no such number.

    Args:
      places: of each index of torch's, the leaf's, or `UNKNOWN`.

    Example: two heads of three, the heads the faster in the leaf.
      >>> read_digits(np.array([0, 2, 4, 1, 3, 5]))
      (0, [Digit(size=3, torch=1, leaf=2), Digit(size=2, torch=3, leaf=1)])
    """
    return _read(places, 1.0) or _read(places, AGREEMENT)


def _read(places: np.ndarray, agreement: float) -> tuple[int, list[Digit]] | None:
    digits, block, length = [], 1, len(places)
    while block < length:
        found = _digit(places, block, agreement)
        if found is None:
            return None
        digits.append(found)
        block *= found.size
    expected = np.zeros(length, np.int64)
    index = np.arange(length)
    for digit in digits:
        expected += index // digit.torch % digit.size * digit.leaf
    known = places != UNKNOWN
    if not known.any():
        return None
    start = _most_common(places[known] - expected[known])
    agree = places[known] == expected[known] + start
    return (start, digits) if agree.mean() >= agreement else None


def _digit(places: np.ndarray, block: int, agreement: float) -> Digit | None:
    """The digit whose weight in torch's index is `block`."""
    count = len(places) // block
    rows = places.reshape(count, block)
    step, known = _steps(rows)
    even = known[::2]
    if not even.any():
        even, chosen = known, step[known]
    else:
        chosen = step[::2][even]
    if not len(chosen):
        return None
    weight = _most_common(chosen)
    size = _longest(count, step, known, weight, agreement)
    return Digit(size, block, weight) if size > 1 else None


def _steps(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    known = (rows[1:] != UNKNOWN) & (rows[:-1] != UNKNOWN)
    return rows[1:] - rows[:-1], known


def _longest(count: int, step: np.ndarray, known: np.ndarray, weight: int, agreement: float) -> int:
    """The largest divisor of `count` within whose runs the known steps are the weight."""
    right = np.where(known, step == weight, False).sum(axis=1)
    total = known.sum(axis=1)
    divisors = (size for size in range(count, 1, -1) if count % size == 0)
    return next((size for size in divisors if _runs(right, total, size, agreement)), 1)


def _runs(right: np.ndarray, total: np.ndarray, size: int, agreement: float) -> bool:
    """Whether the steps within runs of this length agree, at each position of the run: a run ends where they don't."""
    position = np.arange(1, len(right) + 1) % size
    agree, found = (np.bincount(position, values, size)[1:] for values in (right, total))
    return bool(found.sum() and (agree >= agreement * found).all())


def _most_common(values: np.ndarray) -> int:
    found, counts = np.unique(values, return_counts=True)
    return int(found[counts.argmax()])


def on_axes(
    digits: Sequence[Digit],
    torch_shape: Sequence[int],
    torch_axes: Sequence[int],
    leaf_shape: Sequence[int],
    leaf_axes: Sequence[int],
) -> list[AxisDigit] | None:
    """The digits of indices over several axes (of these shapes) as digits of one axis each; None where none do."""
    made: list[AxisDigit] = []
    for digit in digits:
        for part in _split(digit, _boundaries(torch_shape), _boundaries(leaf_shape)):
            to, of = _axis(part.torch, torch_shape), _axis(part.leaf, leaf_shape)
            if to is None or of is None or not _fits(part, torch_shape, to) or not _fits_leaf(part, leaf_shape, of):
                return None
            made.append(AxisDigit(part.size, torch_axes[to[0]], to[1], leaf_axes[of[0]], of[1]))
    return made


def _boundaries(shape: Sequence[int]) -> list[int]:
    """The weights at which another axis begins."""
    return [int(np.prod(shape[axis:])) for axis in range(1, len(shape))][::-1]


def _split(digit: Digit, torch: Sequence[int], leaf: Sequence[int]) -> Iterator[Digit]:
    size, to, of = digit
    for boundary, weight in (*((b, to) for b in torch), *((b, of) for b in leaf)):
        inner, odd = divmod(boundary, weight)
        if weight < boundary < weight * size and not odd and size % inner == 0:
            yield from _split(Digit(inner, to, of), torch, leaf)
            yield from _split(Digit(size // inner, to * inner, of * inner), torch, leaf)
            return
    yield digit


def _axis(weight: int, shape: Sequence[int]) -> tuple[int, int] | None:
    """The axis that a step of `weight` goes along, and how far."""
    if weight <= 0:
        return None
    for axis in reversed(range(len(shape))):
        if weight < shape[axis]:
            return axis, weight
        if weight % shape[axis]:
            return None
        weight //= shape[axis]
    return None


def _fits(part: Digit, shape: Sequence[int], at: tuple[int, int]) -> bool:
    return at[1] * part.size <= shape[at[0]]


def _fits_leaf(part: Digit, shape: Sequence[int], at: tuple[int, int]) -> bool:
    return at[1] * (part.size - 1) < shape[at[0]]
