"""One region of a leaf and the region of a torch tensor that holds the same numbers.

Each side is seen as an array with one axis for each name: take the range of every axis, split it into its names, pick
the index of the names that are numbered in torch's key, and order the rest alike. Those are views, so that a
conversion is one assignment, in either direction, and each direction the other's inverse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jpeft_interop.layout.axes import Axis, Sizes

Side = tuple[Axis, ...]
Kind = Literal["linear", "conv", "conv1d", "embedding", "experts", "experts_io", "matrix", "plain"]


@dataclass(frozen=True)
class Link:
    """A leaf's region and a torch tensor's.

    Attributes:
      path: the leaf's.
      key: the torch tensor's name.
      kind: what torch's tensor is: `linear` (out, in), `conv` (out, in, k...), `conv1d` (in, out), `embedding` (rows,
        features), `experts` (experts, out, in), `experts_io` (experts, in, out), `matrix` (out, in) of a module of
        another kind than Linear (a router), or `plain`: the weight of no product.
      leaf: the leaf's axes.
      torch: the tensor's.
      index: the numbers in the key, by name.
      sizes: of all names.
      scale: the leaf holds `scale` times what torch has, and
      offset: this more.
    """

    path: str
    key: str
    kind: Kind
    leaf: Side
    torch: Side
    index: tuple[tuple[str, int], ...]
    sizes: Mapping[str, int]
    scale: float = 1.0
    offset: float = 0.0

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The whole tensor's."""
        return tuple(axis.size for axis in self.torch)

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the leaf."""
        return all(axis.length(self.sizes) == axis.size for axis in self.leaf) and not self.index


def named(array: np.ndarray, axes: Side, sizes: Sizes, index: Mapping[str, int]) -> tuple[np.ndarray, list[str]]:
    """`array` as a view with one axis for each name of `axes` that has no number in `index`, and those names.

    The `...` keeps a single value a view that can be written through: without it NumPy gives a copy.
    """
    part = array[(*(slice(axis.start, axis.start + axis.length(sizes)) for axis in axes), ...)]
    names = [name for axis in axes for name in axis.names]
    split = part.reshape([sizes[name] for name in names], copy=False)
    picked = split[(*(index.get(name, slice(None)) for name in names), ...)]
    return picked, [name for name in names if name not in index]


def assign(
    target: np.ndarray, to: Side, source: np.ndarray, of: Side, sizes: Sizes, index: Mapping[str, int] | None = None
) -> None:
    """Writes the part of `source` that the axes `of` stand for where the axes `to` of `target` stand.

    Raises:
      ValueError: the two sides do not have the same names.
    """
    into, wanted = named(target, to, sizes, index or {})
    values, names = named(source, of, sizes, index or {})
    if sorted(wanted) != sorted(names):
        raise ValueError(f"one side has {wanted}, the other {names}")
    into[...] = values.transpose([names.index(name) for name in wanted])


def to_leaf(array: np.ndarray, scale: float, offset: float) -> np.ndarray:
    """`scale` times what torch has, and `offset`: computed in fp32 or wider and rounded once."""
    return array if (scale, offset) == (1.0, 0.0) else np.asarray(_wide(array) * scale + offset, array.dtype)


def to_tensor(array: np.ndarray, scale: float, offset: float) -> np.ndarray:
    """The inverse of `to_leaf`, as far as rounding allows."""
    return array if (scale, offset) == (1.0, 0.0) else np.asarray((_wide(array) - offset) / scale, array.dtype)


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.promote_types(array.dtype, np.float32))


def whole(axes: Sequence[Axis]) -> tuple[int, ...]:
    """The shape of an array with these axes."""
    return tuple(axis.size for axis in axes)
