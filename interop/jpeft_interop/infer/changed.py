"""Tensors that fit a place but for a few values: paired by their neighbours, so that the error can name both."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from jpeft_interop.infer.digits import AxisDigit
from jpeft_interop.infer.fingerprints import cast
from jpeft_interop.infer.names import pattern
from jpeft_interop.infer.piece import Piece, leaf_view
from jpeft_interop.infer.seen import Seen
from jpeft_interop.infer.wholes import whole_box

ALIKE = 0.5  # of the values


def find_changed(
    tensors: Mapping[str, Seen],
    leaves: Mapping[str, Seen],
    open_leaves: Sequence[str],
    pieces: Sequence[Piece],
    dtype: np.dtype,
) -> Iterator[Piece]:
    """For each tensor without a place, the one where most of its values are, or the only one that its like leave."""
    taken = {_place(piece) for piece in pieces}
    for tensor in tensors.values():
        free = {_place(p): p for p in _like(tensor, leaves, open_leaves, pieces) if _place(p) not in taken}
        free |= {
            _place(p): p for p in _straight(tensor, leaves, open_leaves) if len(free) != 1 and _place(p) not in taken
        }
        alike = {place: _alike(piece, leaves[piece.path], tensor, dtype) for place, piece in free.items()}
        best = max(alike, key=lambda place: alike[place], default=None)
        if best is not None and (alike[best] >= ALIKE or len(free) == 1):
            taken.add(best)
            yield free[best]


def _place(piece: Piece) -> tuple[str, tuple[int, ...]]:
    return piece.path, piece.start


def _alike(piece: Piece, leaf: Seen, tensor: Seen, dtype: np.dtype) -> float:
    view = leaf_view(piece, leaf.read())
    if view is None:
        return 0.0
    box = tensor.read()[tuple(slice(begin, stop) for begin, stop in piece.box)]
    return float((cast(view, dtype) == cast(box.reshape(view.shape), dtype)).mean()) if view.size == box.size else 0.0


def _like(
    tensor: Seen, leaves: Mapping[str, Seen], open_leaves: Sequence[str], pieces: Sequence[Piece]
) -> Iterator[Piece]:
    """Where tensors of the same name, but for the numbers, lie, in open leaves of the same name."""
    for other in pieces:
        if pattern(other.key) == pattern(tensor.name) and other.full == tensor.full:
            for path in open_leaves:
                if pattern(path) == pattern(other.path) and leaves[path].full == leaves[other.path].full:
                    yield from _along(other, leaves[path], tensor)


def _straight(tensor: Seen, leaves: Mapping[str, Seen], open_leaves: Sequence[str]) -> Iterator[Piece]:
    """Leaves of the tensor's own shape."""
    for path in open_leaves:
        if leaves[path].shape == tensor.shape:
            yield _itself(leaves[path], tensor)


def _along(other: Piece, leaf: Seen, tensor: Seen) -> Iterator[Piece]:
    held = {digit.leaf_axis for digit in other.digits}
    free = [axis for axis in leaf.axes if axis not in held]
    for at in itertools.product(*(range(leaf.full[axis]) for axis in free)):
        start = list(other.start)
        for axis, index in zip(free, at, strict=True):
            start[axis] = index
        yield replace(other, path=leaf.name, key=tensor.name, start=tuple(start))


def _itself(leaf: Seen, tensor: Seen) -> Piece:
    return Piece(leaf.name, tensor.name, straight(leaf, tensor), whole_box(tensor), (0,) * len(leaf.full), tensor.full)


def straight(leaf: Seen, tensor: Seen) -> tuple[AxisDigit, ...]:
    """The digits of equal shapes, axis for axis."""
    return tuple(
        AxisDigit(leaf.full[mine], theirs, 1, mine, 1) for mine, theirs in zip(leaf.axes, tensor.axes, strict=True)
    )
