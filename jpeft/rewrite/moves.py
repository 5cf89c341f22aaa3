"""Rules for what moves a weight without changing its values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from jpeft.rewrite.program import Program, bind
from jpeft.rewrite.weight import Branch, Weight, is_weight
from jpeft.view import View

Outs = Sequence[Any] | None


def _moved(eqn: JaxprEqn, values: Sequence[Any], view: View | None) -> Outs:
    """The equation on the base, and the new view; the branches come along as they are."""
    weight = values[0]
    if view is None or not is_weight(weight) or any(map(is_weight, values[1:])):
        return None
    moved = weight.moved(bind(eqn, [weight.value, *values[1:]])[0], view)
    return [moved]


def transpose(program: Program, eqn: JaxprEqn, values: Sequence[Any]) -> Outs:
    """Other order, same weight."""
    return _moved(eqn, values, values[0].view.transpose(eqn.params["permutation"]))


def reshape(program: Program, eqn: JaxprEqn, values: Sequence[Any]) -> Outs:
    """Axes split or joined."""
    if eqn.params.get("dimensions") is not None:
        return None
    return _moved(eqn, values, values[0].view.reshape(tuple(eqn.params["new_sizes"])))


def squeeze(program: Program, eqn: JaxprEqn, values: Sequence[Any]) -> Outs:
    """Dimensions of size one go; where one was a batch axis (a stack of one layer), it has been consumed."""
    weight, dimensions = values[0], eqn.params["dimensions"]
    for atom in weight.view.atoms(dimensions):
        if atom.axis in weight.batch:
            weight = take_batch(weight, atom.axis, 0)
    return _moved(eqn, [weight], weight.view.drop(dimensions))


def broadcast_in_dim(program: Program, eqn: JaxprEqn, values: Sequence[Any]) -> Outs:
    """Only new dimensions of size one keep a weight a weight."""
    shape, kept = eqn.params["shape"], tuple(eqn.params["broadcast_dimensions"])
    if not is_weight(values[0]) or len(values) > 1:
        return None
    old = dict(zip(kept, values[0].value.shape, strict=True))
    exact = all(size == old.get(i, 1) for i, size in enumerate(shape))
    return _moved(eqn, values, values[0].view.insert(len(shape), kept)) if exact else None


def convert_element_type(program: Program, eqn: JaxprEqn, values: Sequence[Any]) -> Outs:
    """A cast of the base; the branch keeps its own precision."""
    floating = jnp.issubdtype(eqn.params["new_dtype"], jnp.floating)
    return _moved(eqn, values, values[0].view) if floating else None


def unchanged(program: Program, eqn: JaxprEqn, values: Sequence[Any]) -> Outs:
    """A name, a copy, a sharding: the base gets it, the branches need none."""
    return _moved(eqn, values, values[0].view) if len(values) == 1 else None


def pvary(program: Program, eqn: JaxprEqn, values: Sequence[Any]) -> Outs:
    """Under `shard_map`: from here on the weight, and so its branches, count as different on each device."""
    weight: Weight = values[0]
    vary = lambda leaf: bind(eqn, [leaf])[0]
    return [_map_branches(weight, vary, weight.batch).moved(vary(weight.value), weight.view)]


def barrier(program: Program, eqn: JaxprEqn, values: Sequence[Any]) -> Outs:
    """Several values held together, weights among them."""
    outs = bind(eqn, [v.value if is_weight(v) else v for v in values])
    return [v.moved(out, v.view) if is_weight(v) else out for v, out in zip(values, outs, strict=True)]


def slice_(program: Program, eqn: JaxprEqn, values: Sequence[Any]) -> Outs:
    """`stack[i]` of stacked layers: one slice along batch axes, everything else whole."""
    weight, starts, limits = values[0], eqn.params["start_indices"], eqn.params["limit_indices"]
    if eqn.params["strides"] is not None:
        return None
    cut = [i for i, size in enumerate(weight.value.shape) if limits[i] - starts[i] != size]
    if any(limits[i] - starts[i] != 1 for i in cut):
        return None
    return _cut(eqn, values, {i: starts[i] for i in cut})


def dynamic_slice(program: Program, eqn: JaxprEqn, values: Sequence[Any]) -> Outs:
    """`stack[i]` where `i` is only known when the program runs."""
    weight, *starts = values
    if not is_weight(weight) or any(map(is_weight, starts)):
        return None
    sizes = eqn.params["slice_sizes"]
    cut = [i for i, size in enumerate(weight.value.shape) if sizes[i] != size]
    if any(sizes[i] != 1 for i in cut):
        return None
    return _cut(eqn, values, {i: starts[i] for i in cut})


def _cut(eqn: JaxprEqn, values: Sequence[Any], index: dict[int, Any]) -> Outs:
    weight: Weight = values[0]
    axes = {dimension: batch_axis(weight, dimension) for dimension in index}
    if any(axis is None for axis in axes.values()):
        return None
    rest = weight
    for dimension, axis in axes.items():
        assert axis is not None
        rest = take_batch(rest, axis, index[dimension])
    view = View(tuple(() if i in index else dim for i, dim in enumerate(weight.view.dims)))
    return [rest.moved(bind(eqn, [weight.value, *values[1:]])[0], view)]


def batch_axis(weight: Weight, dimension: int) -> int | None:
    """The whole batch axis that a dimension of the view is, if it is one. A watched weight's axes are all possible."""
    dim = weight.view.dims[dimension]
    atoms = [atom for atom in dim if atom.size > 1] or list(dim[:1])
    if len(atoms) != 1 or atoms[0].size != weight.kernel.shape[atoms[0].axis]:
        return None
    return atoms[0].axis if atoms[0].axis in weight.batch or not weight.branches else None


def take_batch(weight: Weight, axis: int, index: Any) -> Weight:
    """The weight's branches at one index of a batch axis."""
    if not weight.branches:
        return weight
    position = weight.batch.index(axis)
    take = lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, position, keepdims=False)
    return _map_branches(weight, take, tuple(a for a in weight.batch if a != axis))


def lead_batch(weight: Weight, axis: int) -> list[Branch]:
    """The branches with a batch axis moved to the front of every leaf, to be scanned over."""
    position = weight.batch.index(axis)
    return list(_map_branches(weight, lambda leaf: jnp.moveaxis(leaf, position, 0), weight.batch).branches)


def _map_branches(weight: Weight, function: Any, batch: tuple[int, ...]) -> Weight:
    branches: tuple[Branch, ...] = jax.tree.map(function, weight.branches)
    return weight.with_branches(branches, batch)
