"""A weight on its way through a program, with what adapts it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from jax import Array

from jpeft.errors import LiftError
from jpeft.kernel import Kernel, wide
from jpeft.method import Leaves
from jpeft.methods import METHODS
from jpeft.together import adapted_matrix
from jpeft.view import Atom, View, covers


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Branch:
    """One adapter at one weight: leaves as matrices, each with the weight's batch axes in front, and gates too."""

    leaves: Leaves
    dropout_key: Array | None
    gates: Array | None
    method: str = field(metadata={"static": True})
    dropout: float = field(metadata={"static": True})
    use: str | None = field(metadata={"static": True})

    @property
    def adds_bias(self) -> bool:
        """Whether the adapter adds to the layer's result, besides changing its weight."""
        return METHODS[self.method].bias(self.leaves) is not None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Weight:
    """A base weight, seen through `view`, and its branches. Without branches it is only watched.

    `batch` are the batch axes not yet consumed by a scan or a slice; every leaf of a branch leads with them.
    """

    value: Array
    branches: tuple[Branch, ...]
    path: str = field(metadata={"static": True})
    kernel: Kernel = field(metadata={"static": True})
    view: View = field(metadata={"static": True})
    batch: tuple[int, ...] = field(metadata={"static": True})

    is_adapted_weight = True

    def __jax_array__(self) -> Array:
        """Where JAX would take an array: outside of a lifted function."""
        raise LiftError(
            f"{self.path!r} has an adapter attached and is no plain array: call jpeft.lift(fn) with the attached "
            "params as an argument, or use jpeft.apply(params, adapter) with the function itself"
        )

    def moved(self, value: Array, view: View) -> Weight:
        """The same weight elsewhere."""
        return replace(self, value=value, view=view)

    def as_shard(self) -> Weight:
        """A watched weight as one device has it: a part of each axis, seen as whole."""
        if self.view != View.whole(self.kernel.shape):
            return self
        return replace(self, kernel=watched_kernel(self.value.shape), view=View.whole(self.value.shape))

    def with_branches(self, branches: Any, batch: tuple[int, ...]) -> Weight:
        """The same weight with fewer batch axes left."""
        return replace(self, branches=branches, batch=batch)

    @property
    def drops(self) -> bool:
        """Whether a branch has dropout."""
        return any(branch.dropout_key is not None for branch in self.branches)

    def in_turn(self, turn: Array) -> Weight:
        """The weight in one turn of a loop that uses it again and again: other masks each time."""
        keyed = lambda b: b if b.dropout_key is None else replace(b, dropout_key=fold_in(b.dropout_key, turn))
        return replace(self, branches=tuple(map(keyed, self.branches)))

    def role(self, axes: tuple[int, ...]) -> list[Atom]:
        """The atoms of some original axes."""
        return [atom for atom in self.view.all_atoms if atom.axis in axes]

    @property
    def is_whole(self) -> bool:
        """Whether the view still holds all of the weight that its branches are for."""
        axes = (*self.batch, *self.kernel.contracted, *self.kernel.output)
        return covers(self.view.all_atoms, axes, self.kernel.shape)

    @property
    def matrix_order(self) -> list[Atom]:
        """The atoms as matrices have them: batch, contracted, output."""
        groups = (self.role(self.batch), self.role(self.kernel.contracted), self.role(self.kernel.output))
        return [atom for group in groups for atom in sorted(group, key=lambda atom: atom.place)]

    def to_matrix(self, value: Array) -> Array:
        """An array in this view as matrices (*batch, in, out)."""
        atoms = self.view.all_atoms
        split = value.reshape(tuple(atom.size for atom in atoms))
        ordered = split.transpose(tuple(atoms.index(atom) for atom in self.matrix_order))
        lead = tuple(self.kernel.shape[axis] for axis in self.batch)
        return ordered.reshape(*lead, self.kernel.fan_in, self.kernel.fan_out)

    def from_matrix(self, matrix: Array) -> Array:
        """The inverse of `to_matrix`."""
        order = self.matrix_order
        split = matrix.reshape(tuple(atom.size for atom in order))
        return split.transpose(tuple(order.index(atom) for atom in self.view.all_atoms)).reshape(self.value.shape)

    def dense(self) -> Array:
        """The adapted weight itself, formed: always right, and what the fast path is there to avoid."""
        if not self.branches:
            return self.value
        matrix = wide(self.to_matrix(self.value))
        matrix = adapted_matrix(matrix, [(METHODS[branch.method], branch.leaves) for branch in self.branches])
        return self.from_matrix(matrix).astype(self.value.dtype)


def watched_kernel(shape: tuple[int, ...]) -> Kernel:
    """In place of the geometry that is yet to be found."""
    return Kernel(shape, (), tuple(range(len(shape))), kind="watched")


def is_weight(x: Any) -> bool:
    """Whether `x` is an adapted or a watched weight."""
    return isinstance(x, Weight)


def over_keys(function: Callable[[Array], Array], keys: Array) -> Array:
    """`function` of one key, over an array of them."""
    for _ in range(keys.ndim):
        function = jax.vmap(function)
    return function(keys)


def fold_in(keys: Array, number: Any) -> Array:
    """Each of the keys folded with one number."""
    return over_keys(lambda key: jax.random.fold_in(key, number), keys)
