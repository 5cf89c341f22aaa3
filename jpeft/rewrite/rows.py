"""The shapes of a product: which dimensions of a `dot_general` are what, and the way to matrices and back."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import Array

from jpeft.rewrite.weight import Weight
from jpeft.view import Atom, from_original, to_original

Roles = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


class Dims:
    """The dimensions of a `dot_general`, told by operand: the activations' and the weight's."""

    def __init__(self, x: tuple[Any, Any], w: tuple[Any, Any], x_ndim: int, w_ndim: int, weight_first: bool):
        (self.x_contract, self.x_batch), (self.w_contract, self.w_batch) = x, w
        self.x_free = tuple(i for i in range(x_ndim) if i not in (*self.x_contract, *self.x_batch))
        self.w_free = tuple(i for i in range(w_ndim) if i not in (*self.w_contract, *self.w_batch))
        self.weight_first, self.x_ndim, self.w_ndim = weight_first, x_ndim, w_ndim

    @classmethod
    def of(cls, numbers: Any, side: int, x_ndim: int, w_ndim: int) -> Dims:
        """By the `dimension_numbers` of an equation whose operand number `side` is the weight."""
        contract, batch = numbers
        operand = lambda i: (tuple(contract[i]), tuple(batch[i]))
        return cls(operand(1 - side), operand(side), x_ndim, w_ndim, side == 0)

    def with_batch(self, out: tuple[int, ...]) -> Dims:
        """With some of the weight's free dimensions as batch dimensions, and as many new ones leading the input's."""
        n = len(out)
        moved = lambda axes: tuple(axis + n for axis in axes)
        x = (moved(self.x_contract), (*moved(self.x_batch), *range(n)))
        return Dims(x, (self.w_contract, (*self.w_batch, *out)), self.x_ndim + n, self.w_ndim, weight_first=False)

    def result_order(self, out: tuple[int, ...]) -> tuple[int, ...]:
        """The axes of the result in the order that `with_batch(out)` has them in."""
        lead, x, w = len(self.x_batch), len(self.x_free), len(self.w_free)
        x_first, w_first = (lead + w, lead) if self.weight_first else (lead, lead + x)
        place = {dim: w_first + i for i, dim in enumerate(self.w_free)}
        rest = (place[dim] for dim in self.w_free if dim not in out)
        return (*range(lead), *(place[dim] for dim in out), *range(x_first, x_first + x), *rest)

    @property
    def roles(self) -> Roles:
        """The weight's dimensions: contracted, output, batch."""
        return self.w_contract, self.w_free, self.w_batch


class Rows:
    """The way from the equation's shapes to matrices and back."""

    def __init__(self, batch: list[Atom], contracted: list[Atom], output: list[Atom], x: Array, dims: Dims, join: bool):
        self.batch, self.contracted, self.output, self.dims = batch, contracted, output, dims
        self.x_shape = x.shape
        self.free_shape = tuple(x.shape[i] for i in dims.x_free)
        # To join axes that are split over devices in different ways moves what they hold. Behind batch axes there is
        # no product of matrices otherwise.
        joined = join or dims.x_batch or not self.free_shape
        self.rows_shape = (math.prod(self.free_shape),) if joined else self.free_shape

    @classmethod
    def of(cls, x: Array, weight: Weight, dims: Dims, join: bool = True) -> Rows:
        """Of the product of `x` and a weight; `join` makes one axis of all the rows'."""
        view = weight.view
        return cls(view.atoms(dims.w_batch), view.atoms(dims.w_contract), view.atoms(dims.w_free), x, dims, join)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The shape of the product's batch dimensions."""
        return tuple(self.x_shape[i] for i in self.dims.x_batch)

    @property
    def lead(self) -> int:
        """How many axes a matrix has in front of its features."""
        return len(self.dims.x_batch) + len(self.rows_shape)

    def x_to_matrix(self, x: Array) -> Array:
        """The input as (*batch, *rows, in)."""
        d, lead = self.dims, self.lead
        x = x.transpose((*d.x_batch, *d.x_free, *d.x_contract))
        x = x.reshape(*self.batch_shape, *self.rows_shape, *(atom.size for atom in self.contracted))
        return to_original(x, lead, self.contracted)

    def x_from_matrix(self, m: Array) -> Array:
        """The inverse of `x_to_matrix`."""
        d = self.dims
        order = (*d.x_batch, *d.x_free, *d.x_contract)
        split = from_original(m, self.lead, self.contracted).reshape(tuple(self.x_shape[i] for i in order))
        return split.transpose(tuple(order.index(i) for i in range(len(order))))

    def y_to_matrix(self, y: Array) -> Array:
        """The result as (*batch, *rows, out)."""
        lead, n_free = len(self.batch_shape), len(self.free_shape)
        if self.dims.weight_first:
            y = jnp.moveaxis(y, range(y.ndim - n_free, y.ndim), range(lead, lead + n_free))
        self.w_free_shape = y.shape[lead + n_free :]
        y = y.reshape(*self.batch_shape, *self.rows_shape, *(atom.size for atom in self.output))
        return to_original(y, self.lead, self.output)

    def y_from_matrix(self, m: Array) -> Array:
        """The inverse of `y_to_matrix`, after it."""
        lead, n_free = len(self.batch_shape), len(self.free_shape)
        y = from_original(m, self.lead, self.output)
        y = y.reshape(*self.batch_shape, *self.free_shape, *self.w_free_shape)
        if self.dims.weight_first:
            y = jnp.moveaxis(y, range(lead, lead + n_free), range(y.ndim - n_free, y.ndim))
        return y
