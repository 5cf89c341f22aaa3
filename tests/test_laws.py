"""What every method has to obey. A new method adds a row to `SPECS`, and its geometry is tried for it."""

import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from agreement import assert_close, perturbed
from jpeft.methods import METHODS

SPECS = {
    "lora": jpeft.LoRA(rank=2, alpha=3, targets=".*"),
    "lora-rs": jpeft.LoRA(rank=3, alpha=2, targets=".*", rank_stabilized=True, init="gaussian"),
    "lora-factor-bias": jpeft.LoRA(rank=2, targets=["dense"], factor_bias=True),
    "lora-bias": jpeft.LoRA(rank=2, targets=["dense"], bias="all"),
    "lora-saved": jpeft.LoRA(rank=2, targets=["dense", "attention"], modules_to_save=["head"]),
    "lora-rank-0": jpeft.LoRA(rank=0, targets=".*"),
    "dora": jpeft.DoRA(rank=2, alpha=3, targets=".*"),
    "adalora": jpeft.AdaLoRA(rank=3, target_rank=2, alpha=5, targets=".*"),
    "ia3": jpeft.IA3(targets=".*", feedforward=["attention", "conv"]),
}

KERNELS = jpeft.Kernels(
    (
        ("dense/kernel", jpeft.Kernel((5, 4), (0,), (1,))),
        ("attention/kernel", jpeft.Kernel((2, 3, 5), (0, 1), (2,))),
        ("stored/kernel", jpeft.Kernel((4, 5), (1,), (0,))),
        ("experts/kernel", jpeft.Kernel((5, 2, 3), (0,), (2,), (1,))),
        ("conv/kernel", jpeft.Kernel((3, 2, 4), (0, 1), (2,), kind="conv")),
        ("embed/embedding", jpeft.Kernel((7, 4), (0,), (1,), kind="embedding")),
        ("head/kernel", jpeft.Kernel((4, 3), (0,), (1,), head=True)),
    )
)


def base(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    params = {path.split("/")[0]: {path.split("/")[1]: draw(*kernel.shape)} for path, kernel in KERNELS.items()}
    params["dense"]["bias"] = draw(4)
    params["norm"] = {"scale": draw(4), "bias": draw(4)}
    return params


def fresh(spec, params, seed=0):
    return jpeft.init(jax.random.key(seed, impl="unsafe_rbg"), spec, params, kernels=KERNELS)


@pytest.fixture(params=SPECS)
def spec(request):
    return SPECS[request.param]


@pytest.fixture(params=["float32", "bfloat16"])
def params(request):
    return base(request.param)


def size_of(change):
    return sum(float(jnp.abs(leaf.astype(jnp.float32)).sum()) for leaf in jax.tree.leaves(change))


def minus(left, right):
    return jax.tree.map(jnp.subtract, left, right)


def test_every_method_is_tried():
    tried = {site.method for spec in SPECS.values() for site in fresh(spec, base()).sites}
    assert tried | {"routed"} == set(METHODS), "routing is no method of a spec: tests/test_gates.py"


def test_a_new_adapter_changes_nothing(spec, params):
    """Exactly; of DoRA, whose W / ‖W‖ · ‖W‖ is rounded, to one step of the params' dtype."""
    step = float(jnp.finfo(params["norm"]["bias"].dtype).eps) if spec.method == "dora" else 0
    same = lambda found, base: np.testing.assert_allclose(np.float32(found), np.float32(base), rtol=step)
    jax.tree.map(same, jpeft.apply(params, fresh(spec, params)), params)


def test_a_trained_one_does(spec, params):
    if spec.rank_of("") or spec.method == "ia3":
        assert size_of(minus(jpeft.apply(params, perturbed(fresh(spec, params))), params)) > 1


def test_tree_shapes_and_dtypes_stay(spec, params):
    adapter = perturbed(fresh(spec, params))
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        assert shapes(jpeft.apply(params, adapter)) == shapes(params)


def test_only_the_adapted_weights_change(spec, params):
    new = jpeft.apply(params, perturbed(fresh(spec, params)))
    paths = {site.path for site in fresh(spec, params).sites}
    paths |= {"dense/bias"} if spec.method == "ia3" or getattr(spec, "factor_bias", False) else set()
    for module, leaves in params.items():
        for name, leaf in leaves.items():
            if f"{module}/{name}" not in paths:
                assert new[module][name] is leaf


def test_trained_in_fp32_whatever_the_base(spec, params):
    adapter = fresh(spec, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter)} == {jnp.dtype("float32")}


def test_jit_changes_nothing(spec, params):
    adapter = perturbed(fresh(spec, params))
    found, expected = jax.jit(jpeft.apply)(params, adapter), jpeft.apply(params, adapter)
    assert_close(found, expected, 1e-6 if params["norm"]["bias"].dtype == jnp.float32 else 1e-2)


def test_merge_is_apply(spec, params):
    adapter = perturbed(fresh(spec, params))
    jax.tree.map(np.testing.assert_array_equal, jpeft.merge(params, adapter), jpeft.apply(params, adapter))


def test_gradients_reach_every_trained_leaf(spec):
    params = base()
    adapter = perturbed(fresh(spec, params))
    loss = lambda trained: sum(
        (leaf**2).sum() for leaf in jax.tree.leaves(jpeft.apply(params, adapter.replace(trained=trained)))
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(adapter.trained)):
        assert not leaf.size or float(jnp.abs(leaf).max()) > 0, jax.tree_util.keystr(path)


def test_computed_in_fp32_and_rounded_once(spec):
    """Half-precision params: the fp32 result, rounded."""
    half = base("bfloat16")
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    adapter = perturbed(fresh(spec, wide))
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), jpeft.apply(wide, adapter))
    jax.tree.map(np.testing.assert_array_equal, jpeft.apply(half, adapter), rounded)


def test_what_adds_does_not_depend_on_the_base(spec):
    """W' - W is the same for any W, and scales with the adapter's weight."""
    one, other = base(seed=1), base(seed=2)
    adapter = perturbed(fresh(spec, one))
    if any(METHODS[site.method].delta is None for site in adapter.sites):
        with pytest.raises(jpeft.SpecError, match="can't be scaled"):
            jpeft.apply(one, adapter, 0.5)
        return
    change = minus(jpeft.apply(one, adapter), one)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
    jax.tree.map(close, minus(jpeft.apply(other, adapter), other), change)
    jax.tree.map(close, minus(jpeft.apply(one, adapter, -0.5), one), jax.tree.map(lambda leaf: -0.5 * leaf, change))
    jax.tree.map(
        close, minus(jpeft.apply(jpeft.apply(one, adapter), adapter), one), jax.tree.map(lambda leaf: 2 * leaf, change)
    )


def test_several_add_up_and_their_order_is_nothing(spec):
    params = base()
    a, b = perturbed(fresh(spec, params), 1), perturbed(fresh(spec, params, 1), 2)
    close = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5)
    if any(METHODS[site.method].alone for site in a.sites):
        with pytest.raises(jpeft.SpecError, match="replaced whole by one of 2 adapters"):
            jpeft.apply(params, [a, b])
        return
    if spec.method == "ia3":  # scalings multiply
        jax.tree.map(close, jpeft.apply(params, [a, b]), jpeft.apply(jpeft.apply(params, a), b))
        jax.tree.map(close, jpeft.apply(params, [b, a]), jpeft.apply(params, [a, b]))
        return
    each = jax.tree.map(lambda x, y, w: x + y - w, jpeft.apply(params, a), jpeft.apply(params, b), params)
    jax.tree.map(close, jpeft.apply(params, [a, b]), each)
    jax.tree.map(close, jpeft.apply(params, {"b": b, "a": a}), each)


def test_values_do_not_depend_on_the_other_targets(spec):
    params = base()
    all_of_them = fresh(spec, params)
    for site in all_of_them.sites:
        if site.method == "replacement" or not spec.targets:
            continue
        alone = dataclasses.replace(spec, targets=[site.path.split("/")[0]], bias="none", modules_to_save=())
        if spec.method == "ia3":
            alone = dataclasses.replace(alone, feedforward=".*" if spec.is_feedforward(site.path) else ())
        jax.tree.map(
            np.testing.assert_array_equal, fresh(alone, params).trained[site.path], all_of_them.trained[site.path]
        )


def test_another_key_another_adapter(spec):
    params = base()
    same, other = fresh(spec, params), fresh(spec, params, seed=1)
    jax.tree.map(np.testing.assert_array_equal, fresh(spec, params), same)
    drawn = spec.method != "ia3" and spec.rank_of("") > 0
    assert (size_of(minus(same.trained, other.trained)) > 0) == drawn


def test_shapes_are_enough(spec):
    """ShapeDtypeStructs give the same structure, where nothing is copied."""
    params = base()
    shapes = jax.eval_shape(lambda: params)
    if any(site.method in ("replacement", "dora") for site in fresh(spec, params).sites):
        with pytest.raises(jpeft.KernelError, match="found a ShapeDtypeStruct, give arrays"):
            fresh(spec, shapes)
    else:
        jax.tree.map(np.testing.assert_array_equal, fresh(spec, shapes), fresh(spec, params))


@pytest.mark.parametrize("layers", [None, 0])
def test_the_shapes_that_a_method_states(spec, layers):
    """By which a file is checked before anything is made of it."""
    if layers is not None:
        spec = dataclasses.replace(spec, targets=["experts"], bias="none", modules_to_save=(), layers_to_transform=0)
        spec = dataclasses.replace(spec, feedforward=()) if spec.method == "ia3" else spec
    adapter = fresh(spec, base())
    for site in adapter.sites:
        found = {name: leaf.shape for name, leaf in adapter.leaves(site.path).items()}
        assert METHODS[site.method].shapes(spec, site) == found
        assert layers is None or site.layers == (0,)


def test_stacks_under_vmap(spec):
    """Adapters of one spec, stacked, applied at once."""
    params = base()
    adapters = [perturbed(fresh(spec, params), seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
    found = jax.jit(jax.vmap(jpeft.apply, in_axes=(None, 0), out_axes=0))(params, stacked)
    for i, adapter in enumerate(adapters):
        close = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5)
        jax.tree.map(close, jax.tree.map(operator.itemgetter(i), found), jpeft.apply(params, adapter))


def test_count_is_the_trained_leaves(spec):
    params = base()
    adapter = fresh(spec, params)
    trained = sum(leaf.size for leaf in jax.tree.leaves(adapter.trained))
    count = jpeft.count(params, adapter)
    assert (count.trainable, count.total) == (trained, trained + sum(leaf.size for leaf in jax.tree.leaves(params)))


def test_save_and_load(spec, tmp_path):
    params = base()
    adapter = perturbed(fresh(spec, params))
    jpeft.save(tmp_path / "adapter.safetensors", adapter)
    back = jpeft.load(tmp_path / "adapter.safetensors")
    assert back.meta == adapter.meta and hash(back.meta) == hash(adapter.meta)
    assert jax.tree.structure(back) == jax.tree.structure(adapter)
    jax.tree.map(np.testing.assert_array_equal, back, adapter)
    assert jax.tree.map(jnp.shape, back) == jax.tree.map(jnp.shape, adapter)


def test_the_static_part_is_hashable_and_equal(spec):
    params = base()
    one, other = fresh(spec, params), fresh(spec, params, seed=1)
    assert one.meta == other.meta and hash(one.meta) == hash(other.meta)
    assert jax.tree.structure(one) == jax.tree.structure(other)
