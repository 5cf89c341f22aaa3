"""The proof of a layout: every tensor that it makes is the one that is there, every leaf likewise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jpeft_interop.infer.fingerprints import cast
from jpeft_interop.infer.seen import Seen
from jpeft_interop.layout.layout import Layout, as_numpy


def narrower(one: np.dtype, other: np.dtype) -> np.dtype:
    """Of two dtypes, the one with fewer bits; the first where they have as many."""
    return other if other.itemsize < one.itemsize else one


def differing(layout: Layout, key: str, flat: Mapping[str, Any], tensor: Seen, tolerance: float | None) -> str | None:
    """What is different between a tensor and what the layout makes of the leaves; None where they are the same."""
    links = layout.by_key[key]
    made, there = layout.tensor(key, flat), tensor.read()
    wrong = mismatch(made, there, links[0].scale, links[0].offset, tolerance)
    tensor.release()
    if wrong is None:
        return None
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    paths = ", ".join(repr(path) for path in dict.fromkeys(link.path for link in links))
    return (
        f"{key!r} fits {paths}, but {int(wrong.sum())} of {wrong.size} values differ, the first at {list(at)}: "
        f"torch has {there[at]!s}, the params {made[at]!s}"
    )


def leaf_differs(
    layout: Layout, path: str, leaf: Seen, state: Mapping[str, Any], keys: Any, tolerance: float | None
) -> str | None:
    """What is different between a leaf and what the layout makes of the tensors, where it is padded."""
    place = layout[path]
    tensors = {key: as_numpy(state[key], key) for key in {link.key for link in layout.links[path]} & set(keys)}
    made, there = layout.leaf(path, tensors), leaf.read()
    wrong = mismatch(there, made, place.scale, place.offset, tolerance)
    if wrong is None:
        return None
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    return (
        f"{path!r} ({place.axes}) holds values that no tensor has, {int(wrong.sum())} in all, the first at {list(at)}: "
        f"{there[at]!s}, where the layout's padding is zero"
    )


def mismatch(
    one: np.ndarray, other: np.ndarray, scale: float, offset: float, tolerance: float | None
) -> np.ndarray | None:
    """Where they differ, once both are of the narrower dtype; None if nowhere."""
    dtype = narrower(one.dtype, other.dtype)
    one, other = cast(one, dtype), cast(other, dtype)
    if tolerance is None and (scale, offset) == (1.0, 0.0):
        kind = f"u{dtype.itemsize}"
        wrong = np.ascontiguousarray(one).view(kind) != np.ascontiguousarray(other).view(kind)
    else:
        mine, theirs = (array.astype(np.promote_types(dtype, np.float32)) for array in (one, other))
        size = np.abs(theirs)
        room = 2 * _epsilon(dtype) * (size + abs(offset / scale))
        wrong = ~(np.abs(mine - theirs) <= (room if tolerance is None else tolerance * size.max(initial=0)))
    wrong = wrong.reshape(one.shape)
    return wrong if wrong.any() else None


def _epsilon(dtype: np.dtype) -> float:
    import ml_dtypes

    return float(ml_dtypes.finfo(dtype).eps)


def all_wrong(
    layout: Layout,
    flat: Mapping[str, Any],
    leaves: Mapping[str, Seen],
    tensors: Mapping[str, Seen],
    state: Mapping[str, Any],
    padded: list[str],
    tolerance: float | None,
    tick: Any,
) -> Iterator[str]:
    """Everything that the proof finds wrong."""
    for key in layout.by_key:
        if wrong := differing(layout, key, flat, tensors[key], tolerance):
            yield wrong
        for link in layout.by_key[key]:
            leaves[link.path].release()
        tick(tensors[key])
    for path in padded:
        if wrong := leaf_differs(layout, path, leaves[path], state, tensors, tolerance):
            yield wrong
