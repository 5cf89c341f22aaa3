"""Where parts of torch tensors lie in leaves: by their lines, each looked up among the lines of all leaves.

For fused tensors on either side, padded ones, and those of which a value was changed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from jpeft_interop.infer.digits import UNKNOWN, read_digits
from jpeft_interop.infer.fingerprints import Keep, count, rest, subsets
from jpeft_interop.infer.locate import locate
from jpeft_interop.infer.order import Search, inner_order
from jpeft_interop.infer.piece import Piece
from jpeft_interop.infer.seen import Seen

FEWEST = 0.2  # of a tensor's lines, found in leaves, for the axes to be the right ones
DENSE = 0.3  # of a box's lines
MOST = 1 << 23  # lines of a leaf


class Lines(NamedTuple):
    """The fingerprints of a leaf's slices along the axes `keep`."""

    path: str
    keep: Keep
    prints: np.ndarray


def index_lines(leaves: Mapping[str, Seen], tensors: Mapping[str, Seen], search: Search) -> dict[int, list[Lines]]:
    """The lines of leaves, by their length, of the lengths that lines of the tensors have."""
    lengths = {count(t.shape, rest(len(t.shape), keep)) for t in tensors.values() for keep in _keeps(t)}
    made: dict[int, list[Lines]] = defaultdict(list)
    for path, leaf in leaves.items():
        length = lambda keep, leaf=leaf: leaf.size // count(leaf.shape, keep)
        keeps = [k for k in subsets(len(leaf.shape)) if length(k) in lengths and leaf.size <= MOST * length(k)]
        if keeps:
            for keep, prints in zip(keeps, search.along(leaf.values(), keeps), strict=True):
                made[length(keep)].append(Lines(path, keep, prints))
        leaf.release()
    return made


def _keeps(tensor: Seen) -> list[Keep]:
    """The axes to try: of a vector, its own."""
    return [keep for keep in subsets(len(tensor.shape)) if keep]


def pieces_of(
    tensor: Seen, index: Mapping[int, list[Lines]], leaves: Mapping[str, Seen], search: Search
) -> list[Piece]:
    """The pieces of leaves that a tensor is made of, as far as they are found."""
    keeps = _keeps(tensor)
    if not keeps:
        return []
    values = tensor.values()
    prints = dict(zip(keeps, search.along(values, keeps), strict=True))
    made: list[tuple[float, list[Piece]]] = []
    for keep in sorted(keeps, key=lambda k: count(tensor.shape, k)):
        length = count(tensor.shape, rest(len(tensor.shape), keep))
        known = {lines: locate(prints[keep], lines.prints) for lines in _Once(index.get(length, []))}
        boxes = [part for box in _boxes(tensor, keep, known) for part in _segments(*box)]
        pieces = [p for box in boxes if (p := _piece(tensor, values, keep, *box, prints[keep], leaves, search))]
        made.append((sum(piece.size for piece in pieces) / max(1, tensor.size), pieces))
        if made[-1][0] > 0.999:
            break
    share, best = max(made, key=lambda found: found[0])
    return best if share >= FEWEST else []


class _Once(list[Lines]):
    """Lines as the keys of a dict, by identity."""

    def __iter__(self) -> Iterator[Lines]:
        return (_Key(*lines) for lines in super().__iter__())


class _Key(Lines):
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


Box = tuple[tuple[int, int], ...]


def _boxes(tensor: Seen, keep: Keep, known: Mapping[Lines, np.ndarray]) -> Iterator[tuple[Lines, Box, np.ndarray]]:
    """For each leaf with enough of the tensor's lines, the box that they are in, and their places there."""
    shape = [tensor.shape[axis] for axis in keep]
    for lines, places in known.items():
        grid = places.reshape(shape)
        found = np.argwhere(grid != UNKNOWN)
        if len(found):
            box = tuple((int(a), int(b) + 1) for a, b in zip(found.min(0), found.max(0), strict=True))
            part = grid[tuple(slice(*ends) for ends in box)]
            if (part != UNKNOWN).mean() >= DENSE:
                yield lines, box, part


def _segments(lines: Lines, box: Box, places: np.ndarray) -> Iterator[tuple[Lines, Box, np.ndarray]]:
    """The box, or if its order is none of digits, the longest ends of it that are: parts with orders of their own."""
    if len(box) > 1 or read_digits(places) is not None or UNKNOWN in places:
        yield lines, box, places
        return
    begin = 0
    first = box[0][0] if box else 0
    while begin < len(places):
        rest = places[begin:]
        count = np.arange(1, len(rest) + 1)
        whole = np.maximum.accumulate(rest) - np.minimum.accumulate(rest) + 1 == count
        ends = (int(end) for end in count[whole][::-1])
        end = begin + next(end for end in ends if read_digits(rest[:end]) is not None)
        yield lines, ((first + begin, first + end),), places[begin:end]
        begin = end


def _piece(
    tensor: Seen,
    values: np.ndarray,
    keep: Keep,
    lines: Lines,
    box: Box,
    places: np.ndarray,
    prints: np.ndarray,
    leaves: Mapping[str, Seen],
    search: Search,
) -> Piece | None:
    leaf = leaves[lines.path]
    box, places = _grown(box, places, prints.reshape([tensor.shape[a] for a in keep]), lines)
    ends = dict(zip(keep, box, strict=True))
    part = values[tuple(slice(*ends.get(axis, (0, None))) for axis in range(values.ndim))]
    order = inner_order(part, leaf.values(), keep, lines.keep, places.reshape(-1), search)
    if order is None:
        return None
    start = [0] * len(leaf.full)
    for axis, at in enumerate(order.start):
        start[leaf.axes[axis]] = at
    digits = tuple(
        d._replace(torch_axis=tensor.axes[d.torch_axis], leaf_axis=leaf.axes[d.leaf_axis]) for d in order.digits
    )
    full = [(0, length) for length in tensor.full]
    for axis, these in ends.items():
        full[tensor.axes[axis]] = these
    return Piece(leaf.name, tensor.name, digits, tuple(full), tuple(start), tensor.full)


def _grown(box: Box, places: np.ndarray, prints: np.ndarray, lines: Lines) -> tuple[Box, np.ndarray]:
    """The box with the lines at its ends that are equal where the order goes on, though they occur twice."""
    if places.ndim != 1 or len(places) < 2 or UNKNOWN in (places[0], places[-1]):
        return box, places
    (begin, end), before, after = box[0], places[1] - places[0], places[-1] - places[-2]
    while begin > 0 and _is(lines.prints, places[0] - before, prints, begin - 1):
        begin, places = begin - 1, np.concatenate([[places[0] - before], places])
    while end < len(prints) and _is(lines.prints, places[-1] + after, prints, end):
        end, places = end + 1, np.concatenate([places, [places[-1] + after]])
    return ((begin, end),), places


def _is(among: np.ndarray, at: int, prints: np.ndarray, line: int) -> bool:
    """Whether a line is the one there, and was not found for the reason that it occurs twice."""
    if not 0 <= at < len(among) or among[at] != prints[line]:
        return False
    return bool((among == prints[line]).sum() > 1 or (prints == prints[line]).sum() > 1)
