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

    numbers: int
    near: int
    alike: int


def resolve(keys: Sequence[str], spots: Sequence[Spot], known: Known) -> dict[str, Spot]:
    """Of equal tensors and slices, the pairs of which each is the other's clear best; fewer, where none is."""
    own = {spot: own_numbers(spot, spots) for spot in spots}
    scores = {(key, spot): score(spot, own[spot], key, known) for key in keys for spot in spots}
    # Of one name and one leaf, but for the numbers: those tell.
    one = len({pattern(key) for key in keys}) == 1 == len({pattern(spot.path) for spot in spots})
    left, free, made = list(keys), list(spots), {}
    while found := _clear(left, free, scores, one):
        for key, spot in found:
            made[key] = spot
            left.remove(key)
            free.remove(spot)
    return made


def _clear(
    keys: list[str], spots: list[Spot], scores: Mapping[tuple[str, Spot], Score], numbers_tell: bool
) -> list[tuple[str, Spot]]:
    of_key = {key: _best({spot: scores[key, spot] for spot in spots}) for key in keys}
    of_spot = {spot: _best({key: scores[key, spot] for key in keys}) for spot in spots}
    pairs = [(key, spot) for key, spot in of_key.items() if spot is not None and of_spot[spot] == key]
    is_clear = lambda score: bool(score.numbers) and (numbers_tell or bool(score.near or score.alike))
    return [(key, spot) for key, spot in pairs if is_clear(scores[key, spot])]


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


def own_numbers(spot: Spot, spots: Sequence[Spot]) -> tuple[int, ...]:
    """The numbers that tell a slice from the others of its leaf, after those in the leaf's path."""
    others = [other.at for other in spots if (other.path, other.keep) == (spot.path, spot.keep)]
    varying = [place for place in range(len(spot.at)) if len({at[place] for at in others}) > 1]
    return (*numbers(spot.path), *(spot.at[place] for place in varying or range(len(spot.at))))


def score(spot: Spot, own: tuple[int, ...], key: str, known: Known) -> Score:
    """How well a torch name fits a slice, whose own numbers are `own`."""
    mine = (*numbers(spot.path), *spot.at)
    beside = next((known[above, mine] for above in _above(spot.path) if (above, mine) in known), set())
    theirs = numbers(key)
    agree = 2 * any(_begins(numbers(other), theirs) for other in beside) if beside else _agree(theirs, own)
    near = max((shared(other, key) for other in beside), default=0)
    return Score(agree, near, likeness(spot.path, key))


def _begins(other: tuple[int, ...], mine: tuple[int, ...]) -> bool:
    return other[: len(mine)] == mine and bool(other) == bool(mine)


def _agree(some: Sequence[int], all_of: Sequence[int]) -> int:
    """2 where the numbers are the same, 1 where all are among those, in their order; none are only among none."""
    if tuple(some) == tuple(all_of):
        return 2
    rest = iter(all_of)
    return int(all(number in rest for number in some) and bool(some) == bool(all_of))
