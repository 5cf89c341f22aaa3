"""A tap on a function: what goes into each adapted weight, reduced to sums on the spot.

The function's program is evaluated as `lift` does it, with a sink in the place of each adapter. A sink changes nothing,
and its gradient is defined to be the statistic of its weight's input:

    probe(x, sink) = x,    ∂/∂sink := statistic(x)

Reverse-mode autodiff adds up the gradients over every use, every turn of a scan and every slice of a stack, under jit
and remat, so that nothing larger than the sums leaves the program and no place in the model needs to be known. The cost
is that of a forward pass and a backward pass through activations.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import JaxprEqn

from jpeft.errors import KernelError, LiftError
from jpeft.lift import run
from jpeft.rewrite.program import Program, Use, bind
from jpeft.rewrite.rows import Dims, Rows
from jpeft.rewrite.weight import Weight, is_weight
from jpeft.view import covers

Sums = dict[str, Array]
Measured = Mapping[str, Sums]
Statistic = Callable[[Array, Array], Sums]
Measure = Callable[[Array, Array | None], Sums]


def moments(x: Array, keep: Array) -> Sums:
    """`gram` Xᵀ X, `sum` Xᵀ 1 and `count` of the rows of x (rows, in) that `keep` (rows,) tells: what `eva` needs."""
    x = jnp.where(keep[:, None], x, 0)
    return {"gram": _gram(x), "sum": x.sum(0), "count": keep.sum(dtype=x.dtype)}


def scaled_gram(x: Array, keep: Array) -> Sums:
    """`gram` Xᵀ X / max(X)² and `calls` 1: what `corda` needs. Each use counts alike, however large its inputs."""
    largest = jnp.where(keep[:, None], x, -jnp.inf).max()
    return {"gram": _gram(jnp.where(keep[:, None], x, 0) / largest), "calls": jnp.ones((), x.dtype)}


def _gram(x: Array) -> Array:
    return jnp.matmul(x.T, x, precision="highest")


def tap(
    fn: Callable[..., Any], statistic: Statistic = moments, *, rows: Callable[..., Array] | None = None
) -> Callable[..., dict[str, Sums]]:
    """A function of the same arguments as `fn` that returns `statistic` of what goes into each adapted weight, by path.

    Args:
      fn: a pure function; weights with an adapter attached may be anywhere in its arguments. It runs with the base
        weights: what the adapter does plays no part. Inputs are seen where the function's results depend on them, by
        reverse-mode autodiff: not behind a `stop_gradient`, not inside a `while` loop.
      statistic: `(x, keep) -> sums` of one use's input, x (rows, in) in fp32 and keep (rows,) of bools; arrays whose
        shape does not depend on the number of rows. Added up over uses. `moments` or `scaled_gram`, or your own.
      rows: a function of the same arguments that tells which tokens count, an array of as many bools as there are rows
        (an attention mask); all of them if None.

    Raises (the function returned):
      LiftError: nothing is attached, or an attached weight is in no product (an embedding that is only looked up).
      KernelError: `rows` gives another number of tokens than a weight sees.

    Example:
      >>> import jpeft
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=1), params)
      >>> measured = tap(lambda p, x: x @ p["kernel"])(jpeft.attach(params, adapter), jnp.array([[1.0, 2.0]]))
      >>> measured["kernel"]["gram"]
      Array([[1., 2.],
             [2., 4.]], dtype=float32)
    """
    return Tap(fn, statistic, rows)


@dataclass(frozen=True)
class Tap:
    """What `tap` returns."""

    fn: Callable[..., Any]
    statistic: Statistic
    rows: Callable[..., Array] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Sums]:
        """The statistics by path."""
        keep = None if self.rows is None else jnp.asarray(self.rows(*args, **kwargs)).astype(bool)
        given = [leaf for leaf in jax.tree.leaves((args, kwargs), is_leaf=is_weight) if is_weight(leaf)]
        if not given:
            raise LiftError("nothing to tap: attach an adapter first, tapped(jpeft.attach(params, adapter), ...)")
        sinks = {weight.path: _sinks(self.statistic, weight) for weight in given}
        program = _Tapping(statistic=self.statistic, keep=keep)

        def forward(sinks: dict[str, Sums]) -> list[Array]:
            new_args, new_kwargs = jax.tree.map(partial(_with_sink, sinks), (args, kwargs), is_leaf=is_weight)
            outs = jax.tree.leaves(run(self.fn, program, new_args, new_kwargs))
            return [out for out in outs if jnp.issubdtype(jnp.result_type(out), jnp.floating)]

        outs, pull = jax.vjp(forward, sinks)
        _check_tapped(program, sinks)
        return pull([jnp.zeros_like(out) for out in outs])[0]


@dataclass(frozen=True)
class Stream:
    """Statistics of one batch after another, measured anew each time it is gone through: what `eva` takes.

    Attributes:
      tapped: of `tap`, perhaps under `jax.jit`.
      params: with the adapter attached.
      batches: the other arguments of each call, as a tuple; gone through as often as need be.
    """

    tapped: Callable[..., Measured]
    params: Any
    batches: Iterable[Sequence[Any]]

    def __iter__(self) -> Iterator[Measured]:
        """One batch after another."""
        return (self.tapped(self.params, *batch) for batch in self.batches)


def total(stream: Iterable[Measured]) -> Measured:
    """The sums over all batches.

    Example:
      >>> total([{"kernel": {"count": jnp.ones(())}}] * 3)
      {'kernel': {'count': Array(3., dtype=float32)}}
    """
    return reduce(partial(jax.tree.map, operator.add), stream)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Sink:
    """What rides beside a weight in the place of its adapters: each sum with the weight's batch axes in front."""

    sums: Sums
    dropout_key: None = field(default=None, metadata={"static": True})


def _sinks(statistic: Statistic, weight: Weight) -> Sums:
    kernel = weight.kernel
    x, keep = jax.ShapeDtypeStruct((1, kernel.fan_in), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.bool_)
    shapes = jax.eval_shape(statistic, x, keep)
    return {name: jnp.zeros((*kernel.batch_shape, *shape.shape), shape.dtype) for name, shape in shapes.items()}


def _with_sink(sinks: dict[str, Sums], leaf: Any) -> Any:
    return replace(leaf, branches=(_Sink(sinks[leaf.path]),)) if is_weight(leaf) else leaf


def _check_tapped(program: _Tapping, sinks: Mapping[str, Any]) -> None:
    for path in sorted(sinks.keys() - program.tapped):
        how = ", ".join(dict.fromkeys(use.equation for use in program.uses if use.path == path))
        raise LiftError(f"{path!r} meets no product that its inputs could be read from: {how}; leave it out (exclude=)")


@dataclass
class _Tapping(Program):
    """An evaluation on the base weights that probes the other side of every product."""

    statistic: Statistic = moments
    keep: Array | None = None
    tapped: set[str] = field(default_factory=set)

    def rewrite(self, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
        """Products are probed, other operations re-bound."""
        match eqn.primitive.name:
            case "dot_general":
                return self._probed(eqn, values)
            case "gather" | "conv_general_dilated":
                return self.dense(eqn, values, "not a product")
            case _:
                return super().rewrite(eqn, values)

    def as_array(self, value: Any, equation: str, why: str, biased: bool = False) -> Any:
        """The base weight."""
        del biased
        if not is_weight(value):
            return value
        self.uses.append(Use(value.path, equation, "dense", why))
        return value.value

    def _probed(self, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
        side = 0 if is_weight(values[0]) else 1
        weight, x = values[side], values[1 - side]
        if is_weight(x):
            return self.dense(eqn, values, "a product of two adapted weights")
        dims = Dims.of(eqn.params["dimension_numbers"], side, x.ndim, weight.value.ndim)
        if not _fits(weight, dims):
            return self.dense(eqn, values, "the product contracts other axes than the adapter's")
        self.uses.append(Use(weight.path, "dot_general", "product", view=weight.view, roles=dims.roles))
        self.tapped.add(weight.path)
        sums = _sums(weight)
        measure = self._measure(weight, Rows.of(x, weight, dims), {name: leaf.shape for name, leaf in sums.items()})
        x = _probe(measure, x, sums, self.keep)
        return bind(eqn, [x, weight.value][:: 1 if side else -1])

    def _measure(self, weight: Weight, rows: Rows, shapes: Mapping[str, tuple[int, ...]]) -> Measure:
        """The statistic of an input that comes in the equation's own axes."""

        def measure(x: Array, keep: Array | None) -> Sums:
            m = rows.x_to_matrix(x).astype(jnp.float32)
            found = _over_batch(self.statistic, m.ndim - 2)(m, _kept(keep, m.shape[-2], weight.path))
            return {name: found[name].reshape(shape) for name, shape in shapes.items()}

        return measure


def _sums(weight: Weight) -> Sums:
    sink: Any = weight.branches[0]
    return sink.sums


def _fits(weight: Weight, dims: Dims) -> bool:
    view, kernel = weight.view, weight.kernel
    batch = [atom.axis for atom in view.atoms(dims.w_batch) if atom.size > 1]
    own = [axis for axis in weight.batch if kernel.shape[axis] > 1]
    whole = weight.is_whole and covers(view.atoms(dims.w_contract), kernel.contracted, kernel.shape)
    return whole and batch == own


def _over_batch(statistic: Statistic, n: int) -> Statistic:
    for _ in range(n):
        statistic = jax.vmap(statistic, in_axes=(0, None))
    return statistic


def _kept(keep: Array | None, rows: int, path: str) -> Array:
    if keep is None:
        return jnp.ones((rows,), bool)
    if keep.size != rows:
        raise KernelError(f"{path!r} sees {rows} rows, and rows= tells of {keep.size}")
    return keep.reshape(rows)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _probe(measure: Measure, x: Array, sums: Sums, keep: Array | None) -> Array:
    """`x` as it is; the gradient of `sums` is what `measure` makes of it."""
    return x


def _probe_forward(measure: Any, x: Array, sums: Sums, keep: Array | None) -> tuple[Array, tuple[Array, Any]]:
    return x, (x, keep)


def _probe_backward(measure: Any, saved: tuple[Array, Any], g: Array) -> tuple[Array, Sums, None]:
    x, keep = saved
    return g, measure(x, keep), None


_probe.defvjp(_probe_forward, _probe_backward)
