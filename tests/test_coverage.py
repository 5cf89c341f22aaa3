"""What the fast path says about itself."""

import jax
import jax.numpy as jnp
import pytest

import jpeft
import zoo
from agreement import adapter_for


def covered(name, **options):
    case = zoo.get(name)
    return jpeft.coverage(case.fn, jpeft.attach(case.params, adapter_for(case, **options)), case.x)


def test_factored_dense_and_unread():
    case = zoo.get("custom_vjp")
    params = {**case.params, "spare": zoo.normal(zoo.D, zoo.D)}
    kernels = jpeft.Kernels((*case.found.entries, ("spare", jpeft.Kernel((zoo.D, zoo.D), (0,), (1,)))))
    adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(targets=".*"), params, kernels=kernels)
    found = jpeft.coverage(case.fn, jpeft.attach(params, adapter), case.x)
    assert {row.path: row.how for row in found.rows} == {"odd": "dense", "w": "factored", "spare": "unread"}
    assert str(found).splitlines() == [
        "dense     odd  custom_vjp_call (no rule for this operation)",
        "unread    spare  ",
        "factored  w  dot_general",
        "1 factored, 1 dense, 1 unread",
    ]
    assert [found.count(how) for how in ("factored", "dense", "unread")] == [1, 1, 1]
    with pytest.raises(jpeft.LiftError, match="'spare' first"):
        jpeft.lift(case.fn)(jpeft.attach(params, adapter), case.x)


def test_both_ways_is_dense_and_lists_both():
    assert covered("both_ways")["w"].uses == ("dot_general", "abs (no rule for this operation)")
    assert covered("both_ways")["w"].how == "dense"


def test_uses_are_listed_once():
    assert covered("linen_shared")["dense/kernel"].uses == ("dot_general",)
    assert covered("linen_tied")["embed/embedding"].uses == ("gather", "dot_general")


def test_only_what_is_attached():
    assert [row.path for row in covered("linen_loop", targets=["up"]).rows] == [
        "layers_0/mlp/up/kernel",
        "layers_1/mlp/up/kernel",
    ]


def test_no_such_row():
    with pytest.raises(KeyError, match="dwon/kernel.*down/kernel"):
        covered("linen_dense")["dwon/kernel"]


def test_of_a_lifted_function_and_under_jit():
    case = zoo.get("linen_dense")
    params = jpeft.attach(case.params, adapter_for(case))
    expected = jpeft.coverage(case.fn, params, case.x)
    assert jpeft.coverage(jpeft.lift(case.fn), params, case.x) == expected
    assert jpeft.coverage(jax.jit(jpeft.lift(case.fn)), params, case.x) == expected


def test_nothing_is_computed():
    case = zoo.get("linen_dense")
    adapter = adapter_for(case)
    shapes = jax.eval_shape(lambda: (jpeft.attach(case.params, adapter), case.x))
    assert jpeft.coverage(case.fn, *shapes).count("factored") == 2
    huge = {"w": jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32)}
    kernels = jpeft.Kernels((("w", jpeft.Kernel((2**20, 2**20), (0,), (1,))),))
    new = lambda params: jpeft.init(jax.random.key(0), jpeft.LoRA(targets=["w"]), params, kernels=kernels)
    attached = jax.eval_shape(lambda params: jpeft.attach(params, new(params)), huge)
    found = jpeft.coverage(lambda p, x: x @ p["w"], attached, jax.ShapeDtypeStruct((4, 2**20), jnp.float32))
    assert found["w"].how == "factored"
