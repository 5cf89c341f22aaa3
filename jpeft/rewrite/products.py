"""Rules for where a weight meets the activations: the method's product in place of the dense one.

The base's own equation is re-bound as it was. The branch runs on matrices: x as (*batch, rows, in), y as
(*batch, rows, out); the reshapes around it are free in the usual layouts.
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

from jpeft.methods import METHODS
from jpeft.rewrite.program import Program, Result, Use, bind
from jpeft.rewrite.weight import Branch, Weight, fold_in, is_weight, over_keys
from jpeft.view import Atom, covers, from_original, to_original

Outs = Sequence[Any] | None
Roles = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def dot_general(program: Program, eqn: JaxprEqn, values: Sequence[Any]) -> Outs:
    """y = x · W over any axes, W on either side."""
    side = 0 if is_weight(values[0]) else 1
    weight, x = values[side], values[1 - side]
    if is_weight(x):
        return program.dense(eqn, values, "a product of two adapted weights")
    dims = _Dims.of(eqn, side, x.ndim, weight.value.ndim)
    use = Use(weight.path, "dot_general", "product", view=weight.view, roles=dims.roles)
    if program.watch:
        program.uses.append(use)
        return [Result(bind(eqn, [x, weight.value][:: 1 if side else -1])[0], weight.path)]
    branches = _oriented(weight, dims)
    if branches is None:
        return program.dense(eqn, values, "the product contracts other axes than the adapter's")
    program.uses.append(use)
    base = lambda x: bind(eqn, [x, weight.value][:: 1 if side else -1])[0]
    return [_product(program, x, base, replace(weight, branches=branches), dims)]


class _Dims:
    """The dimensions of a `dot_general`, told by operand: the activations' and the weight's."""

    def __init__(self, x: tuple[Any, Any], w: tuple[Any, Any], x_ndim: int, w_ndim: int, weight_first: bool):
        (self.x_contract, self.x_batch), (self.w_contract, self.w_batch) = x, w
        self.x_free = tuple(i for i in range(x_ndim) if i not in (*self.x_contract, *self.x_batch))
        self.w_free = tuple(i for i in range(w_ndim) if i not in (*self.w_contract, *self.w_batch))
        self.weight_first = weight_first

    @classmethod
    def of(cls, eqn: JaxprEqn, side: int, x_ndim: int, w_ndim: int) -> _Dims:
        contract, batch = eqn.params["dimension_numbers"]
        operand = lambda i: (tuple(contract[i]), tuple(batch[i]))
        return cls(operand(1 - side), operand(side), x_ndim, w_ndim, side == 0)

    @property
    def roles(self) -> Roles:
        return self.w_contract, self.w_free, self.w_batch


def _oriented(weight: Weight, dims: _Dims) -> tuple[Branch, ...] | None:
    """The branches for the product at hand: as they are, transposed for `x Wᵀ`, or None if neither fits."""
    view, kernel = weight.view, weight.kernel
    batch = view.atoms(dims.w_batch)
    if not weight.is_whole or [a.axis for a in batch if a.size > 1] != [a for a in weight.batch if kernel.shape[a] > 1]:
        return None
    methods = [METHODS[branch.method] for branch in weight.branches]
    contracted = view.atoms(dims.w_contract)
    if covers(contracted, kernel.contracted, kernel.shape) and all(m.product for m in methods):
        return weight.branches if kernel.fan_in > 1 or not covers(contracted, kernel.output, kernel.shape) else None
    if covers(contracted, kernel.output, kernel.shape) and all(m.product and m.transposed for m in methods):
        return tuple(_transposed(branch) for branch in weight.branches)
    return None


def _transposed(branch: Branch) -> Branch:
    transposed = METHODS[branch.method].transposed
    assert transposed is not None
    return replace(branch, leaves=transposed(branch.leaves))


def _product(program: Program, x: Array, base: Callable[[Array], Array], weight: Weight, dims: _Dims) -> Array:
    """The methods' product on matrices, put back where the equation has its result."""
    rows = _Rows.of(x, weight, dims)
    matrix = rows.x_to_matrix(x)
    out = rows.y_to_matrix(base(x))
    for branch in _batched(weight, rows.batch_shape):
        if branch.use in (None, "product"):
            out = _with_branch(program, matrix, out, branch)
    return rows.y_from_matrix(out)


def _batched(weight: Weight, batch_shape: tuple[int, ...]) -> tuple[Branch, ...]:
    """The branches with the product's batch axes, where a reshape has joined, added or dropped some (of size one)."""
    return jax.tree.map(lambda leaf: leaf.reshape(*batch_shape, *leaf.shape[len(weight.batch) :]), weight.branches)


def _with_branch(program: Program, x: Array, y: Array, branch: Branch) -> Array:
    method = METHODS[branch.method]
    assert method.product is not None
    y = method.product(_dropout(program, x, branch), y, branch.leaves, forward_mode=program.forward_mode)
    bias = method.bias(branch.leaves)
    return y if bias is None else y + bias[..., None, :].astype(y.dtype)


def _dropout(program: Program, x: Array, branch: Branch) -> Array:
    """Inverted dropout of the branch's input; another mask for each use of a shared weight."""
    if branch.dropout_key is None:
        return x
    key, keep = fold_in(branch.dropout_key, len(program.uses)), 1 - branch.dropout
    shape = x.shape[key.ndim :]
    kept = over_keys(lambda key: jax.random.bernoulli(key, keep, shape), key)
    return jnp.where(kept, x / keep, jnp.zeros((), x.dtype)).astype(x.dtype)


class _Rows:
    """The way from the equation's shapes to matrices and back."""

    def __init__(self, batch: list[Atom], contracted: list[Atom], output: list[Atom], x: Array, dims: _Dims):
        self.batch, self.contracted, self.output, self.dims = batch, contracted, output, dims
        self.x_shape = x.shape
        self.free_shape = tuple(x.shape[i] for i in dims.x_free)
        self.rows = math.prod(self.free_shape)

    @classmethod
    def of(cls, x: Array, weight: Weight, dims: _Dims) -> _Rows:
        view = weight.view
        return cls(view.atoms(dims.w_batch), view.atoms(dims.w_contract), view.atoms(dims.w_free), x, dims)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return tuple(self.x_shape[i] for i in self.dims.x_batch)

    def x_to_matrix(self, x: Array) -> Array:
        d, lead = self.dims, len(self.dims.x_batch)
        x = x.transpose((*d.x_batch, *d.x_free, *d.x_contract))
        x = x.reshape(*self.batch_shape, self.rows, *(atom.size for atom in self.contracted))
        return to_original(x, lead + 1, self.contracted)

    def y_to_matrix(self, y: Array) -> Array:
        lead, n_free = len(self.batch_shape), len(self.free_shape)
        if self.dims.weight_first:
            y = jnp.moveaxis(y, range(y.ndim - n_free, y.ndim), range(lead, lead + n_free))
        self.w_free_shape = y.shape[lead + n_free :]
        y = y.reshape(*self.batch_shape, self.rows, *(atom.size for atom in self.output))
        return to_original(y, lead + 1, self.output)

    def y_from_matrix(self, m: Array) -> Array:
        lead, n_free = len(self.batch_shape), len(self.free_shape)
        y = from_original(m, lead + 1, self.output)
        y = y.reshape(*self.batch_shape, *self.free_shape, *self.w_free_shape)
        if self.dims.weight_first:
            y = jnp.moveaxis(y, range(lead, lead + n_free), range(y.ndim - n_free, y.ndim))
        return y


def gather(program: Program, eqn: JaxprEqn, values: Sequence[Any]) -> Outs:
    """Rows of an embedding, `E[ids]`."""
    weight, *rest = values
    if not is_weight(weight) or any(map(is_weight, rest)):
        return None
    if not _takes_rows(eqn, weight):
        return None
    use = Use(weight.path, "gather", "lookup", view=weight.view, roles=((0,), (1,), ()))
    if program.watch:
        program.uses.append(use)
        return bind(eqn, [weight.value, *rest])
    kernel, methods = weight.kernel, [METHODS[branch.method] for branch in weight.branches]
    rows_contracted = covers(weight.view.atoms((0,)), kernel.contracted, kernel.shape)
    if weight.batch or not weight.is_whole or not rows_contracted or not all(m.lookup for m in methods):
        return None
    program.uses.append(use)
    return [_looked_up(eqn, weight, rest)]


def _takes_rows(eqn: JaxprEqn, weight: Weight) -> bool:
    numbers, sizes = eqn.params["dimension_numbers"], tuple(eqn.params["slice_sizes"])
    return (
        weight.value.ndim == 2
        and sizes == (1, weight.value.shape[1])
        and tuple(numbers.collapsed_slice_dims) == (0,)
        and tuple(numbers.start_index_map) == (0,)
        and tuple(numbers.offset_dims) == (eqn.outvars[0].aval.ndim - 1,)  # pyright: ignore[reportAttributeAccessIssue]
    )


def _looked_up(eqn: JaxprEqn, weight: Weight, rest: Sequence[Any]) -> Array:
    def take(rows: Array) -> Array:
        params = eqn.params | {"slice_sizes": (1, rows.shape[1])}
        return eqn.primitive.bind(rows, *rest, **params)

    out = take(weight.value)
    for branch in weight.branches:
        lookup = METHODS[branch.method].lookup
        if branch.use in (None, "lookup") and lookup is not None:
            out = out + lookup(take, branch.leaves).astype(out.dtype)
    return out


def conv_general_dilated(program: Program, eqn: JaxprEqn, values: Sequence[Any]) -> Outs:
    """A convolution: A is a convolution into r channels with the base's window, B a pointwise one."""
    x, weight = values
    if is_weight(x):
        return None
    out_dim, in_dim, *window = eqn.params["dimension_numbers"].rhs_spec
    groups = eqn.params["feature_group_count"]
    roles = ((*sorted(window), in_dim), (out_dim,), ())
    use = Use(weight.path, "conv_general_dilated", "conv", view=weight.view, roles=roles, groups=groups)
    if program.watch:
        program.uses.append(use)
        return [Result(bind(eqn, [x, weight.value])[0], weight.path)]
    if groups != 1 or eqn.params["batch_group_count"] != 1 or not _fits_conv(weight, roles):
        return None
    program.uses.append(use)
    out = bind(eqn, [x, weight.value])[0]
    for branch in weight.branches:
        out = out + _convolved(program, eqn, x, weight, branch, roles).astype(out.dtype)
    return [out]


def _fits_conv(weight: Weight, roles: Roles) -> bool:
    known = all(METHODS[branch.method].lookup for branch in weight.branches)
    whole = weight.is_whole and not weight.batch
    return known and whole and covers(weight.view.atoms(roles[0]), weight.kernel.contracted, weight.kernel.shape)


def _convolved(program: Program, eqn: JaxprEqn, x: Array, weight: Weight, branch: Branch, roles: Roles) -> Array:
    """What a branch adds: a convolution with A laid out as the kernel is, r for its output, then the method's rest."""
    method, (contracted, (out_dim,), _) = METHODS[branch.method], roles
    assert method.lookup is not None
    feature = eqn.params["dimension_numbers"].out_spec[1]
    order = (out_dim, *contracted)
    x = _dropout(program, x, branch)

    def take(a: Array) -> Array:
        window = from_original(a.mT, 1, weight.view.atoms(contracted))
        window = window.reshape(a.shape[1], *(weight.value.shape[i] for i in contracted))
        kernel = window.transpose(tuple(order.index(i) for i in range(len(order))))
        params = eqn.params | {"preferred_element_type": None}
        return jnp.moveaxis(eqn.primitive.bind(x.astype(a.dtype), kernel, **params), feature, -1)

    y, bias = method.lookup(take, branch.leaves), method.bias(branch.leaves)
    return jnp.moveaxis(y if bias is None else y + bias.reshape(*[1] * (y.ndim - 1), -1), -1, feature)
