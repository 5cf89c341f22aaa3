"""Rules for where a weight meets the activations: the method's product in place of the dense one.

The base's own equation is re-bound as it was. The branch runs on matrices: x as (*batch, rows, in), y as
(*batch, rows, out); the reshapes around it are free in the usual layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import JaxprEqn, Primitive

from jpeft.gates import aligned
from jpeft.kernel import wide
from jpeft.method import Meeting, Method, Weights, for_rows
from jpeft.methods import METHODS
from jpeft.rewrite.explicit import ending_where
from jpeft.rewrite.program import Program, Result, Use, bind
from jpeft.rewrite.rows import Dims, Roles, Rows
from jpeft.rewrite.weight import Branch, Weight, fold_in, is_weight, over_keys
from jpeft.together import summed
from jpeft.view import Atom, covers, from_original, last_from_original, last_to_original
from jpeft.whole import for_cpu

Outs = Sequence[Any] | None
Met = Sequence[tuple[Branch, Meeting]]
Summed = Callable[[Array, Array, Weights, Sequence[Branch]], Array]


def dot_general(program: Program, eqn: JaxprEqn, values: Sequence[Any]) -> Outs:
    """y = x · W over any axes, W on either side."""
    side = 0 if is_weight(values[0]) else 1
    weight, x = values[side], values[1 - side]
    if is_weight(x):
        return program.dense(eqn, values, "a product of two adapted weights")
    dims = Dims.of(eqn.params["dimension_numbers"], side, x.ndim, weight.value.ndim)
    use = Use(weight.path, "dot_general", "product", view=weight.view, shape=weight.kernel.shape, roles=dims.roles)
    if program.watch:
        program.uses.append(use)
        return [Result(bind(eqn, [x, weight.value][:: 1 if side else -1])[0], weight.path)]
    if _oriented(weight, dims)[0] is None:
        return _dense(program, eqn, values, weight, dims)
    program.uses.append(use)
    # Traced once for all the layers that are alike: what a layer is called matters to nothing but an error's text.
    alike = weight if any(branch.gates is not None for branch in weight.branches) else replace(weight, path="")
    equation = _Equation(eqn.primitive, tuple(sorted(eqn.params.items())), side)
    number = jnp.int32(len(program.uses)) if weight.drops else None
    return [_adapted(x, alike, number, equation=equation, forward_mode=program.forward_mode)]


def _dense(program: Program, eqn: JaxprEqn, values: Sequence[Any], weight: Weight, dims: Dims) -> Sequence[Any]:
    """Bind the product to the adapted weight itself, and add what its methods add to the layer's result."""
    own = oriented(weight, dims, lambda method: True)
    if own is None or own.kernel != weight.kernel:
        return program.dense(eqn, values, "the product contracts other axes than the adapter's")
    plain = [program.as_array(v, "dot_general", "its method has no product", biased=True) for v in values]
    y = bind(eqn, plain)[0]
    if not any(branch.adds_bias for branch in own.branches):
        return [y]
    rows = Rows.of(next(v for v in values if not is_weight(v)), weight, dims)
    return [rows.y_from_matrix(_with_biases(rows.y_to_matrix(y), batched(own, rows.batch_shape)))]


def _with_biases(y: Array, branches: Sequence[Branch]) -> Array:
    """Add each method's bias to rows (*batch, rows, out) that are scaled already, so each is scaled, too."""
    acts = [(METHODS[branch.method], branch.leaves) for branch in branches]
    found = [wide(bias) for method, leaves in acts if (bias := method.bias(leaves)) is not None]
    total = sum(found[1:], found[0])
    for scales in (method.scales(leaves) for method, leaves in acts if method.scales is not None):
        total = total if scales.out is None else total * wide(scales.out)
    return y + for_rows(total, y).astype(y.dtype)


@dataclass(frozen=True)
class _Equation:
    """A `dot_general`, told by what it does: its parameters, and which operand is the weight."""

    primitive: Primitive
    params: tuple[tuple[str, Any], ...]
    side: int

    def dims(self, x: Array, weight: Weight) -> Dims:
        """Of this product."""
        return Dims.of(dict(self.params)["dimension_numbers"], self.side, x.ndim, weight.value.ndim)

    @property
    def placed_by_compiler(self) -> _Equation:
        """The same, that says nothing of how its result is split over devices."""
        return replace(self, params=tuple((name, None if name == "out_sharding" else p) for name, p in self.params))

    def bind(self, x: Array, w: Array) -> Array:
        """The product itself."""
        return self.primitive.bind(*[x, w][:: 1 if self.side else -1], **dict(self.params))


@partial(jax.jit, static_argnames=("equation", "forward_mode"))
def _adapted(x: Array, weight: Weight, number: Array | None, *, equation: _Equation, forward_mode: bool) -> Array:
    """The equation with the weight's branches beside it; `number` is that of the use, for its dropout."""
    frozen = lambda x, weight, number: equation.bind(x, weight.value)
    beside = partial(_beside, equation=equation.placed_by_compiler, forward_mode=forward_mode)
    return ending_where(frozen, beside, x, weight, number)


def _beside(x: Array, weight: Weight, number: Array | None, *, equation: _Equation, forward_mode: bool) -> Array:
    dims, base = equation.dims(x, weight), lambda x: equation.bind(x, weight.value)
    adapted, out = _oriented(weight, dims)
    assert adapted is not None
    summed = partial(_summed, number=number, forward_mode=forward_mode)
    if out:
        return _product_for_all(summed, x, base, adapted, dims, out)
    return _product(summed, x, base, adapted, dims)


def _oriented(weight: Weight, dims: Dims) -> tuple[Weight | None, tuple[int, ...]]:
    """`oriented`, and the batch axes that come out of the product; none where the base's own input is scaled."""
    has_product = lambda method: method.product is not None
    if out := _batch_put_out(weight, dims):
        adapted = oriented(weight, dims.with_batch(out), has_product)
        if adapted is not None and not any(map(_scales_input, adapted.branches)):
            return adapted, out
    return oriented(weight, dims, has_product), ()


def _batch_put_out(weight: Weight, dims: Dims) -> tuple[int, ...]:
    """The weight's dimensions that are batch axes of the adapter and come out of the product: all experts, all rows."""
    is_batch = lambda dim: all(atom.axis in weight.batch for atom in weight.view.dims[dim])
    return tuple(dim for dim in dims.w_free if weight.value.shape[dim] > 1 and is_batch(dim))


def _scales_input(branch: Branch) -> bool:
    scales = METHODS[branch.method].scales
    return scales is not None and scales(branch.leaves).in_ is not None


def _product_for_all(
    summed: Summed, x: Array, base: Callable[[Array], Array], weight: Weight, dims: Dims, out: tuple[int, ...]
) -> Array:
    """The product with the input repeated along what comes out, so that it counts as a batch axis; the base's stays."""
    order = dims.result_order(out)
    back = tuple(order.index(axis) for axis in range(len(order)))
    repeated = jnp.broadcast_to(x, (*(weight.value.shape[dim] for dim in out), *x.shape))
    turned = lambda _: base(x).transpose(order)
    return _product(summed, repeated, turned, weight, dims.with_batch(out)).transpose(back)


def oriented(weight: Weight, dims: Dims, acts: Callable[[Method], bool]) -> Weight | None:
    """The weight as the product at hand has it: as it is, transposed for `x Wᵀ`, or None if neither fits.

    `acts` says which methods have a form for it, besides those that only scale.
    """
    view, kernel = weight.view, weight.kernel
    batch = view.atoms(dims.w_batch)
    if not weight.is_whole or [a.axis for a in batch if a.size > 1] != [a for a in weight.batch if kernel.shape[a] > 1]:
        return None
    branches = tuple(branch for branch in weight.branches if branch.use in (None, "product"))
    methods = [METHODS[branch.method] for branch in branches]
    contracted = view.atoms(dims.w_contract)
    if not all(acts(method) or method.scales for method in methods):
        return None
    if covers(contracted, kernel.contracted, kernel.shape):
        unclear = kernel.fan_in == 1 and covers(contracted, kernel.output, kernel.shape)
        return None if unclear else replace(weight, branches=branches)
    return _transposed(weight, branches) if covers(contracted, kernel.output, kernel.shape) else None


def _transposed(weight: Weight, branches: Sequence[Branch]) -> Weight | None:
    """Wᵀ and its adapters; None where a method has no such form, or adds to the result, which is the layer's own."""
    turned = [_on_transposed(branch) for branch in branches]
    kernel = replace(weight.kernel, contracted=weight.kernel.output, output=weight.kernel.contracted)
    known = tuple(branch for branch in turned if branch is not None)
    return replace(weight, branches=known, kernel=kernel) if len(known) == len(turned) else None


def _on_transposed(branch: Branch) -> Branch | None:
    method = METHODS[branch.method]
    if method.transposed is None or branch.adds_bias:
        return None
    leaves = method.transposed(branch.leaves)
    return None if leaves is None else replace(branch, leaves=leaves)


def _product(summed: Summed, x: Array, base: Callable[[Array], Array], weight: Weight, dims: Dims) -> Array:
    """The methods' product on matrices, put back where the equation has its result."""
    rows = Rows.of(x, weight, dims, join=for_cpu())  # whose library takes matrices alone
    branches = [_with_gates(branch, rows, weight.path) for branch in batched(weight, rows.batch_shape)]
    scales = [METHODS[b.method].scales(b.leaves) for b in branches if METHODS[b.method].scales]  # pyright: ignore
    matrix = rows.x_to_matrix(x)
    scaled = _scaled(matrix, [scale.in_ for scale in scales])
    out = rows.y_to_matrix(base(x if scaled is matrix else rows.x_from_matrix(scaled)))
    out = summed(scaled, out, matrices_of(weight, rows.batch_shape), branches)
    return rows.y_from_matrix(_scaled(out, [scale.out for scale in scales]))


def _scaled(rows: Array, factors: Sequence[Array | None]) -> Array:
    """Rows (*batch, rows, n) times each of the factors (*batch, n)."""
    for factor in factors:
        rows = rows if factor is None else (wide(rows) * for_rows(wide(factor), rows)).astype(rows.dtype)
    return rows


def _with_gates(branch: Branch, rows: Rows, path: str) -> Branch:
    """Gates join the leaves, (*batch, *rows, K)."""
    if branch.gates is None:
        return branch
    gates = aligned(branch.gates, len(rows.batch_shape), rows.free_shape, path)
    gates = gates.reshape(*rows.batch_shape, *rows.rows_shape, gates.shape[-1])
    return replace(branch, leaves=branch.leaves | {"gates": gates})


def matrices_of(weight: Weight, batch_shape: tuple[int, ...]) -> Weights:
    """The frozen weight as matrices (*batch, in, out), formed where they are asked for."""
    return lambda: weight.to_matrix(weight.value).reshape(*batch_shape, weight.kernel.fan_in, -1)


def batched(weight: Weight, batch_shape: tuple[int, ...]) -> tuple[Branch, ...]:
    """The branches with the product's batch axes, where a reshape has joined, added or dropped some (of size one)."""
    return jax.tree.map(lambda leaf: leaf.reshape(*batch_shape, *leaf.shape[len(weight.batch) :]), weight.branches)


def _summed(
    x: Array, y: Array, w: Weights, branches: Sequence[Branch], *, number: Array | None, forward_mode: bool
) -> Array:
    """The frozen product's result and what the branches make of it."""

    def act(branch: Branch, y: Array) -> Array:
        method, seen = METHODS[branch.method], dropped(number, x, branch)
        assert method.product is not None
        y = method.product(seen, y, w, branch.leaves, forward_mode=forward_mode)
        bias = method.bias(branch.leaves)
        return y if bias is None else y + for_rows(bias, y).astype(y.dtype)

    acts = [(METHODS[branch.method], partial(act, branch)) for branch in branches]
    return summed(y, [(method, act) for method, act in acts if method.product is not None])


def dropped(number: Any, x: Array, branch: Branch) -> Array:
    """Inverted dropout of the branch's input; another mask for each use of a shared weight, by the use's number."""
    if branch.dropout_key is None:
        return x
    key, keep = fold_in(branch.dropout_key, number), 1 - branch.dropout
    shape = x.shape[key.ndim :]
    kept = over_keys(lambda key: jax.random.bernoulli(key, keep, shape), key)
    return jnp.where(kept, x / keep, jnp.zeros((), x.dtype)).astype(x.dtype)


def gather(program: Program, eqn: JaxprEqn, values: Sequence[Any]) -> Outs:
    """Rows of an embedding, `E[ids]`."""
    weight, *rest = values
    if not is_weight(weight) or any(map(is_weight, rest)):
        return None
    if not _takes_rows(eqn, weight):
        return None
    use = Use(weight.path, "gather", "lookup", view=weight.view, shape=weight.kernel.shape, roles=((0,), (1,), ()))
    if program.watch:
        program.uses.append(use)
        return bind(eqn, [weight.value, *rest])
    branches = [branch for branch in weight.branches if branch.use in (None, "lookup")]
    rows_contracted = covers(weight.view.atoms((0,)), weight.kernel.contracted, weight.kernel.shape)
    if weight.batch or not weight.is_whole or not rows_contracted or not all(map(_looks_up, branches)):
        return None
    program.uses.append(use)

    def take(rows: Array) -> Array:
        params = eqn.params | {"slice_sizes": (1, rows.shape[1])}
        return eqn.primitive.bind(rows, *rest, **params)

    take_a = lambda a: take(last_from_original(a.T, weight.view.atoms((0,))).T)
    y = take(weight.value)
    met = [(branch, _meeting(take_a, y.ndim)) for branch in branches]
    return [_looked_up_in_order(weight, met, y, weight.view.atoms((1,)))]


def _looked_up_in_order(weight: Weight, met: Met, y: Array, output: list[Atom]) -> Array:
    """`looked_up` of a result whose features are in the order of `output`: methods have them in the weight's own."""
    return last_from_original(looked_up(weight, met, last_to_original(y, output), matrices_of(weight, ())), output)


def _looks_up(branch: Branch) -> bool:
    """Whether a branch can stay factored where there are no rows of a matrix: in a lookup, in a convolution."""
    method = METHODS[branch.method]
    return method.lookup is not None or (method.scales is not None and not _scales_input(branch))


def _takes_rows(eqn: JaxprEqn, weight: Weight) -> bool:
    numbers, sizes = eqn.params["dimension_numbers"], tuple(eqn.params["slice_sizes"])
    return (
        weight.value.ndim == 2
        and sizes == (1, weight.value.shape[1])
        and tuple(numbers.collapsed_slice_dims) == (0,)
        and tuple(numbers.start_index_map) == (0,)
        and tuple(numbers.offset_dims) == (eqn.outvars[0].aval.ndim - 1,)  # pyright: ignore[reportAttributeAccessIssue]
    )


def _meeting(take: Callable[[Array], Array], ndim: int) -> Meeting:
    """Of one matrix, with results of so many axes."""
    return Meeting(take, lambda h, b: h @ b, lambda v: v.reshape(*[1] * (ndim - 1), -1))


def looked_up(weight: Weight, met: Met, y: Array, w: Weights) -> Array:
    """What the frozen weight gives, (..., out), and what the branches make of it, each where it meets the input."""

    def act(branch: Branch, meeting: Meeting, y: Array) -> Array:
        method, leaves = METHODS[branch.method], branch.leaves
        assert method.lookup is not None
        if branch.gates is not None:
            leaves = leaves | {"gates": aligned(branch.gates, 0, y.shape[:-1], weight.path)}
        y, bias = method.lookup(meeting, y, w, leaves), method.bias(leaves)
        return y if bias is None else y + meeting.each(bias).astype(y.dtype)

    acts = [(METHODS[branch.method], partial(act, branch, meeting)) for branch, meeting in met]
    y = summed(y, [(method, act) for method, act in acts if method.lookup is not None])
    for branch, meeting in met:
        scales = METHODS[branch.method].scales
        out = scales(branch.leaves).out if scales is not None else None
        y = y if out is None else (wide(y) * wide(meeting.each(out))).astype(y.dtype)
    return y


def conv_general_dilated(program: Program, eqn: JaxprEqn, values: Sequence[Any]) -> Outs:
    """A convolution: A is a convolution into r channels with the base's window, B a pointwise one."""
    x, weight = values
    if is_weight(x):
        return None
    out_dim, in_dim, *window = eqn.params["dimension_numbers"].rhs_spec
    groups = eqn.params["feature_group_count"]
    roles = ((*sorted(window), in_dim), (out_dim,), ())
    use = Use(
        weight.path,
        "conv_general_dilated",
        "conv",
        view=weight.view,
        shape=weight.kernel.shape,
        roles=roles,
        groups=groups,
    )
    if program.watch:
        program.uses.append(use)
        return [Result(bind(eqn, [x, weight.value])[0], weight.path)]
    if groups != 1 or eqn.params["batch_group_count"] != 1 or not _fits_conv(weight, roles):
        return None
    program.uses.append(use)
    feature = eqn.params["dimension_numbers"].out_spec[1]
    take = lambda branch: _conv_take(dropped(len(program.uses), x, branch), eqn, weight, roles)
    met = [(branch, _meeting(take(branch), x.ndim)) for branch in weight.branches]
    out = jnp.moveaxis(bind(eqn, [x, weight.value])[0], feature, -1)
    return [jnp.moveaxis(_looked_up_in_order(weight, met, out, weight.view.atoms(roles[1])), -1, feature)]


def _fits_conv(weight: Weight, roles: Roles) -> bool:
    known = all(map(_looks_up, weight.branches))
    whole = weight.is_whole and not weight.batch
    return known and whole and covers(weight.view.atoms(roles[0]), weight.kernel.contracted, weight.kernel.shape)


def _conv_take(x: Array, eqn: JaxprEqn, weight: Weight, roles: Roles) -> Callable[[Array], Array]:
    """A convolution with A, laid out as the kernel is, r for its output; its features last."""
    contracted, (out_dim,), _ = roles
    feature = eqn.params["dimension_numbers"].out_spec[1]
    order = (out_dim, *contracted)

    def take(a: Array) -> Array:
        window = from_original(a.mT, 1, weight.view.atoms(contracted))
        window = window.reshape(a.shape[1], *(weight.value.shape[i] for i in contracted))
        kernel = window.transpose(tuple(order.index(i) for i in range(len(order))))
        params = eqn.params | {"preferred_element_type": None}
        return jnp.moveaxis(eqn.primitive.bind(x.astype(a.dtype), kernel, **params), feature, -1)

    return take
