"""Where whole torch tensors lie in leaves: slices with the same values, in whatever order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from jpeft_interop.infer.fingerprints import Keep, count, rest, subsets, sums
from jpeft_interop.infer.order import Search, find_order
from jpeft_interop.infer.piece import Piece, is_in
from jpeft_interop.infer.seen import Seen

SMALL = 1 << 12  # a leaf of so few values may have slices of one
Tick = Callable[[Seen], None]


class Spot(NamedTuple):
    """A slice of a leaf: one index along the axes `keep` (of those longer than one)."""

    path: str
    keep: Keep
    at: tuple[int, ...]


def fingerprints_of(tensors: Mapping[str, Seen], dtype: np.dtype, tick: Tick) -> dict[str, int]:
    """The fingerprint of each whole tensor."""
    made = {}
    for key, tensor in tensors.items():
        made[key] = int(sums(tensor.values(), [()], dtype)[0])
        tensor.release()
        tick(tensor)
    return made


def find_spots(
    leaves: Mapping[str, Seen], tensors: Mapping[str, Seen], prints: Mapping[str, int], dtype: np.dtype, tick: Tick
) -> dict[str, list[Spot]]:
    """Every slice of every leaf that has the values of a tensor, by the tensor's name."""
    wanted: dict[tuple[int, int], list[str]] = defaultdict(list)
    for key, found in prints.items():
        wanted[tensors[key].size, found].append(key)
    made: dict[str, list[Spot]] = {key: [] for key in tensors}
    for path, leaf in leaves.items():
        keeps = slices_of(leaf, {size for size, _ in wanted})
        for keep, found in zip(keeps, sums(leaf.values(), keeps, dtype) if keeps else (), strict=True):
            size = leaf.size // count(leaf.shape, keep)
            these = np.array([value for length, value in wanted if length == size], np.uint64)
            for flat in np.flatnonzero(np.isin(found, these)):
                at = tuple(int(i) for i in np.unravel_index(flat, found.shape)) if found.ndim else ()
                for key in wanted[size, int(found[at])]:
                    made[key].append(Spot(path, keep, at))
        leaf.release()
        tick(leaf)
    return made


def slices_of(leaf: Seen, sizes: set[int]) -> list[Keep]:
    """The axes whose indices number slices of such sizes."""
    return [
        keep
        for keep in subsets(len(leaf.shape))
        if (size := count(leaf.shape, rest(len(leaf.shape), keep))) in sizes and (size > 1 or leaf.size <= SMALL)
    ]


def piece_at(spot: Spot, leaf: Seen, tensor: Seen, search: Search, likely: list[Piece]) -> Piece | None:
    """The whole tensor as a piece of the leaf: with the digits of another piece, if those do, or its own."""
    values, torch = leaf.values(), tensor.values()
    for other in likely:
        piece = moved(other, spot, leaf, tensor)
        if piece and is_in(piece, leaf.read(), tensor.read(), search.dtype):
            return piece
    order = find_order(torch, block(spot, values), search)
    if order is None:
        return None
    free = rest(values.ndim, spot.keep)
    digits = tuple(
        d._replace(torch_axis=tensor.axes[d.torch_axis], leaf_axis=leaf.axes[free[d.leaf_axis]]) for d in order.digits
    )
    start = [0] * len(leaf.full)
    for axis, at in (*zip(spot.keep, spot.at, strict=True), *zip(free, order.start, strict=True)):
        start[leaf.axes[axis]] = at
    return Piece(leaf.name, tensor.name, digits, whole_box(tensor), tuple(start), tensor.full)


def block(spot: Spot, values: np.ndarray) -> np.ndarray:
    """The slice, a view."""
    at = dict(zip(spot.keep, spot.at, strict=True))
    return values[tuple(at.get(axis, slice(None)) for axis in range(values.ndim))]


def moved(piece: Piece, spot: Spot, leaf: Seen, tensor: Seen) -> Piece | None:
    """The same digits for another slice, if the shapes are the same."""
    if piece.box != whole_box(tensor) or len(piece.start) != len(leaf.full):
        return None
    start = list(piece.start)
    for axis, at in zip(spot.keep, spot.at, strict=True):
        start[leaf.axes[axis]] = at
    return Piece(leaf.name, tensor.name, piece.digits, piece.box, tuple(start), tensor.full, piece.scale)


def whole_box(tensor: Seen) -> tuple[tuple[int, int], ...]:
    """All of it."""
    return tuple((0, length) for length in tensor.full)
