"""Fingerprints of the slices of an array, the same in whatever order a slice's values lie.

The values' bits are mixed into 64 and added up modulo 2**64: equal multisets have equal sums, and others, of a model's
size, differ but for chances of 1e-9. Where values were rounded anew, powers of them are added up instead.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import numpy as np

CHUNK = 1 << 18  # values mixed at once: they stay in the cache
ODD = np.uint64(0x9E3779B97F4A7C15)
ODD2 = np.uint64(0xD6E8FEB86659FD93)
Keep = tuple[int, ...]  # the axes along which a fingerprint is kept for each index


def mixed(values: np.ndarray) -> np.ndarray:
    """64 well mixed bits for each value, from its own bits."""
    bits = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")
    if bits.dtype.itemsize <= 2:
        return _table(8 * bits.dtype.itemsize)[bits]
    return _mix(bits.astype(np.uint64))


@cache
def _table(bits: int) -> np.ndarray:
    return _mix(np.arange(1 << bits, dtype=np.uint64))


def _mix(x: np.ndarray) -> np.ndarray:
    x += np.uint64(1)
    for odd, shift in ((ODD, 32), (ODD2, 29), (ODD, 32)):
        x *= odd
        x ^= x >> np.uint64(shift)
    return x


def power(exponent: float) -> Callable[[np.ndarray], np.ndarray]:
    """The measure that adds up powers of the sizes of the values."""
    return lambda values: np.abs(values.astype(np.float64)) ** exponent


def cast(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """As `dtype`; what overflows is infinite on both sides alike."""
    with np.errstate(over="ignore"):
        return values if values.dtype == dtype else values.astype(dtype)


def sums(
    array: np.ndarray,
    keeps: Sequence[Keep],
    dtype: np.dtype,
    measure: Callable[[np.ndarray], np.ndarray] = mixed,
) -> list[np.ndarray]:
    """For each of `keeps`, the fingerprints of the slices that its axes number, of the shape of those axes."""
    kind = np.uint64 if measure is mixed else np.float64
    made = [np.zeros([array.shape[axis] for axis in keep], kind) for keep in keeps]
    if array.ndim == 0:
        return [measure(cast(array.reshape(1), dtype))[0] for _ in keeps]
    for part in _parts(array.shape):
        found = measure(cast(array[part], dtype))
        for keep, total in zip(keeps, made, strict=True):
            gone = tuple(axis for axis in range(array.ndim) if axis not in keep)
            if 0 in keep:
                total[part] = found.sum(axis=gone, dtype=kind)
            else:
                total += found.sum(axis=gone, dtype=kind)
    return made


def _parts(shape: tuple[int, ...]) -> Iterator[slice]:
    rows = max(1, CHUNK // max(1, math.prod(shape[1:])))
    return (slice(start, start + rows) for start in range(0, shape[0], rows))


def subsets(ndim: int) -> Iterator[Keep]:
    """Every choice of axes."""
    return itertools.chain.from_iterable(itertools.combinations(range(ndim), count) for count in range(ndim + 1))


def count(shape: Sequence[int], axes: Keep) -> int:
    """How many indices those axes have."""
    return math.prod(shape[axis] for axis in axes)


def rest(ndim: int, keep: Keep) -> Keep:
    """The other axes."""
    return tuple(axis for axis in range(ndim) if axis not in keep)
