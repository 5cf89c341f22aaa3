"""The fast path: a function of params, made to run adapted weights factored, without touching the model.

`lift` traces the function to a program, evaluates it equation by equation, and where an adapted weight meets the
activations does the method's product; what it has no rule for gets the dense weight, which is always right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import jax
import numpy as np

from jpeft.errors import LiftError
from jpeft.rewrite.program import Program, plain_outputs
from jpeft.rewrite.weight import is_weight
from jpeft.tree import nearest, nnx_type

F = TypeVar("F", bound=Callable[..., Any])


def lift(fn: F, *, forward_mode: bool = False) -> F:
    """`fn`, able to take params with adapters attached; the same signature and the same values as with `apply`.

    Args:
      fn: a pure function. Arguments that are not arrays (bool, str, int, None, callables) are static; an adapted weight
        may be anywhere in the others.
      forward_mode: keep `jax.jvp` and `jax.linearize` working, at a slightly dearer backward pass.

    Raises (the lifted function, when it is traced):
      LiftError: an adapted weight is never read; or an `nnx.Module` is passed.

    Example:
      >>> import jpeft, jax.numpy as jnp
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=1), params)
      >>> f = jpeft.lift(lambda params, x: x @ params["kernel"])
      >>> f(jpeft.attach(params, adapter), jnp.ones((1, 3))).shape
      (1, 2)
    """
    return cast(F, Lifted(fn, forward_mode))


@dataclass(frozen=True)
class Lifted:
    """What `lift` returns: called like `fn`. Two lifts of one function are equal, and share their compilations."""

    fn: Callable[..., Any]
    forward_mode: bool = False

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.fn  # where `inspect.signature` looks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`fn(*args, **kwargs)`, adapted weights factored."""
        return run(self.fn, Program(forward_mode=self.forward_mode), args, kwargs)


def run(fn: Callable[..., Any], program: Program, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """`fn(*args, **kwargs)` through `program`, which then holds what it saw."""
    leaves, tree = _flat_arguments(args, kwargs)
    weights = {leaf.path for leaf in leaves if is_weight(leaf)}
    if not weights:
        return fn(*args, **kwargs)
    outs, out_tree = evaluate(fn, program, leaves, tree)
    unread = sorted(weights - {use.path for use in program.uses})
    if unread:
        read = sorted({use.path for use in program.uses})
        raise LiftError(
            f"{len(unread)} adapted weights are never read by this function, {unread[0]!r} first; it reads "
            f"{nearest(unread[0], read)}. Leave them out with exclude=, or lift the function that reads them"
        )
    return jax.tree.unflatten(out_tree, plain_outputs(program, outs, "output"))


def evaluate(fn: Callable[..., Any], program: Program, leaves: list[Any], tree: Any) -> tuple[list[Any], Any]:
    """The flat outputs of the traced function on flat arguments, weights among them, and the outputs' tree."""
    is_input = [_is_input(leaf) for leaf in leaves]
    inputs = [leaf for leaf, given in zip(leaves, is_input, strict=True) if given]

    def flat(*arrays: Any) -> Any:
        rest = iter(arrays)
        merged = [next(rest) if given else leaf for leaf, given in zip(leaves, is_input, strict=True)]
        args, kwargs = jax.tree.unflatten(tree, merged)
        return fn(*args, **kwargs)

    closed, shape = jax.make_jaxpr(flat, return_shape=True)(*(v.value if is_weight(v) else v for v in inputs))
    outs = program.evaluate(closed.jaxpr, closed.consts, inputs)
    return outs, jax.tree.structure(shape)


def observe(
    fn: Callable[..., Any],
    program: Program,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    visit: Callable[[list[Any]], Any],
) -> list[Any]:
    """`evaluate` abstractly, for what `program` sees: nothing is computed. `visit` gets the outputs while they live.

    Returns the flat arguments.
    """
    leaves, tree = _flat_arguments(args, kwargs)

    def trace(inputs: list[Any]) -> None:
        rest = iter(inputs)
        visit(evaluate(fn, program, [next(rest) if _is_input(leaf) else leaf for leaf in leaves], tree)[0])

    jax.make_jaxpr(trace)([leaf for leaf in leaves if _is_input(leaf)])
    return leaves


def _is_input(leaf: Any) -> bool:
    return is_weight(leaf) or isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


def _flat_arguments(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    is_module = lambda x: isinstance(x, nnx_type("Module"))
    leaves, tree = jax.tree.flatten((tuple(args), kwargs), is_leaf=lambda x: is_weight(x) or is_module(x))
    for leaf in filter(is_module, leaves):
        raise LiftError(
            f"an nnx.Module ({type(leaf).__name__}) was passed to a lifted function; its state updates would be "
            "lost. Split it: graph, state = nnx.split(model), and lift lambda state, x: nnx.merge(graph, state)(x)"
        )
    return leaves, tree
