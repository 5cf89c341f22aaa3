"""The notation for the axes of one array, and for the part of them that a name stands for.

    d (heads two half)          two axes; the second is three, one within the other, the last the fastest
    d (q + k + v)               the second axis holds q, then k, then v, end to end
    (vocabulary + 64) d         64 rows more than are meant
    1 d                         an axis of length one

A name may stand on both sides of a layout, and has one size. As in einops, with `+` for what lies end to end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from jpeft.errors import WeightsError

Item = str | int
Alternative = tuple[Item, ...]  # one within the other
Notation = tuple[tuple[Alternative, ...], ...]  # of each axis, what lies end to end
Sizes = Mapping[str, int]

TOKEN = re.compile(r"\s*([A-Za-z_]\w*|\d+|[()+])")


@dataclass(frozen=True)
class Axis:
    """One axis as one name's owner sees it: `names`, the slowest first, from `start` on, of `size` in all."""

    names: tuple[str, ...]
    start: int
    size: int

    def length(self, sizes: Sizes) -> int:
        """How much of the axis it is."""
        return math.prod(sizes[name] for name in self.names)


def parse(text: str) -> Notation:
    """The axes that `text` names.

    Raises:
      WeightsError: it is not in the notation.

    Example:
      >>> parse("d (q + 2)")
      ((('d',),), (('q',), (2,)))
    """
    tokens = TOKEN.findall(text)
    if TOKEN.sub("", text).strip():
        raise WeightsError(f"the axes {text!r}: only names, numbers, '(', ')' and '+' have a meaning")
    rest = iter(tokens)
    axes = tuple(_alternatives(rest, text) if token == "(" else ((_item(token, text),),) for token in rest)
    for axis in axes:
        for alternative in axis:
            if len(alternative) > 1 and any(isinstance(item, int) and item != 1 for item in alternative):
                raise WeightsError(f"the axes {text!r}: a number beside a name; give the size a name of its own")
    return axes


def _alternatives(tokens: Iterator[str], text: str) -> tuple[Alternative, ...]:
    found: list[list[Item]] = [[]]
    for token in tokens:
        if token == ")":
            return tuple(map(tuple, found))
        if token == "+":
            found.append([])
        else:
            found[-1].append(_item(token, text))
    raise WeightsError(f"the axes {text!r}: a '(' without its ')'")


def _item(token: str, text: str) -> Item:
    if token in "()+":
        raise WeightsError(f"the axes {text!r}: {token!r} where a name belongs")
    return int(token) if token.isdigit() else token


def names(notation: Notation) -> list[str]:
    """Every name in it, in order."""
    return [item for axis in notation for alternative in axis for item in alternative if isinstance(item, str)]


def shape_of(notation: Notation, sizes: Sizes) -> tuple[int, ...]:
    """The lengths of the axes."""
    return tuple(sum(_length(alternative, sizes) for alternative in axis) for axis in notation)


def _length(alternative: Alternative, sizes: Sizes) -> int:
    return math.prod(item if isinstance(item, int) else sizes[item] for item in alternative)


def solve(notation: Notation, shape: Sequence[int], sizes: Sizes, told: str) -> dict[str, int]:
    """The sizes of all names, from those known and the lengths of the axes.

    Raises:
      WeightsError: the lengths and the sizes do not fit, or leave one open. `told` is whose shape it is.
    """
    if len(notation) != len(shape):
        raise WeightsError(f"{told}: its shape is {tuple(shape)}, and the layout gives it {len(notation)} axes")
    known = dict(sizes)
    for axis, length in zip(notation, shape, strict=True):
        known |= _solve_axis(axis, length, known)
    missing = [name for name in names(notation) if name not in known]
    if missing or shape_of(notation, known) != tuple(shape):
        found = f"the layout needs a size for {missing[0]!r}" if missing else f"expected {shape_of(notation, known)}"
        stated = {name: known[name] for name in names(notation) if name in known}
        raise WeightsError(f"{told}: its shape is {tuple(shape)}; {found}, with {stated}")
    return known


def _solve_axis(axis: tuple[Alternative, ...], length: int, known: Sizes) -> dict[str, int]:
    """The one size that is open along an axis."""
    open_in = [alternative for alternative in axis if any(isinstance(i, str) and i not in known for i in alternative)]
    if len(open_in) != 1:
        return {}
    unknown = [item for item in open_in[0] if isinstance(item, str) and item not in known]
    beside = math.prod(item if isinstance(item, int) else known.get(item, 1) for item in open_in[0])
    rest = length - sum(_length(alternative, known) for alternative in axis if alternative is not open_in[0])
    return {unknown[0]: rest // beside} if len(unknown) == 1 and beside and rest > 0 and rest % beside == 0 else {}


def side(notation: Notation, used: Collection[str], sizes: Sizes, told: str) -> tuple[Axis, ...]:
    """Of each axis, the part that the names in `used` stand for.

    Raises:
      WeightsError: along some axis they stand for none of what lies there, or for several.
    """
    return tuple(_axis(axis, used, sizes, told) for axis in notation)


def _axis(axis: tuple[Alternative, ...], used: Collection[str], sizes: Sizes, told: str) -> Axis:
    of = lambda alternative: tuple(item for item in alternative if isinstance(item, str))
    meant = [i for i, alternative in enumerate(axis) if of(alternative) and set(of(alternative)) <= set(used)]
    if not meant and all(alternative == (1,) for alternative in axis) and len(axis) == 1:
        return Axis((), 0, 1)
    if len(meant) != 1:
        raise WeightsError(f"{told}: of {axis}, {len(meant)} are meant by {sorted(used)}; it must be one")
    lengths = [_length(alternative, sizes) for alternative in axis]
    return Axis(of(axis[meant[0]]), sum(lengths[: meant[0]]), sum(lengths))
