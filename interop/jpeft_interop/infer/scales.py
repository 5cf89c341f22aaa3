"""Tensors that a leaf holds times a constant: found by what a constant leaves as it is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from jpeft_interop.infer.fingerprints import count, power, rest, sums
from jpeft_interop.infer.order import Search, find_order
from jpeft_interop.infer.piece import Piece
from jpeft_interop.infer.seen import Seen
from jpeft_interop.infer.wholes import Spot, block, slices_of, whole_box
from jpeft_interop.layout.link import to_leaf

FEWEST = 8  # values, below which many tensors are multiples of each other


def find_scaled(leaves: Mapping[str, Seen], tensors: Mapping[str, Seen], search: Search) -> Iterator[Piece]:
    """Whole tensors that lie in a slice of a leaf, times a constant."""
    tensors = {key: tensor for key, tensor in tensors.items() if tensor.size >= FEWEST}
    shapes = {key: _moments(tensor.values(), ()) for key, tensor in tensors.items()}
    for leaf in leaves.values():
        for keep in slices_of(leaf, {tensor.size for tensor in tensors.values()}):
            size = count(leaf.shape, rest(len(leaf.shape), keep))
            form, norm = _moments(leaf.values(), keep)
            for key, tensor in tensors.items():
                if tensor.size == size:
                    yield from _pieces(leaf, tensor, keep, form, norm, shapes[key], search)


def _pieces(leaf, tensor, keep, form, norm, told, search: Search) -> Iterator[Piece]:
    theirs, length = told
    room = 16 * _epsilon(search.dtype) / math.sqrt(tensor.size) + 1e-9
    if not np.isfinite(theirs) or not length:
        return
    for flat in np.flatnonzero(np.abs(form / theirs - 1) < room):
        at = tuple(int(i) for i in np.unravel_index(flat, form.shape)) if form.ndim else ()
        scale = simple(float(np.asarray(norm)[at] / length), room)
        if piece := _piece(leaf, tensor, Spot(leaf.name, keep, at), scale, search):
            yield piece


def _piece(leaf: Seen, tensor: Seen, spot: Spot, scale: float, search: Search) -> Piece | None:
    values, torch = block(spot, leaf.values()), tensor.values()
    near = search._replace(near=4 * _epsilon(search.dtype) / math.sqrt(max(torch.shape, default=1)))
    for way in (search, near):
        order = find_order(to_leaf(torch, scale, 0.0), values, way)
        if order is not None:
            break
    else:
        return None
    free = rest(len(leaf.shape), spot.keep)
    start = [0] * len(leaf.full)
    for axis, begin in (*zip(spot.keep, spot.at, strict=True), *zip(free, order.start, strict=True)):
        start[leaf.axes[axis]] = begin
    digits = tuple(
        d._replace(torch_axis=tensor.axes[d.torch_axis], leaf_axis=leaf.axes[free[d.leaf_axis]]) for d in order.digits
    )
    return Piece(leaf.name, tensor.name, digits, whole_box(tensor), tuple(start), tensor.full, scale)


def _moments(values: np.ndarray, keep: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Of each slice, a figure that no scale changes, and the norm, which it multiplies."""
    one, two = (sums(values, [keep], values.dtype, power(p))[0] for p in (1.0, 2.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(one / np.sqrt(two)), np.asarray(np.sqrt(two))


def simple(scale: float, room: float) -> float:
    """The root of a whole number, or of one over it, that is as near; the scale itself otherwise.

    Example:
      >>> simple(0.3535534, 1e-6) == 8**-0.5, simple(1.2345, 1e-6)
      (True, 1.2345)
    """
    for square, of in ((scale**2, lambda n: n**0.5), (scale**-2, lambda n: n**-0.5)):
        whole = round(square)
        if whole >= 1 and abs(square / whole - 1) < max(4 * room, 1e-7):
            return float(of(whole))
    return scale


def _epsilon(dtype: np.dtype) -> float:
    import ml_dtypes

    return float(ml_dtypes.finfo(dtype).eps)
