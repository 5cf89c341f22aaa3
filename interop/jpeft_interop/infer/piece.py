"""A part of a torch tensor that is found in a leaf."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from jpeft_interop.infer.digits import AxisDigit

SAMPLE = 1 << 16


@dataclass(frozen=True)
class Piece:
    """A box of a torch tensor, and the leaf's digits for its own.

    Attributes:
      path: the leaf's.
      key: the tensor's name.
      digits: on axes of the full shapes.
      box: from where up to where, along each axis of the tensor.
      start: the leaf's index of the box's first value.
      full: the tensor's shape.
      scale: the leaf holds `scale` times what torch has, and
      offset: this more.
    """

    path: str
    key: str
    digits: tuple[AxisDigit, ...]
    box: tuple[tuple[int, int], ...]
    start: tuple[int, ...]
    full: tuple[int, ...]
    scale: float = 1.0
    offset: float = 0.0

    @property
    def size(self) -> int:
        """How many values."""
        return int(np.prod([stop - begin for begin, stop in self.box]))


def is_in(piece: Piece, leaf: np.ndarray, torch: np.ndarray, dtype: np.dtype) -> bool:
    """Whether the leaf holds there what the tensor does, bit for bit once both are of `dtype`; of many values, some."""
    if piece.scale != 1.0:
        return False
    view = leaf_view(piece, leaf)
    if view is None:
        return False
    mine = torch[tuple(slice(begin, stop) for begin, stop in piece.box)].reshape(view.shape)
    some = _sample(view.shape)
    return same_bits(view[some].astype(dtype), mine[some].astype(dtype))


def _sample(shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Every so manieth index of the longest axis: no two are as many apart as digits are."""
    if not shape or math.prod(shape) <= SAMPLE:
        return ()
    longest = max(range(len(shape)), key=lambda axis: shape[axis])
    step = min(-(-math.prod(shape) // SAMPLE) | 1, max(1, shape[longest] // 8) | 1)
    return tuple(slice(None, None, step if axis == longest else 1) for axis in range(len(shape)))


def leaf_view(piece: Piece, leaf: np.ndarray) -> np.ndarray | None:
    """The leaf's values in the order of the tensor's, an axis for each digit; None where they do not fit."""
    order = sorted(piece.digits, key=lambda digit: (digit.torch_axis, -digit.torch))
    last = list(piece.start)
    for digit in order:
        last[digit.leaf_axis] += (digit.size - 1) * digit.leaf
    if any(at >= length for at, length in zip(last, leaf.shape, strict=True)):
        return None
    shape, strides = [d.size for d in order], [d.leaf * leaf.strides[d.leaf_axis] for d in order]
    return np.lib.stride_tricks.as_strided(leaf[tuple(slice(at, None) for at in piece.start)], shape, strides)


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays of one dtype are equal bit for bit."""
    kind = f"u{one.dtype.itemsize}"
    return np.array_equal(np.ascontiguousarray(one).view(kind), np.ascontiguousarray(other).view(kind))
