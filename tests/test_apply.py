"""`apply` and `merge`: trees, several adapters, and what they refuse."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze

import jpeft
import zoo
from agreement import adapter_for, assert_close, perturbed


def lora(params, seed=0, **options):
    options = {"rank": 2, "targets": ".*", **options}
    return perturbed(jpeft.init(jax.random.key(seed, impl="unsafe_rbg"), jpeft.LoRA(**options), params), seed)


def dense(bias=True, dtype=jnp.float32):
    leaves = {"kernel": zoo.normal(4, 3).astype(dtype), "bias": zoo.normal(3, seed=1).astype(dtype)}
    return {"dense": leaves if bias else {"kernel": leaves["kernel"]}}


def test_by_hand():
    """W + s A B."""
    params = dense()
    adapter = lora(params, alpha=6)
    a, b = (adapter.trained["dense/kernel"][name] for name in "ab")
    assert_close(
        jpeft.apply(params, adapter),
        {"dense": {"bias": params["dense"]["bias"], "kernel": params["dense"]["kernel"] + 3 * a @ b}},
    )


@pytest.mark.parametrize(
    "name",
    ["linen_dense", "linen_frozen_dict", "linen_partitioned", "nnx_state", "nnx_pure_dict", "containers", "linen_scan"],
)
def test_the_kind_of_tree_stays(name):
    case = zoo.get(name)
    new = jpeft.apply(case.params, adapter_for(case))
    assert type(new) is type(case.params)
    assert jax.tree.structure(new) == jax.tree.structure(case.params)


def test_boxes_keep_their_metadata():
    case = zoo.get("linen_partitioned")
    box = jpeft.apply(case.params, adapter_for(case))["dense"]["kernel"]
    assert isinstance(box, nn.Partitioned) and box.names == ("embed", "mlp")
    state = nnx.State({"kernel": nnx.Param(jnp.ones((3, 2)), tag="mine")})
    new = jpeft.apply(state, lora(state))
    assert isinstance(new["kernel"], nnx.Param)
    assert new["kernel"].get_metadata()["tag"] == "mine"


def test_other_variables_of_a_state_stay():
    case = zoo.get("nnx_state")
    new = jpeft.apply(case.params, adapter_for(case, modules_to_save=["norm"], bias="all"))
    sites = {site.path for site in adapter_for(case, modules_to_save=["norm"], bias="all").sites}
    assert {path for path in sites if path.startswith("norm")} == {"norm/bias", "norm/scale"}
    assert new["norm"]["mean"][...] is case.params["norm"]["mean"][...]


def test_the_input_is_not_changed():
    params = dense()
    before = jax.tree.map(np.array, params)
    jpeft.apply(params, lora(params))
    jax.tree.map(np.testing.assert_array_equal, params, before)
    frozen = freeze(params)
    assert isinstance(jpeft.merge(frozen, lora(params)), FrozenDict)


# ---- several ----


def test_weights_by_position_by_name_and_as_a_number():
    params = dense()
    a, b = lora(params, 1), lora(params, 2)
    expected = jpeft.apply(params, [a, b], [2.0, 0.5])
    assert_close(jpeft.apply(params, {"x": a, "y": b}, {"y": 0.5, "x": 2.0}), expected, 0)
    assert_close(jpeft.apply(params, {"x": a, "y": b}, [2.0, 0.5]), expected, 0)
    assert_close(jpeft.apply(params, (a, b), jnp.array([2.0, 0.5])), expected, 0)
    assert_close(jpeft.apply(params, a, 2), jpeft.apply(params, [a], [2.0]), 0)
    with jax.numpy_dtype_promotion("strict"):
        assert_close(jpeft.apply(params, a, np.int32(2)), jpeft.apply(params, [a], [2.0]), 0)


def test_weights_can_be_trained():
    """A mixture of adapters with its coefficients traced."""
    params = dense()
    group = [lora(params, 1), lora(params, 2)]
    gradient = jax.jit(jax.grad(lambda w: jpeft.apply(params, group, w)["dense"]["kernel"].sum()))(
        jnp.array([0.3, 0.7])
    )
    each = [(jpeft.apply(params, one)["dense"]["kernel"] - params["dense"]["kernel"]).sum() for one in group]
    np.testing.assert_allclose(gradient, jnp.stack(each), rtol=1e-4)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "1 weights for 2 adapters"),
        ({"x": 1, "z": 2}, r"weights are for \['x', 'z'\]; the adapters are \['x', 'y'\]"),
    ],
)
def test_weights_that_do_not_fit(weights, message):
    params = dense()
    with pytest.raises(jpeft.SpecError, match=message):
        jpeft.apply(params, {"x": lora(params), "y": lora(params)}, weights)


def test_weights_by_name_for_adapters_without():
    params = dense()
    with pytest.raises(jpeft.SpecError, match="weights are by name"):
        jpeft.apply(params, [lora(params)], {"x": 1.0})


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_bias_replaced_by_one_and_shifted_by_another(order):
    """Whatever their order: the trained bias, plus what the bias of B adds."""
    params = {
        "dense": {"kernel": zoo.normal(4, 3), "bias": zoo.normal(3, seed=1)},
        "other": {"kernel": zoo.normal(3, 3)},
    }
    shifts = lora(params, 1, targets=["dense"], factor_bias=True)
    replaces = lora(params, 2, targets=["other"], bias="all")
    pair = [shifts, replaces]
    new = jpeft.apply(params, [pair[i] for i in order])["dense"]["bias"]
    assert_close(new, replaces.trained["dense/bias"]["value"] + shifts.trained["dense/kernel"]["bias"])
    fn = lambda p, x: (x @ p["dense"]["kernel"] + p["dense"]["bias"]) @ p["other"]["kernel"]
    x = zoo.normal(2, 4, scale=1)
    found = jpeft.lift(fn)(jpeft.attach(params, [pair[i] for i in order]), x)
    assert_close(found, fn(jpeft.apply(params, pair), x))


def test_two_that_replace_one_leaf():
    params = dense()
    with pytest.raises(jpeft.SpecError, match="'dense/bias' is replaced whole by one of 2 adapters"):
        jpeft.apply(params, [lora(params, bias="all"), lora(params, bias="all")])


def test_two_that_take_the_axes_differently():
    """A square kernel, (in, out) to one adapter and (out, in) to the other."""
    params = {"w": {"kernel": zoo.normal(4, 4)}}
    flipped = jpeft.Kernels((("w/kernel", jpeft.Kernel((4, 4), (1,), (0,))),))
    other = perturbed(jpeft.init(jax.random.key(0), jpeft.LoRA(rank=1), params, kernels=flipped))
    for call in (jpeft.apply, jpeft.attach):
        with pytest.raises(jpeft.KernelError, match="take its axes differently.*same kernels="):
            call(params, [lora(params), other])


# ---- what it refuses ----


@pytest.mark.parametrize("call", [jpeft.apply, jpeft.merge, jpeft.attach])
@pytest.mark.parametrize("given", [jpeft.LoRA(), [jpeft.LoRA()], {"x": jpeft.LoRA()}, None, "adapter", {"x": {"a": 1}}])
def test_no_adapter(call, given):
    with pytest.raises(TypeError, match=r"expected an adapter, made by jpeft\.init\(key, spec, params\)"):
        call(dense(), given)


@pytest.mark.parametrize("call", [jpeft.apply, jpeft.merge, jpeft.attach])
@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"dance": {"kernel": jnp.ones((4, 3))}},
            "the adapter has 'dense/kernel', the params don't; nearest: 'dance/kernel'",
        ),
        ({"params": dense()}, "nearest: 'params/dense/kernel'"),
        ({"dense": {"kernel": jnp.ones((4, 4))}}, r"the adapter is for shape \(4, 3\), the params have \(4, 4\)"),
        ({"dense": {"kernel": jnp.ones((4, 3), jnp.int8)}}, "'dense/kernel' holds int8; expected a floating dtype"),
    ],
)
def test_other_params(call, params, message):
    with pytest.raises(jpeft.KernelError, match=message):
        call(params, lora(dense(bias=False)))


def test_attached_params():
    params = dense()
    adapter = lora(params)
    attached = jpeft.attach(params, adapter)
    for call in (jpeft.apply, jpeft.attach):
        with pytest.raises(jpeft.KernelError, match=r"has an adapter attached.*jpeft\.attach\(params, \[a, b\]\)"):
            call(attached, adapter)
    for call in (lambda: jpeft.init(jax.random.key(0), jpeft.LoRA(), attached), lambda: jpeft.count(attached, adapter)):
        with pytest.raises(jpeft.KernelError, match="has an adapter attached; give the base params"):
            call()
    with pytest.raises(jpeft.KernelError, match="has an adapter attached; give the base params"):
        jpeft.kernels(lambda p, x: x @ p["dense"]["kernel"], attached, jnp.ones((2, 4)))


# ---- merge ----


def test_merge_refuses_what_is_not_finite():
    params = dense()
    adapter = lora(params)
    adapter.trained["dense/kernel"]["a"] = adapter.trained["dense/kernel"]["a"].at[0, 0].set(jnp.nan)
    with pytest.raises(jpeft.MergeError, match="'dense/kernel' holds values that are not finite"):
        jpeft.merge(params, adapter)


def test_merge_refuses_what_overflows_the_params_dtype():
    params = dense(dtype=jnp.float16)
    adapter = lora(params)
    huge = adapter.replace(constant={"dense/kernel": {"scaling": jnp.float32(1e6)}})
    assert np.isfinite(jpeft.merge(dense(), huge)["dense"]["kernel"]).all()
    with pytest.raises(jpeft.MergeError, match="not finite"):
        jpeft.merge(params, huge)


def test_merge_does_not_look_at_what_it_leaves_alone():
    """A mask of -inf in the params is none of the adapter's business; nor is a leaf that is no array."""
    params = {**dense(), "mask": jnp.full(3, -jnp.inf), "scale": 2.0}
    merged = jpeft.merge(params, lora(dense()))
    assert merged["mask"] is params["mask"] and merged["scale"] == 2.0


def test_merge_under_jit():
    params = dense()
    with pytest.raises(jpeft.MergeError, match=r"jpeft\.apply"):
        jax.jit(jpeft.merge)(params, lora(params))


def test_a_tied_weight_adapted_on_one_side():
    """No single weight is two: `apply` and `merge` refuse, `lift` does it."""
    case = zoo.get("linen_tied")
    adapter = adapter_for(case, targets=["embed"])
    (site,) = adapter.sites
    for use in ("lookup", "product"):
        one_side = adapter.replace(meta=type(adapter.meta)(adapter.spec, (replace(site, use=use),)))
        for call in (jpeft.apply, jpeft.merge):
            with pytest.raises(jpeft.MergeError, match=f"acts on the {use} alone"):
                call(case.params, one_side)
        table = case.params["embed"]["embedding"]
        new = jpeft.apply(case.params, adapter)["embed"]["embedding"]
        looked_up, attended = (new, table) if use == "lookup" else (table, new)
        dense = case.params["dense"]
        expected = (looked_up[case.x] @ dense["kernel"] + dense["bias"]) @ attended.T
        assert_close(jpeft.lift(case.fn)(jpeft.attach(case.params, one_side), case.x), expected)
