"""The rule for products whose rows are sorted by expert: `jax.lax.ragged_dot`, each group of rows with its own matrix.

The branch is two such products, `s ragged_dot(ragged_dot(x, A), B)`: neither the experts' weights nor a padded batch
for each expert are formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import JaxprEqn
from jax.lax import RaggedDotDimensionNumbers

from jpeft.kernel import wide
from jpeft.method import Meeting
from jpeft.methods import METHODS
from jpeft.rewrite.products import batched, dropped, looked_up, matrices_of, oriented
from jpeft.rewrite.program import Program, Result, Use, bind
from jpeft.rewrite.rows import Dims, Rows
from jpeft.rewrite.weight import Branch, Weight, is_weight

Outs = Sequence[Any] | None


def ragged_dot(program: Program, eqn: JaxprEqn, values: Sequence[Any]) -> Outs:
    """y[i] = x[i] · W[expert of i], over any axes; the expert axis is a batch axis of the weight."""
    x, weight, sizes = values
    if not is_weight(weight) or is_weight(x):
        return None
    dims, ragged = _dims(eqn, x.ndim, weight.value.ndim)
    if ragged not in dims.x_free:
        return program.dense(eqn, values, "the groups divide an axis that is contracted or batched, not the rows")
    use = Use(
        weight.path, "ragged_dot_general", "product", view=weight.view, shape=weight.kernel.shape, roles=dims.roles
    )
    if program.watch:
        program.uses.append(use)
        return [Result(bind(eqn, [x, weight.value, sizes])[0], weight.path)]
    adapted = oriented(weight, dims, lambda method: method.lookup is not None)
    if adapted is None:
        return program.dense(eqn, values, "the product contracts other axes than the adapter's")
    if any(branch.gates is not None for branch in adapted.branches):
        return program.dense(eqn, values, "the rows are sorted by expert, the gates are not")
    program.uses.append(use)
    rows = Rows.of(x, weight, dims)
    groups = Groups(eqn, rows, sizes, dims.x_free.index(ragged))
    base = lambda x: bind(eqn, [x, weight.value, sizes])[0]
    return [_product(program, x, base, adapted, rows, groups)]


def _dims(eqn: JaxprEqn, x_ndim: int, w_ndim: int) -> tuple[Dims, int]:
    """The dimensions, and which of the input's is in groups; the experts are the last of the batch dimensions."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    plain = lambda axes: tuple(map(int, axes))  # a vmap leaves numpy's integers
    (x_contract, w_contract), (x_batch, w_batch) = numbers.dot_dimension_numbers
    experts = (*w_batch, *numbers.rhs_group_dimensions)
    x, w = (plain(x_contract), plain(x_batch)), (plain(w_contract), plain(experts))
    return Dims(x, w, x_ndim, w_ndim, weight_first=False), int(numbers.lhs_ragged_dimensions[0])


class Groups:
    """The rows' groups: products by expert on matrices (*batch, rows, n), whatever axes the equation had."""

    def __init__(self, eqn: JaxprEqn, rows: Rows, sizes: Array, ragged: int):
        self.lead, self.free, self.ragged, self.sizes = rows.batch_shape, rows.free_shape, ragged, sizes
        self.experts, self.precision = sizes.shape[-1], eqn.params["precision"]

    def dot(self, h: Array, m: Array) -> Array:
        """Rows (*batch, rows, n) times the matrix (n, k) of their expert, of (*batch, experts, n, k)."""
        lead, last = len(self.lead), len(self.lead) + len(self.free)
        both = tuple(range(lead))
        numbers = RaggedDotDimensionNumbers((((last,), (lead + 1,)), (both, both)), (lead + self.ragged,), (lead,))
        h = h.reshape(*self.lead, *self.free, h.shape[-1])
        out = jax.lax.ragged_dot_general(h, m, self.sizes, numbers, precision=self.precision)
        return out.reshape(*self.lead, math.prod(self.free), m.shape[-1])

    def each(self, v: Array) -> Array:
        """The vector of each row's expert: (*batch, experts, n) -> (*batch, rows, n)."""
        return jnp.take_along_axis(v, self._numbers()[..., None], axis=-2, mode="clip")

    def _numbers(self) -> Array:
        """(*batch, rows): the number of each row's expert; rows behind the last group count as the last expert's."""
        outer, (length, *inner) = self.free[: self.ragged], self.free[self.ragged :]
        ends = jnp.broadcast_to(self.sizes, (*self.lead, *outer, self.experts)).cumsum(-1)
        row = jnp.arange(length, dtype=ends.dtype).reshape(*[1] * (ends.ndim - 1), length, 1)
        number = jnp.minimum((row >= ends[..., None, :]).sum(-1), self.experts - 1)
        whole = jnp.broadcast_to(number.reshape(*number.shape, *[1] * len(inner)), (*self.lead, *self.free))
        return whole.reshape(*self.lead, -1)


def _product(
    program: Program, x: Array, base: Callable[[Array], Array], weight: Weight, rows: Rows, groups: Groups
) -> Array:
    """What the branches make of the frozen product, put back where the equation has its result."""
    branches = batched(weight, (*groups.lead, groups.experts))
    matrix = rows.x_to_matrix(x)
    scaled = _scaled(matrix, branches, groups)
    y = rows.y_to_matrix(base(x if scaled is matrix else rows.x_from_matrix(scaled)))
    met = [(branch, _meeting(program, scaled, branch, groups)) for branch in branches]
    return rows.y_from_matrix(looked_up(weight, met, y, matrices_of(weight, (*groups.lead, groups.experts))))


def _scaled(x: Array, branches: Sequence[Branch], groups: Groups) -> Array:
    """The input of the product, for methods that scale it."""
    for branch in branches:
        scales = METHODS[branch.method].scales
        factor = scales(branch.leaves).in_ if scales is not None else None
        x = x if factor is None else (wide(x) * wide(groups.each(factor))).astype(x.dtype)
    return x


def _meeting(program: Program, x: Array, branch: Branch, groups: Groups) -> Meeting:
    """With an input of its own: dropout is the branch's, one mask for the rows of all experts."""
    key = branch.dropout_key
    seen = dropped(len(program.uses), x, branch if key is None else replace(branch, dropout_key=key[..., 0]))
    return Meeting(lambda a: groups.dot(seen.astype(a.dtype), a), groups.dot, groups.each)
