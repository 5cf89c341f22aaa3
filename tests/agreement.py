"""The comparison that the fast path has to pass: values and every gradient a caller can ask for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jpeft
import zoo
from zoo import Case

TOLERANCE = 1e-5
QUICK = {"xla_backend_optimization_level": 0}  # to compile, where speed and the compiler's own ways do not matter


def perturbed(adapter: jpeft.Adapter, seed: int = 1, scale: float = 0.3) -> jpeft.Adapter:
    """The adapter as if trained: no factor is zero."""
    draw = drawing(seed, scale)
    return adapter.replace(trained=jax.tree.map(lambda leaf: draw(leaf, np.asarray(leaf, np.float32)), adapter.trained))


def drawing(seed: int, scale: float = 0.3) -> Callable[..., Any]:
    rng = np.random.default_rng(seed)
    return lambda leaf, mean=0: jnp.asarray((mean + scale * rng.standard_normal(leaf.shape)).astype(leaf.dtype))


def adapter_for(case: Case, seed: int = 1, dtype: Any = jnp.float32, **options: Any) -> jpeft.Adapter:
    """A trained adapter of every kernel of a case, drawn by numpy: `init` would be compiled each time."""
    spec = jpeft.LoRA(**{"rank": 2, "alpha": 3, "targets": ".*", **options})
    new = lambda: jpeft.init(jax.random.key(0), spec, case.params, kernels=case.adapted, dtype=dtype)
    shapes = jax.eval_shape(new)
    trained = jax.tree.map(drawing(seed), shapes.trained)
    return shapes.replace(trained=trained, constant=jax.jit(lambda: new().constant)())


def is_floating(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def outputs_and_gradients(
    run: Callable[[Any, Any, Any], Any], trained: Any, params: Any, x: Any, reverse: bool = True, options: Any = None
) -> tuple[Any, Any]:
    """`run(trained, params, x)` and the gradients of a random functional of it, to all three, in one program."""
    leaves, tree = jax.tree.flatten((trained, params, x))
    chosen = [i for i, leaf in enumerate(leaves) if is_floating(leaf)]

    def function(floating: list[Any]) -> Any:
        new = dict(zip(chosen, floating, strict=True))
        return run(*jax.tree.unflatten(tree, [new.get(i, leaf) for i, leaf in enumerate(leaves)]))

    def scalar(floating: list[Any]) -> tuple[Any, Any]:
        out = function(floating)
        rng = np.random.default_rng(0)
        return sum(
            (leaf * rng.standard_normal(leaf.shape).astype(leaf.dtype)).sum() for leaf in jax.tree.leaves(out)
        ), out

    floating = [leaves[i] for i in chosen]
    if not reverse:
        return jax.jit(function, compiler_options=options)(floating), None
    gradients, out = jax.jit(jax.grad(scalar, has_aux=True), compiler_options=options)(floating)
    back = dict(zip(chosen, gradients, strict=True))
    return out, jax.tree.unflatten(tree, [back.get(i) for i in range(len(leaves))])


def functional(out: Any) -> Any:
    """A random linear functional of the outputs, always the same."""
    rng = np.random.default_rng(0)
    return sum((leaf * rng.standard_normal(leaf.shape).astype(leaf.dtype)).sum() for leaf in jax.tree.leaves(out))


def assert_close(found: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    """max |found - expected| <= tolerance * max |expected|, leaf by leaf, and no expected leaf is zero."""
    pairs = jax.tree_util.tree_leaves_with_path(expected)
    for (path, want), got in zip(pairs, jax.tree.leaves(found), strict=True):
        where = jax.tree_util.keystr(path)
        want, got = np.asarray(want, np.float32), np.asarray(got, np.float32)
        assert got.shape == want.shape, where
        if want.size:
            error, size = np.abs(got - want).max(), np.abs(want).max()
            assert error <= tolerance * size, f"{where}: off by {error:.2e} of {size:.2e}"


def by_definition(case: Case, adapter: jpeft.Adapter) -> Callable[[Any, Any, Any], Any]:
    return lambda trained, params, x: case.fn(jpeft.apply(params, adapter.replace(trained=trained)), x)


def by_fast_path(case: Case, adapter: jpeft.Adapter, **options: Any) -> Callable[[Any, Any, Any], Any]:
    lifted = jpeft.lift(in_default_promotion(case.fn), **options)
    return lambda trained, params, x: lifted(jpeft.attach(params, adapter.replace(trained=trained)), x)


def in_default_promotion(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The model's own code under JAX's usual promotion, whatever holds around it."""

    def usual(*args: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return fn(*args)

    return usual


@cache
def reference(name: str) -> tuple[Any, Any]:
    """Outputs and gradients of a case and its adapter by the definition."""
    case = zoo.get(name)
    adapter = adapter_for(case)
    run = by_definition(case, adapter)
    return outputs_and_gradients(run, adapter.trained, case.params, case.x, case.reverse, QUICK)


def check(name: str, **options: Any) -> None:
    """The fast path of a case against its definition, with no implicit promotion in jpeft's own code."""
    case = zoo.get(name)
    adapter = adapter_for(case)
    expected, gradients = reference(name)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        run = by_fast_path(case, adapter, **options)
        found, found_gradients = outputs_and_gradients(run, adapter.trained, case.params, case.x, case.reverse)
    assert_close(found, expected)
    if case.reverse:
        assert_close(found_gradients, gradients)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients[0]):
            assert np.abs(leaf).max() > 0, f"no gradient for {jax.tree_util.keystr(path)}"


def agree(case: Case, adapter: jpeft.Adapter) -> None:
    """The fast path of any adapter of a case against the definition: values, and every gradient."""
    args = adapter.trained, case.params, case.x
    expected = outputs_and_gradients(by_definition(case, adapter), *args, options=QUICK)
    assert_close(outputs_and_gradients(by_fast_path(case, adapter), *args), expected)
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected[1][0]):
        assert not leaf.size or np.abs(leaf).max() > 0, f"no gradient for {jax.tree_util.keystr(path)}"
