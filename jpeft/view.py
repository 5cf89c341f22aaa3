"""Where the axes of a weight are while it moves through a program: under `.T`, `reshape`, a slice of stacked layers.

Each dimension of the moving array is a tuple of atoms; an atom is a part of one original axis, `index = stride * i`.
A transpose permutes dimensions, a reshape splits or joins atoms, and nothing is ever guessed: a move that has no exact
answer gives None, and the weight is then used as a dense array.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from jax import Array


class Atom(NamedTuple):
    """A part of an axis: `size` steps of `stride` along `axis`."""

    axis: int
    stride: int
    size: int

    @property
    def place(self) -> tuple[int, int]:
        """Sorts the atoms of an array into its original row-major order."""
        return self.axis, -self.stride


Dim = tuple[Atom, ...]


@dataclass(frozen=True)
class View:
    """The dimensions of an array, each in atoms of the original axes."""

    dims: tuple[Dim, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> View:
        """The array as it lies in the params."""
        return cls(tuple((Atom(axis, 1, size),) for axis, size in enumerate(shape)))

    def transpose(self, permutation: tuple[int, ...]) -> View:
        """The view after a transpose."""
        return View(tuple(self.dims[i] for i in permutation))

    def drop(self, dimensions: tuple[int, ...]) -> View:
        """The view without these dimensions."""
        return View(tuple(dim for i, dim in enumerate(self.dims) if i not in dimensions))

    def insert(self, rank: int, kept: tuple[int, ...]) -> View:
        """New dimensions of size one, with the old ones at the positions `kept` (as `broadcast_in_dim` has it)."""
        return View(tuple(self.dims[kept.index(i)] if i in kept else () for i in range(rank)))

    def reshape(self, shape: tuple[int, ...]) -> View | None:
        """The view after a row-major reshape, or None where a new dimension cuts across two axes."""
        pending = self.all_atoms[::-1]
        dims: list[Dim] = []
        for size in shape:
            dim = _take(pending, size)
            if dim is None:
                return None
            dims.append(dim)
        if dims:
            dims[-1] += tuple(pending[::-1])  # axes of size one, no longer of their own
        return View(tuple(dims))

    def atoms(self, dimensions: tuple[int, ...]) -> list[Atom]:
        """The atoms of these dimensions, in order."""
        return [atom for i in dimensions for atom in self.dims[i]]

    @property
    def all_atoms(self) -> list[Atom]:
        """Every atom, in order."""
        return self.atoms(tuple(range(len(self.dims))))

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return tuple(math.prod(atom.size for atom in dim) for dim in self.dims)


def _take(pending: list[Atom], size: int) -> Dim | None:
    """Atoms off the end of `pending` whose sizes multiply to `size`, the last one split where need be.

    An axis of size one stays a dimension of its own where there is one, and else joins the dimension after it.
    """
    if size == 1 and pending and pending[-1].size == 1:
        return (pending.pop(),)
    taken: list[Atom] = []
    while size > 1:
        if not pending:
            return None
        atom = pending.pop()
        if size % atom.size == 0:
            taken.append(atom)
            size //= atom.size
        elif atom.size % size == 0:
            rest = atom.size // size
            taken.append(Atom(atom.axis, atom.stride * rest, size))
            pending.append(Atom(atom.axis, atom.stride, rest))
            size = 1
        else:
            return None
    return tuple(taken)


def covers(atoms: list[Atom], axes: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether `atoms` are exactly the whole of `axes`, in whatever order (axes of size one need none)."""
    return {a.axis for a in atoms if a.size > 1} == {i for i in axes if shape[i] > 1} and math.prod(
        a.size for a in atoms
    ) == math.prod(shape[i] for i in axes)


def from_original(matrix: Array, lead: int, atoms: list[Atom]) -> Array:
    """The last axis of `matrix`, laid out in original row-major order, split into `atoms` in the order given.

    `lead` leading dimensions stay; the result has shape `(*lead, *(atom.size for atom in atoms))`.
    """
    ordered = sorted(atoms, key=lambda atom: atom.place)
    split = matrix.reshape(*matrix.shape[:lead], *(atom.size for atom in ordered))
    return split.transpose(*range(lead), *(lead + ordered.index(atom) for atom in atoms))


def to_original(array: Array, lead: int, atoms: list[Atom]) -> Array:
    """The inverse of `from_original`: trailing dimensions, one an atom, joined into one in the original order."""
    ordered = sorted(atoms, key=lambda atom: atom.place)
    order = (*range(lead), *(lead + atoms.index(atom) for atom in ordered))
    return array.transpose(order).reshape(*array.shape[:lead], math.prod(atom.size for atom in atoms))


def last_from_original(array: Array, atoms: list[Atom]) -> Array:
    """Put the last axis, in original row-major order, in the order of `atoms`, which make one axis again."""
    if atoms == sorted(atoms, key=lambda atom: atom.place):
        return array
    return from_original(array, array.ndim - 1, atoms).reshape(array.shape)


def last_to_original(array: Array, atoms: list[Atom]) -> Array:
    """Undo `last_from_original`."""
    if atoms == sorted(atoms, key=lambda atom: atom.place):
        return array
    return to_original(array.reshape(*array.shape[:-1], *(atom.size for atom in atoms)), array.ndim - 1, atoms)
