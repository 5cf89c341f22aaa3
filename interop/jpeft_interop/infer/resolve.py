"""Which of several equal slices a tensor is: told by names and neighbours, or not at all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from jpeft_interop.infer.names import PARTS, likeness, numbers, pattern, shared
from jpeft_interop.infer.piece import Piece
from jpeft_interop.infer.seen import Seen
from jpeft_interop.infer.wholes import Spot

T = TypeVar("T")
Known = Mapping[tuple[str, tuple[int, ...]], set[str]]


class Score(NamedTuple):
    """How well a name fits a slice: the first that differs decides.

    Attributes:
      numbers: whether the numbers of the layers agree.
      near: how much of its name the tensor shares with those of the slice's neighbours.
      alike: whether the words are the same.
    """

    numbers: bool
    near: int
    alike: int


def resolve(keys: Sequence[str], spots: Sequence[Spot], known: Known) -> dict[str, Spot]:
    """Of equal tensors and equal slices, the pairs of which each is the other's clear best; fewer, where none is."""
    scores = {(key, spot): score(spot, key, known) for key in keys for spot in spots}
    left, free, made = list(keys), list(spots), {}
    while found := _clear(left, free, scores):
        for key, spot in found:
            made[key] = spot
            left.remove(key)
            free.remove(spot)
    return made


def _clear(keys: list[str], spots: list[Spot], scores: Mapping[tuple[str, Spot], Score]) -> list[tuple[str, Spot]]:
    of_key = {key: _best({spot: scores[key, spot] for spot in spots}) for key in keys}
    of_spot = {spot: _best({key: scores[key, spot] for key in keys}) for spot in spots}
    pairs = [(key, spot) for key, spot in of_key.items() if spot is not None and of_spot[spot] == key]
    return [(key, spot) for key, spot in pairs if scores[key, spot].numbers]


def _best(scores: Mapping[T, Score]) -> T | None:
    ranked = sorted(scores.items(), key=lambda item: item[1], reverse=True)
    if not ranked or (len(ranked) > 1 and ranked[0][1] == ranked[1][1]):
        return None
    return ranked[0][0]


def known_names(pieces: Sequence[Piece], leaves: Mapping[str, Seen]) -> Known:
    """The tensors found in each module and in those around it, of each layer."""
    made: dict[tuple[str, tuple[int, ...]], set[str]] = defaultdict(set)
    for piece in pieces:
        held = {digit.leaf_axis for digit in piece.digits}
        at = tuple(piece.start[axis] for axis in leaves[piece.path].axes if axis not in held)
        for above in _above(piece.path):
            made[above, (*numbers(piece.path), *at)].add(piece.key)
    return made


def _above(path: str) -> Iterator[str]:
    """The modules that a leaf is in, the innermost first."""
    parts = PARTS.split(pattern(path))
    return ("/".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))


def score(spot: Spot, key: str, known: Known) -> Score:
    """How well a torch name fits a slice."""
    mine = (*numbers(spot.path), *spot.at)
    beside = next((known[above, mine] for above in _above(spot.path) if (above, mine) in known), set())
    theirs = numbers(key)
    agree = any(numbers(other)[: len(theirs)] == theirs for other in beside) if beside else _within(theirs, mine)
    near = max((shared(other, key) for other in beside), default=0)
    return Score(agree, near, likeness(spot.path, key))


def _within(some: Sequence[int], all_of: Sequence[int]) -> bool:
    """Whether the numbers are among those, in their order; none are only among none."""
    rest = iter(all_of)
    return all(number in rest for number in some) and bool(some) == bool(all_of)
