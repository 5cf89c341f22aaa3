"""The fast path of every method against its definition: values and every gradient, on kernels in every style."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
import zoo
from agreement import QUICK, assert_close, by_definition, by_fast_path, outputs_and_gradients, perturbed

SPECS = {
    "dora": jpeft.DoRA(rank=2, alpha=3, targets=".*"),
    "adalora": jpeft.AdaLoRA(rank=3, target_rank=2, alpha=5, targets=".*"),
    "ia3": jpeft.IA3(targets=".*"),
    "ia3-feedforward": jpeft.IA3(targets=".*", feedforward=".*"),
}
CASES = [
    "linen_dense",
    "linen_scan_remat",
    "linen_tied",
    "linen_conv_2d",
    "linen_experts",
    "einsum_attention",
    "gemma_attention",
    "experts_batched",
    "experts_ragged_moved",
    "experts_ragged_vmapped",
    "transposed",
    "square",
]
WIDER = {jnp.dtype("float32"): jnp.dtype("float64")}
DENSE = {  # the cases in which a method has no factored form, and why
    ("dora", "linen_tied"): "the norm of Eᵀ's columns is none of E's",
    ("ia3-feedforward", "linen_tied"): "a row of an embedding can't be told from its input",
    ("ia3-feedforward", "linen_conv_2d"): "the input of a convolution is scaled dense",
}


def adapter_for(method, case, seed=1):
    new = jpeft.init(jax.random.key(0, impl="unsafe_rbg"), SPECS[method], case.params, kernels=case.adapted)
    return perturbed(new, seed)


def in_fp64(case, adapter):
    """The definition in double precision: some of these gradients cancel so much that fp32 is no judge of fp32."""
    wide = lambda tree: jax.tree.map(
        lambda leaf: jnp.asarray(np.asarray(leaf), WIDER.get(leaf.dtype, leaf.dtype)), tree
    )
    with jax.enable_x64(True):
        run = by_definition(case, adapter.replace(constant=wide(adapter.constant)))
        return outputs_and_gradients(run, *wide((adapter.trained, case.params, case.x)), case.reverse, QUICK)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", SPECS)
def test_values_and_every_gradient(method, name):
    case = zoo.get(name)
    adapter = adapter_for(method, case)
    args = adapter.trained, case.params, case.x
    expected, gradients = in_fp64(case, adapter)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        found, found_gradients = outputs_and_gradients(by_fast_path(case, adapter), *args, case.reverse)
    assert_close(found, expected)
    if case.reverse:
        assert_close(found_gradients, gradients)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", SPECS)
def test_stays_factored(method, name):
    case = zoo.get(name)
    found = jpeft.coverage(case.fn, jpeft.attach(case.params, adapter_for(method, case)), case.x)
    dense = {row.path for row in found.rows if row.how != "factored"}
    assert bool(dense - set(case.dense)) == ((method, name) in DENSE)


@pytest.mark.parametrize("pair", [("dora", "adalora"), ("ia3", "dora"), ("ia3", "ia3-feedforward"), ("dora", "dora")])
def test_two_at_once_in_either_order(pair):
    """What adds is taken of the base; what scales acts on the sum: apply, the fast path and merge agree."""
    case = zoo.get("linen_dense")
    a, b = (adapter_for(method, case, seed) for seed, method in enumerate(pair, 1))
    dense = case.fn(jpeft.apply(case.params, [a, b]), case.x)
    lifted = jpeft.lift(case.fn)
    for order in ([a, b], [b, a]):
        assert_close(jax.jit(lifted)(jpeft.attach(case.params, order), case.x), dense)
        assert_close(case.fn(jpeft.merge(case.params, order), case.x), dense)
    alone = case.fn(jpeft.apply(case.params, a), case.x)
    assert max(np.abs(x - y).max() for x, y in zip(*map(jax.tree.leaves, (alone, dense)), strict=True)) > 1e-2


def test_dora_norms_are_of_the_columns():
    """Against the formula, written out in fp64."""
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((6, 5)), rng.standard_normal((3, 6))
    params = {"dense": {"kernel": jnp.asarray(w, jnp.float32), "bias": jnp.ones(5)}}
    adapter = perturbed(jpeft.init(jax.random.key(0), jpeft.DoRA(rank=2, alpha=6), params))
    leaves = {name: np.asarray(leaf, np.float64) for name, leaf in adapter.trained["dense/kernel"].items()}
    v = w + 3 * leaves["a"] @ leaves["b"]
    expected = x @ (v / np.linalg.norm(v, axis=0) * leaves["m"]) + 1
    forward = jpeft.lift(lambda p, x: x @ p["dense"]["kernel"] + p["dense"]["bias"])
    found = forward(jpeft.attach(params, adapter), jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_ia3_scales_the_bias_with_the_result():
    params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.arange(3.0)}}
    adapter = jpeft.init(jax.random.key(0), jpeft.IA3(), params)
    adapter = adapter.replace(trained={"dense/kernel": {"l": jnp.array([2.0, 3.0, 4.0])}})
    new = jpeft.apply(params, adapter)["dense"]
    np.testing.assert_array_equal(new["bias"], [0, 3, 8])
    np.testing.assert_array_equal(new["kernel"], [[2, 3, 4]] * 2)


def test_some_layers_of_a_stack():
    """The slices left alone stay exactly the base's, for methods whose leaves are not zero at the start."""
    case = zoo.get("linen_scan")
    for spec in (jpeft.DoRA(rank=2, targets=".*", layers_to_transform=[1]), jpeft.IA3(layers_to_transform=[1])):
        adapter = perturbed(jpeft.init(jax.random.key(0), spec, case.params, kernels=case.adapted))
        assert any(site.layers for site in adapter.sites)
        old, new = case.params, jpeft.apply(case.params, adapter)
        for before, after in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
            if before is not after and before.ndim == 3:
                np.testing.assert_array_equal(before[0], after[0])
                assert np.abs(before[1] - after[1]).max() > 1e-2
        found = jax.jit(jpeft.lift(case.fn))(jpeft.attach(case.params, adapter), case.x)
        assert_close(found, case.fn(new, case.x))


@pytest.mark.parametrize("method", SPECS)
def test_bf16(method):
    """bf16 params and activations, fp32 leaves: as near to the fp32 result as bf16 is."""
    case = zoo.get("linen_dense")
    adapter = adapter_for(method, case)
    half = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)
    args = adapter.trained, case.params, case.x
    expected, gradients = outputs_and_gradients(by_definition(case, adapter), *args, options=QUICK)
    with jax.numpy_dtype_promotion("strict"):
        args = adapter.trained, half(case.params), half(case.x)
        found, found_gradients = outputs_and_gradients(by_fast_path(case, adapter), *args)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}
    assert_close(found, expected, 0.05)
    assert_close(found_gradients[0], gradients[0], 0.1)
