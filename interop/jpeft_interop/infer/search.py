"""The pieces of the params in which the tensors lie: the sure ones first, then those that lean on them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from jpeft_interop.infer.changed import find_changed, straight
from jpeft_interop.infer.compose import is_covered
from jpeft_interop.infer.names import pattern
from jpeft_interop.infer.order import Search
from jpeft_interop.infer.piece import Piece, is_in
from jpeft_interop.infer.resolve import known_names, resolve
from jpeft_interop.infer.rows import index_lines, pieces_of
from jpeft_interop.infer.scales import find_scaled
from jpeft_interop.infer.seen import Seen
from jpeft_interop.infer.siblings import beside
from jpeft_interop.infer.wholes import Spot, Tick, block, find_spots, fingerprints_of, piece_at, whole_box
from jpeft_interop.layout.link import to_leaf

# what norms that torch keeps as a distance from 1 have more here, and the other way round
OFFSETS = (1.0, -1.0)
FIRST = 1 << 10


@dataclass
class Found:
    """What is known so far.

    Attributes:
      leaves: the params.
      tensors: the state.
      search: how values are told apart.
      pieces: the parts found.
      unclear: why some tensors have none.
    """

    leaves: Mapping[str, Seen]
    tensors: dict[str, Seen]
    search: Search
    pieces: list[Piece] = field(default_factory=list)
    unclear: list[str] = field(default_factory=list)
    told: set[str] = field(default_factory=set)

    def open_tensors(self) -> dict[str, Seen]:
        """Those of which no part was found."""
        done = {piece.key for piece in self.pieces}
        return {key: tensor for key, tensor in self.tensors.items() if key not in done and key not in self.told}

    def open_leaves(self) -> list[str]:
        """Those that the pieces do not fill."""
        of: dict[str, list[Piece]] = defaultdict(list)
        for piece in self.pieces:
            of[piece.path].append(piece)
        return [path for path, leaf in self.leaves.items() if path not in of or not is_covered(leaf, of[path])]

    def likely(self, key: str, path: str) -> list[Piece]:
        """The pieces between names that differ from these in numbers alone: the last is enough, it is as the others."""
        alike = [p for p in self.pieces if pattern(p.key) == pattern(key) and pattern(p.path) == pattern(path)]
        return alike[-1:]


def find_pieces(leaves: Mapping[str, Seen], tensors: Mapping[str, Seen], dtype: np.dtype, tick: Tick) -> Found:
    """The pieces, and what is unclear."""
    found = Found(leaves, dict(tensors), Search(dtype))
    classes = _classes(leaves, tensors, dtype, tick)
    spots = {key: each.spots for each in classes for key in each.keys}
    _place_sure(found, classes)
    _find_parts(found, _lacking(found, spots))
    found.pieces += beside(found.open_tensors(), leaves, found.pieces, dtype)
    found.pieces += _once(
        found, find_scaled({p: leaves[p] for p in found.open_leaves()}, _lacking(found, spots), found.search)
    )
    for constant in (False, True):
        _resolve_all(found, classes, constant=constant)
        found.pieces += beside(found.open_tensors(), leaves, found.pieces, dtype)
    for offset in OFFSETS:
        _find_offset(found, offset)
    found.pieces += find_changed(found.open_tensors(), leaves, found.open_leaves(), found.pieces, dtype)
    return found


class Class(NamedTuple):
    """Equal tensors, the slices that are equal to them, and whether all their values are one."""

    keys: list[str]
    spots: list[Spot]
    constant: bool


def _classes(leaves: Mapping[str, Seen], tensors: Mapping[str, Seen], dtype: np.dtype, tick: Tick) -> list[Class]:
    prints = fingerprints_of(tensors, dtype, tick)
    spots = find_spots(leaves, tensors, prints, dtype, tick)
    groups: dict[tuple[int, int], list[str]] = defaultdict(list)
    for key, value in prints.items():
        if spots[key]:
            groups[tensors[key].size, value].append(key)
    return [Class(keys, spots[keys[0]], is_constant(tensors[keys[0]])) for keys in groups.values()]


def _place_sure(found: Found, classes: Sequence[Class]) -> None:
    """Those that can be but one slice."""
    for keys, where, constant in classes:
        if len(where) == 1 and not constant:
            _place(found, dict.fromkeys(keys, where[0]), constant=False)


def _resolve_all(found: Found, classes: Sequence[Class], *, constant: bool) -> None:
    for each in classes:
        if each.constant is constant:
            _resolve(found, *each)


def _find_offset(found: Found, offset: float) -> None:
    """Vectors that leaves hold a constant more of."""
    more = {
        key: replace(tensor, read=lambda read=tensor.read: to_leaf(read(), 1.0, offset))
        for key, tensor in found.open_tensors().items()
        if len(tensor.shape) == 1
    }
    leaves = {path: found.leaves[path] for path in found.open_leaves()}
    if not more or not leaves:
        return
    shifted = Found(found.leaves, found.tensors | more, found.search, list(found.pieces))
    classes = _classes(leaves, more, found.search.dtype, lambda _: None)
    _place_sure(shifted, classes)
    for constant in (False, True):
        _resolve_all(shifted, classes, constant=constant)
    found.pieces += [replace(piece, offset=offset) for piece in shifted.pieces[len(found.pieces) :]]
    found.unclear += shifted.unclear
    found.told |= shifted.told


def is_constant(tensor: Seen) -> bool:
    """Whether all values are the same."""
    values = tensor.values().reshape(-1)
    return all(bool((some == values[:1]).all()) for some in (values[:FIRST], values))


def _lacking(found: Found, spots: Mapping[str, Sequence[Spot]]) -> dict[str, Seen]:
    return {key: tensor for key, tensor in found.open_tensors().items() if key not in spots}


def _once(found: Found, pieces) -> list[Piece]:
    """Of the pieces of each tensor, the only one."""
    of: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        of[piece.key].append(piece)
    return [several[0] for several in of.values() if len(several) == 1]


def _place(found: Found, pairs: Mapping[str, Spot], *, constant: bool) -> None:
    for key, spot in pairs.items():
        leaf, tensor = found.leaves[spot.path], found.tensors[key]
        likely = found.likely(key, spot.path)
        piece = _plain(leaf, tensor, spot, found.search) if constant and not likely else None
        piece = piece or piece_at(spot, leaf, tensor, found.search, likely) or _plain(leaf, tensor, spot, found.search)
        leaf.release()
        tensor.release()
        if piece:
            found.pieces.append(piece)
        else:
            found.told.add(key)
            found.unclear.append(
                f"{key!r} and {spot.path!r} {list(spot.at) if spot.at else ''} hold the same values, but too many are "
                f"equal to tell the order of the axes of {leaf.full} and {tensor.full}"
            )


def _plain(leaf: Seen, tensor: Seen, spot: Spot, search: Search) -> Piece | None:
    """The order in which both are written, where both are vectors."""
    if len(tensor.shape) > 1 or block(spot, leaf.values()).ndim != len(tensor.shape):
        return None
    start = [0] * len(leaf.full)
    for axis, at in zip(spot.keep, spot.at, strict=True):
        start[leaf.axes[axis]] = at
    free = tuple(leaf.axes[axis] for axis in range(len(leaf.shape)) if axis not in spot.keep)
    part = Seen(leaf.name, leaf.full, free, leaf.dtype, leaf.read, leaf.release)
    piece = Piece(leaf.name, tensor.name, straight(part, tensor), whole_box(tensor), tuple(start), tensor.full)
    return piece if is_in(piece, leaf.read(), tensor.read(), search.dtype) else None


def _find_parts(found: Found, tensors: Mapping[str, Seen]) -> None:
    if not tensors:
        return
    index = index_lines({path: found.leaves[path] for path in found.open_leaves()}, tensors, found.search)
    for tensor in tensors.values():
        found.pieces += pieces_of(tensor, index, found.leaves, found.search)
        tensor.release()


def _resolve(found: Found, keys: Sequence[str], where: Sequence[Spot], constant: bool) -> None:
    open_keys = [key for key in keys if key in found.open_tensors()]
    taken = [piece for piece in found.pieces if piece.key in keys]
    free = [spot for spot in where if not any(_is_at(piece, spot, found.leaves[spot.path]) for piece in taken)]
    if not open_keys:
        return
    if not constant and len(where) == 1:
        _place(found, dict.fromkeys(open_keys, where[0]), constant=False)
        return
    pairs = resolve(open_keys, free, known_names(found.pieces, found.leaves))
    _place(found, pairs, constant=constant)
    left, rest = [k for k in open_keys if k not in pairs], [s for s in free if s not in pairs.values()]
    if pairs and not left and not constant:
        some = ", ".join(repr(spot.path) for spot in rest)
        key, other = next(iter(pairs.items()))
        found.unclear += [f"{some} holds what {key!r} does, as {other.path!r} that it was given to"] if some else []
    if left and rest:
        found.told |= set(left)
        some = [f"{spot.path}{list(spot.at) if spot.at else ''}" for spot in rest]
        found.unclear.append(
            f"{', '.join(map(repr, left))} are equal and could each be any of {', '.join(map(repr, some))}: neither "
            "names nor neighbours tell"
        )


def _is_at(piece: Piece, spot: Spot, leaf: Seen) -> bool:
    """Whether a piece is that slice."""
    at = [piece.start[leaf.axes[axis]] for axis in spot.keep]
    held = {digit.leaf_axis for digit in piece.digits}
    return piece.path == spot.path and tuple(at) == spot.at and not held & {leaf.axes[axis] for axis in spot.keep}
