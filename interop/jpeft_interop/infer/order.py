"""How the values of a torch tensor lie in a block of a leaf that holds the same ones, in another order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jpeft_interop.infer.digits import UNKNOWN, AxisDigit, on_axes, read_digits
from jpeft_interop.infer.fingerprints import Keep, cast, count, mixed, power, rest, subsets, sums
from jpeft_interop.infer.locate import locate, locate_near

LINES = 48  # that an index across them is told apart by
SAMPLE = 16
FEW = 0.3  # of the lines found, below which a pairing of axes is none


class Order(NamedTuple):
    """The digits, and the index of the block that torch's index 0 has."""

    digits: tuple[AxisDigit, ...]
    start: tuple[int, ...]


Find = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Search(NamedTuple):
    """How lines are told apart: by bits, or by sizes where values were rounded anew."""

    dtype: np.dtype
    near: float | None = None

    def along(self, array: np.ndarray, keeps: Sequence[Keep]) -> list[np.ndarray]:
        """Fingerprints of the slices, flat."""
        measure = mixed if self.near is None else power(1.5)
        return [np.ravel(found) for found in sums(array, keeps, self.dtype, measure)]

    def across(self, lines: np.ndarray) -> np.ndarray:
        """Fingerprints of the columns of a few lines, in the order of the lines."""
        generator = np.random.default_rng(0)
        if self.near is None:
            odd = generator.integers(0, 1 << 63, len(lines), np.uint64) * np.uint64(2) + np.uint64(1)
            return (mixed(cast(lines, self.dtype)) * odd[:, None]).sum(axis=0, dtype=np.uint64)
        return generator.uniform(1, 2, len(lines)) @ lines.astype(np.float64)

    def locate(self, wanted: np.ndarray, among: np.ndarray) -> np.ndarray:
        """The places of fingerprints among others."""
        return locate(wanted, among) if self.near is None else locate_near(wanted, among, self.near)


def find_order(torch: np.ndarray, block: np.ndarray, search: Search) -> Order | None:
    """The order, or None where there is none of digits.

    Args:
      torch: the tensor.
      block: of as many values.
      search: what tells values apart.
    """
    pairs = list(_pairs(torch.shape, block.shape))
    outers = list(dict.fromkeys(mine for _, mine in pairs))
    among = dict(zip(outers, search.along(block, outers), strict=True))
    for theirs, mine in pairs:
        if theirs and _sampled(torch, theirs, among[mine], search) < FEW:
            continue
        places = search.locate(search.along(torch, [theirs])[0], among[mine]) if theirs else np.zeros(1, np.int64)
        if found := inner_order(torch, block, theirs, mine, places, search):
            return found
    return None


def inner_order(
    torch: np.ndarray, block: np.ndarray, theirs: Keep, mine: Keep, places: np.ndarray, search: Search
) -> Order | None:
    """The order, where it is known which slices are the same: those along `theirs` lie at `places` along `mine`."""
    outer = read_digits(places)
    if outer is None:
        return None
    within, of = rest(torch.ndim, theirs), rest(block.ndim, mine)
    some = np.flatnonzero(places != UNKNOWN)
    some = some[np.linspace(0, len(some) - 1, min(LINES, len(some))).astype(int)]
    lines, same = _lines(torch, theirs, some), _lines(block, mine, places[some])
    inner = read_digits(search.locate(search.across(lines), search.across(same)))
    if inner is None:
        return None
    there, here = torch.shape, block.shape
    shape = lambda array_shape, axes: [array_shape[axis] for axis in axes]
    one = on_axes(outer[1], shape(there, theirs), theirs, shape(here, mine), mine)
    two = on_axes(inner[1], shape(there, within), within, shape(here, of), of)
    if one is None or two is None:
        return None
    start = [0] * block.ndim
    for axes, flat in ((mine, outer[0]), (of, inner[0])):
        for axis, at in zip(axes, np.unravel_index(flat, shape(here, axes)) if axes else (), strict=True):
            start[axis] = int(at)
    return Order((*one, *two), tuple(start))


def _lines(array: np.ndarray, keep: Keep, which: np.ndarray) -> np.ndarray:
    """Of the slices along `keep`, some, each flat."""
    moved = array.transpose(*keep, *rest(array.ndim, keep))
    if not keep:  # the whole is the one slice
        return np.broadcast_to(moved.reshape(1, -1), (len(which), array.size))
    return moved[np.unravel_index(which, [array.shape[axis] for axis in keep])].reshape(len(which), -1)


def _pairs(torch: tuple[int, ...], block: tuple[int, ...]) -> Iterator[tuple[Keep, Keep]]:
    """Axes of the one and of the other that number equally many slices: the most evenly divided first."""
    whole = int(np.prod(torch))
    found = [
        (theirs, mine)
        for theirs in subsets(len(torch))
        for mine in subsets(len(block))
        if count(torch, theirs) == count(block, mine)
    ]
    return iter(sorted(found, key=lambda pair: max(count(torch, pair[0]), whole // count(torch, pair[0]))))


def _sampled(torch: np.ndarray, keep: Keep, among: np.ndarray, search: Search) -> float:
    """How many of a few slices are there: a glance, before all are looked at."""
    slices = count(torch.shape, keep)
    which = np.linspace(0, slices - 1, min(SAMPLE, slices)).astype(int)
    found = search.along(_lines(torch, keep, which), [(0,)])[0]
    return float((search.locate(found, among) != UNKNOWN).mean())
