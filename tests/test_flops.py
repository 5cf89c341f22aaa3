"""What the fast path costs: the frozen model and the low-rank products, and nothing of the size of the base besides."""

import math

import jax
import jax.numpy as jnp
import pytest

import jpeft

N, D, R, LAYERS, EXPERTS = 256, 512, 8, 3, 4
X = jax.ShapeDtypeStruct((N, D), jnp.float32)


def unrolled(p, x):
    for name in sorted(p):
        x = x @ p[name]
    return x


def scanned(p, x):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, p["stack"])[0]


def remat(p, x):
    return jax.lax.scan(jax.checkpoint(lambda x, w: (x @ w, None)), x, p["stack"])[0]


def routed(p, x):
    """Rows sorted by expert."""
    for name in sorted(p):
        x = jax.lax.ragged_dot(x, p[name], jnp.full(EXPERTS, N // EXPERTS))
    return x


SHAPES = {
    unrolled: {f"w{i}": jax.ShapeDtypeStruct((D, D), jnp.float32) for i in range(LAYERS)},
    scanned: {"stack": jax.ShapeDtypeStruct((LAYERS, D, D), jnp.float32)},
    remat: {"stack": jax.ShapeDtypeStruct((LAYERS, D, D), jnp.float32)},
    routed: {f"w{i}": jax.ShapeDtypeStruct((EXPERTS, D, D), jnp.float32) for i in range(LAYERS)},
}


def steps(fn):
    """A step by the fast path and one by the definition: functions of trained leaves, params and input."""
    shapes = SHAPES[fn]
    found = jpeft.kernels(lambda p, x: jnp.sin(fn(p, x)), shapes, X)
    adapter = jpeft.init(jax.random.key(0, impl="unsafe_rbg"), jpeft.LoRA(rank=R, targets=".*"), shapes, kernels=found)
    fast = lambda t, p, x: jpeft.lift(fn)(jpeft.attach(p, adapter.replace(trained=t)), x).sum()
    forward = lambda t, p, x: jpeft.lift(fn, forward_mode=True)(jpeft.attach(p, adapter.replace(trained=t)), x).sum()
    dense = lambda t, p, x: fn(jpeft.apply(p, adapter.replace(trained=t)), x).sum()
    return [jax.jit(jax.value_and_grad(loss)) for loss in (fast, forward, dense)], (adapter.trained, shapes, X)


# The first layer's input needs no gradient.
FLOOR = (2 * LAYERS - 1) * 2 * N * D * D
BRANCH = (2 * LAYERS + 4 * LAYERS - 1) * 2 * N * D * R


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_flops_of_the_compiled_step(mode):
    (fast, forward, dense), shapes = steps(unrolled)
    flops = lambda step: step.lower(*shapes).compile().cost_analysis()["flops"]
    assert flops(fast if mode == "reverse" else forward) == pytest.approx(FLOOR + BRANCH, rel=0.02)
    assert flops(dense) > 1.15 * (FLOOR + LAYERS * N * D * D)


@pytest.mark.parametrize("fn", [unrolled, scanned, remat, routed])
def test_no_product_of_the_size_of_the_base(fn):
    """The weight's own gradient is never formed, under scan or not; the definition forms it."""
    (fast, forward, dense), shapes = steps(fn)
    is_base = lambda shape: sorted(shape[-2:]) == [D, D]
    for step in (fast, forward):
        assert not any(is_base(out) for out, _ in products(jax.make_jaxpr(step)(*shapes).jaxpr))
    assert any(is_base(out) for out, _ in products(jax.make_jaxpr(dense)(*shapes).jaxpr))


def test_flops_under_scan():
    (fast, *_), shapes = steps(scanned)
    total = sum(flops for _, flops in products(jax.make_jaxpr(fast)(*shapes).jaxpr))
    whole_input = 2 * N * D * (D + R)  # inside a scan, the first layer is like the others
    assert total == pytest.approx(FLOOR + BRANCH + whole_input, rel=0.02)


def test_flops_of_experts():
    """Each row meets its own expert's matrices alone; the definition forms every expert's."""
    (fast, _, dense), shapes = steps(routed)
    total = lambda step: sum(flops for _, flops in products(jax.make_jaxpr(step)(*shapes).jaxpr))
    assert total(fast) == pytest.approx(FLOOR + BRANCH, rel=0.02)
    assert total(dense) > 1.15 * (FLOOR + LAYERS * N * D * D)


@pytest.mark.parametrize("fn", [unrolled, scanned, remat])
def test_no_copy_of_the_base(fn):
    (fast, forward, dense), shapes = steps(fn)
    base = LAYERS * D * D * 4
    temporary = lambda step: step.lower(*rows(16, shapes)).compile().memory_analysis().temp_size_in_bytes
    assert temporary(fast) < base / 2
    assert temporary(forward) < base / 2
    assert temporary(dense) > base / 2


def rows(n, shapes):
    """The same step on few rows, where activations are small beside the base."""
    return (*shapes[:2], jax.ShapeDtypeStruct((n, D), jnp.float32))


def products(jaxpr, times=1):
    """The result's shape and the flops of each product of a program, those in loops as often as they run."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.outvars[0].aval.shape
            depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            yield shape, times * 2 * math.prod(shape) * depth
        if eqn.primitive.name == "ragged_dot_general":
            numbers = eqn.params["ragged_dot_dimension_numbers"]
            (_, contracted), (_, batch) = numbers.dot_dimension_numbers
            rows, weight = (operand.aval.shape for operand in eqn.invars[:2])
            others = {*contracted, *batch, *numbers.rhs_group_dimensions}
            columns = math.prod(size for axis, size in enumerate(weight) if axis not in others)
            yield eqn.outvars[0].aval.shape, times * 2 * math.prod(rows) * columns
        for inner in inner_programs(eqn):
            yield from products(inner, times * eqn.params.get("length", 1))


def inner_programs(eqn):
    for value in eqn.params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(one, "jaxpr"):
                yield one.jaxpr
            elif hasattr(one, "eqns"):
                yield one
