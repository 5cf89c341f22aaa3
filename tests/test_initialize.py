"""The initialisers on any geometry: the model stays what it was, a slice of a stack is as alone, errors say why."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
import zoo
from jpeft.initialize import (
    corda,
    covariance,
    eva,
    loftq,
    lora_ga,
    moments,
    olora,
    on_original_base,
    orthogonal,
    pissa,
    scaled_gram,
    tap,
    weight_gradients,
)
from jpeft.initialize.loftq import normal_float_table, quantize
from jpeft.tree import flatten

KEY = jax.random.key(3)


def new(params, kernels=None, **spec):
    return jpeft.init(jax.random.key(0), jpeft.LoRA(**{"rank": 2, "alpha": 3, **spec}), params, kernels=kernels)


def inputs_of(adapter, seed=0):
    """A covariance for every weight."""
    rng = np.random.default_rng(seed)
    draw = lambda k: np.float32(rng.standard_normal((*k.batch_shape, k.fan_in, k.fan_in + 9)))
    grams = {site.path: draw(site.kernel) for site in adapter.sites}
    return {path: jnp.asarray(x @ x.swapaxes(-1, -2)) for path, x in grams.items()}


def gradients_of(adapter, seed=0):
    rng = np.random.default_rng(seed)
    return {site.path: jnp.asarray(np.float32(rng.standard_normal(site.kernel.shape))) for site in adapter.sites}


STARTS = {
    "pissa": pissa,
    "pissa_niter": lambda adapter, params: pissa(adapter, params, niter=2, key=KEY),
    "olora": olora,
    "corda_ipm": lambda adapter, params: corda(adapter, params, inputs_of(adapter)),
    "corda_kpm": lambda adapter, params: corda(adapter, params, inputs_of(adapter), mode="kpm"),
    "lora_ga": lambda adapter, params: lora_ga(adapter, params, gradients_of(adapter)),
    "lora_ga_random": lambda adapter, params: lora_ga(
        adapter, params, gradients_of(adapter), direction="random", scale="weight_svd", niter=2, key=KEY
    ),
}
GEOMETRIES = ["linen_scan_axis_1", "linen_attention"]


def product_kernels(case):
    return jpeft.Kernels(tuple((path, k) for path, k in case.found.items() if k.kind == "product"))


def adapter_of(case, **spec):
    return new(case.params, product_kernels(case), **{"targets": ".*", **spec})


def largest_difference(one, other):
    one, other = flatten(one), flatten(other)
    floating = [
        path for path, leaf in one.items() if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    assert floating and one.keys() == other.keys()
    return max(float(jnp.abs(one[path] - other[path]).max()) for path in floating)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("name", STARTS)
def test_the_model_stays_what_it_was(name, geometry):
    case = zoo.get(geometry)
    adapter = adapter_of(case)
    start, residual = STARTS[name](adapter, case.params)
    assert type(residual) is type(case.params)
    assert largest_difference(residual, case.params) > 1e-3
    assert largest_difference(jpeft.apply(residual, start), case.params) <= 1e-5
    assert jax.tree.map(jnp.shape, start) == jax.tree.map(jnp.shape, adapter)
    if name == "pissa":
        lifted = jpeft.lift(case.fn)(jpeft.attach(residual, start), case.x)
        np.testing.assert_allclose(lifted, case.fn(case.params, case.x), atol=1e-4)


@pytest.mark.parametrize("name", ["pissa", "olora", "corda_ipm", "corda_kpm", "lora_ga"])
def test_a_slice_of_a_stack_is_as_it_would_be_alone(name):
    w = zoo.normal(3, 8, 6)
    kernels = jpeft.Kernels((("w", jpeft.Kernel((3, 8, 6), (1,), (2,), (0,))),))
    stack = new({"w": w}, kernels)
    one_of = lambda values, i: {path: leaf[i] for path, leaf in values.items()}
    data = {"corda_ipm": inputs_of(stack), "corda_kpm": inputs_of(stack), "lora_ga": gradients_of(stack)}.get(name)
    run = {
        "corda_ipm": lambda a, p, d: corda(a, p, d),
        "corda_kpm": lambda a, p, d: corda(a, p, d, mode="kpm"),
        "lora_ga": lambda a, p, d: lora_ga(a, p, d),
    }.get(name, lambda a, p, d: STARTS[name](a, p))
    start, residual = run(stack, {"w": w}, data)
    for i in range(3):
        alone = jpeft.Kernels((("w", jpeft.Kernel((8, 6), (0,), (1,))),))
        one, left = run(new({"w": w[i]}, alone), {"w": w[i]}, None if data is None else one_of(data, i))
        np.testing.assert_allclose(residual["w"][i], left["w"], atol=1e-5)
        for leaf in ("a", "b"):
            np.testing.assert_allclose(start.trained["w"][leaf][i], one.trained["w"][leaf], atol=1e-4)


@pytest.mark.parametrize("name", [*STARTS, "loftq"])
def test_layers_that_are_not_adapted_keep_their_weights(name):
    case = zoo.get("linen_scan")
    adapter = adapter_of(case, layers_to_transform=[1])
    start, residual = (STARTS | {"loftq": loftq})[name](adapter, case.params)
    before, after = flatten(case.params), flatten(residual)
    for path in case.kernels:
        assert bool((before[path][0] == after[path][0]).all() and (before[path][2] == after[path][2]).all())
        assert float(jnp.abs(before[path][1] - after[path][1]).max()) > 1e-3
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(start))


def test_rank_0_and_other_leaves_are_left_alone():
    params = {"one": {"kernel": zoo.normal(5, 4), "bias": zoo.normal(4)}, "two": {"kernel": zoo.normal(4, 3)}}
    adapter = new(params, rank_pattern={"two": 0}, bias="all")
    start, residual = pissa(adapter, params)
    assert residual["two"]["kernel"] is params["two"]["kernel"]
    assert residual["one"]["bias"] is params["one"]["bias"]
    assert start.trained["two/kernel"]["a"].shape == (4, 0)
    assert largest_difference(jpeft.apply(residual, start), params) <= 1e-5


def test_half_precision_stays_half_precision(strict):
    params = {"kernel": zoo.normal(16, 12).astype(jnp.bfloat16)}
    with strict():
        start, residual = pissa(new(params), params)
        merged = jpeft.apply(residual, start)
    assert residual["kernel"].dtype == jnp.bfloat16 and start.trained["kernel"]["a"].dtype == jnp.float32
    assert largest_difference(merged, params) <= 0.01


def test_under_jit():
    params = {"kernel": zoo.normal(16, 12)}
    adapter = new(params)
    for start in (pissa, olora, loftq):
        one, other = start(adapter, params), jax.jit(start)(adapter, params)
        assert largest_difference(one, other) <= 1e-5
    one, other = corda(adapter, params, inputs_of(adapter)), jax.jit(corda)(adapter, params, inputs_of(adapter))
    assert largest_difference(one, other) <= 1e-4


# ---- PiSSA, randomised ----


def decaying(n, m):
    u, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((n, m)))
    v, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((m, m)))
    return {"kernel": jnp.asarray(np.float32(u * 0.7 ** np.arange(m) @ v))}


def test_randomised_pissa_is_near_the_exact_one_and_follows_its_key():
    params = decaying(60, 40)
    adapter = new(params, rank=4)
    exact = pissa(adapter, params).params
    near = pissa(adapter, params, niter=4, key=KEY).params
    rough = pissa(adapter, params, niter=0, key=KEY).params
    assert largest_difference(near, exact) < 1e-5 < largest_difference(rough, exact)
    assert largest_difference(pissa(adapter, params, niter=0, key=KEY).params, rough) == 0
    assert largest_difference(pissa(adapter, params, niter=0, key=jax.random.key(4)).params, rough) > 1e-5


# ---- orthogonal ----


def test_orthogonal_changes_nothing_yet_and_both_factors_learn():
    case = zoo.get("linen_scan")
    adapter = orthogonal(KEY, adapter_of(case))
    assert largest_difference(jpeft.apply(case.params, adapter), case.params) <= 1e-6
    loss = lambda trained: (case.fn(jpeft.apply(case.params, adapter.replace(trained=trained)), case.x) ** 2).sum()
    gradients = jax.grad(loss)(adapter.trained)
    assert all(float(jnp.abs(leaf).max()) > 1e-4 for leaf in jax.tree.leaves(gradients))
    assert all(float(jnp.abs(a[0] - a[1]).max()) > 1e-3 for a in jax.tree.leaves(adapter.trained))


def test_each_weight_draws_its_own():
    params = {"one": {"kernel": zoo.normal(5, 4)}, "two": {"kernel": zoo.normal(5, 4)}}
    adapter = orthogonal(KEY, new(params))
    alone = orthogonal(KEY, new(params, targets=["two"]))
    assert float(jnp.abs(adapter.trained["one/kernel"]["a"] - adapter.trained["two/kernel"]["a"]).max()) > 1e-3
    np.testing.assert_array_equal(adapter.trained["two/kernel"]["a"], alone.trained["two/kernel"]["a"])


# ---- LoRA-GA ----


def test_gradients_of_the_targets_alone():
    case = zoo.get("linen_dense")
    adapter = adapter_of(case, targets=["up"])
    loss = lambda params, x: (case.fn(params, x) ** 2).sum()
    found = weight_gradients(loss, adapter, case.params, case.x)
    whole = flatten(jax.grad(loss)(case.params, case.x))
    assert found.keys() == {"up/kernel"}
    np.testing.assert_allclose(found["up/kernel"], whole["up/kernel"], rtol=1e-6)


# ---- LoftQ ----

NF4 = [
    *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
]


def test_the_normal_float_table_is_the_published_one():
    np.testing.assert_allclose(normal_float_table(4), NF4, atol=1e-6)
    assert [len(normal_float_table(bits)) for bits in (2, 3, 4)] == [4, 8, 16]


def test_quantising_by_hand():
    """Blocks of 64 run over torch's row-major (out, in), and the last one may be short."""
    w = np.asarray(zoo.normal(50, 3))
    rows = w.T.reshape(-1)
    expected = np.empty_like(rows)
    for start in range(0, len(rows), 64):
        block = rows[start : start + 64]
        largest = np.abs(block).max()
        nearest = np.abs(block[:, None] / largest - np.array(NF4)).argmin(1)
        expected[start : start + 64] = np.array(NF4)[nearest] * largest
    np.testing.assert_allclose(quantize(jnp.asarray(w)), expected.reshape(3, 50).T, atol=1e-6)
    eight = np.asarray(quantize(jnp.asarray(w), 8))
    step = np.abs(w).max(0) / 127
    np.testing.assert_allclose(eight / step, np.round(w / step), atol=1e-3)
    assert not quantize(jnp.zeros((4, 2))).any()


@pytest.mark.parametrize(("bits", "alpha"), [(2, 5), (4, 2), (4, 5), (8, 5)])
def test_loftq_repairs_what_quantising_lost(bits, alpha):
    params = {"kernel": zoo.normal(96, 80)}
    lost = lambda base: float(jnp.linalg.norm(base["kernel"] - params["kernel"]))
    errors = []
    for rank, iterations in ((2, 1), (16, 1), (16, 5)):
        start, quantised = loftq(new(params, rank=rank, alpha=alpha), params, bits=bits, iterations=iterations)
        errors.append(lost(jpeft.apply(quantised, start)))
        assert len(np.unique(quantised["kernel"][:, 0])) <= 2 * 2**bits
    assert lost({"kernel": quantize(params["kernel"], bits)}) > errors[0] > errors[1]
    assert bits == 8 or errors[1] > errors[2]


def test_loftq_on_any_geometry():
    case = zoo.get("linen_attention")
    start, quantised = loftq(adapter_of(case, rank=4), case.params)
    before = largest_difference(quantised, case.params)
    assert largest_difference(jpeft.apply(quantised, start), case.params) < before


# ---- back to the original base ----


@pytest.mark.parametrize(
    ("geometry", "spec"),
    [
        ("linen_dense", {}),
        ("linen_dense", {"rank_stabilized": True}),
        ("linen_scan_axis_1", {"alpha_pattern": {"up": 9}, "rank_pattern": {"up": 3}}),
        ("linen_experts", {"rank_stabilized": True}),
    ],
)
def test_on_the_original_base(geometry, spec):
    case = zoo.get(geometry)
    initial, residual = pissa(adapter_of(case, factor_bias=geometry == "linen_dense", **spec), case.params)
    noisy = lambda leaf: leaf + 0.1 * zoo.normal(*leaf.shape)
    trained = initial.replace(trained=jax.tree.map(noisy, initial.trained))
    back = on_original_base(trained, initial)
    one, other = jpeft.apply(residual, trained), jpeft.apply(case.params, back)
    assert largest_difference(other, case.params) > 1e-2
    assert largest_difference(one, other) <= 1e-5
    again = jpeft.init(KEY, back.spec, case.params, kernels=product_kernels(case))
    assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, back)
    for path, leaves in back.constant.items():
        np.testing.assert_allclose(again.constant[path]["scaling"], leaves["scaling"], rtol=1e-6)


def test_only_a_start_of_the_same_adapter_goes_with_it():
    params = {"one": {"kernel": zoo.normal(5, 4)}, "two": {"kernel": zoo.normal(4, 3)}}
    adapter = new(params)
    with pytest.raises(jpeft.SpecError, match="differ first at 'one/kernel'"):
        on_original_base(adapter, new(params, rank_pattern={"one": 1}))
    other = adapter.replace(constant=jax.tree.map(lambda leaf: 2 * leaf, adapter.constant))
    with pytest.raises(jpeft.SpecError, match="scaling changed"):
        on_original_base(other, adapter)


# ---- what is refused ----


def test_what_no_start_is_known_for():
    case = zoo.get("linen_lm")
    adapter = new(case.params, case.found, targets=["embed", "dense"])
    with pytest.raises(jpeft.KernelError, match=r"embedding.*exclude=\['embed'\]"):
        pissa(adapter, case.params)
    conv = zoo.get("linen_conv_1d")
    with pytest.raises(jpeft.KernelError, match="kind 'conv'"):
        orthogonal(KEY, new(conv.params, conv.found, targets=".*"))


def test_mistakes_are_told():
    params = {"kernel": zoo.normal(8, 5)}
    adapter = new(params)
    start, residual = pissa(adapter, params)
    with pytest.raises(jpeft.SpecError, match="B is not zero"):
        olora(start, residual)
    with pytest.raises(jpeft.KernelError, match="at most 5, found 6"):
        pissa(new(params, rank=6), params)
    with pytest.raises(jpeft.KernelError, match="at most 2, found 3"):
        lora_ga(new(params, rank=3), params, {"kernel": params["kernel"]})
    with pytest.raises(jpeft.SpecError, match="alpha must be > 0"):
        pissa(new(params, alpha=0), params)
    with pytest.raises(jpeft.SpecError, match="go together"):
        pissa(adapter, params, niter=4)
    with pytest.raises(jpeft.SpecError, match="even rank; found 3"):
        orthogonal(KEY, new(params, rank=3))
    with pytest.raises(jpeft.KernelError, match="the adapter is for shape"):
        pissa(adapter, {"kernel": zoo.normal(8, 6)})
    with pytest.raises(jpeft.KernelError, match="has an adapter attached"):
        pissa(adapter, jpeft.attach(params, adapter))


def test_mistakes_in_what_was_measured_are_told():
    params = {"kernel": zoo.normal(8, 5)}
    adapter = new(params)
    with pytest.raises(jpeft.KernelError, match="no 'kernel'; the nearest are 'kernal'"):
        corda(adapter, params, {"kernal": jnp.eye(8)})
    with pytest.raises(jpeft.KernelError, match=r"has shape \(8, 8\); found \(5, 5\)"):
        corda(adapter, params, {"kernel": jnp.eye(5)})
    with pytest.raises(jpeft.KernelError, match="not finite"):
        corda(adapter, params, {"kernel": jnp.full((8, 8), jnp.nan)})
    with pytest.raises(jpeft.SpecError, match="'ipm' or 'kpm'"):
        corda(adapter, params, {"kernel": jnp.eye(8)}, mode="both")
    with pytest.raises(jpeft.KernelError, match="zero or not finite"):
        lora_ga(adapter, params, {"kernel": jnp.zeros((8, 5))})
    with pytest.raises(jpeft.SpecError, match="give a key"):
        lora_ga(adapter, params, {"kernel": params["kernel"]}, direction="random")
    with pytest.raises(jpeft.SpecError, match="scale must be one of"):
        lora_ga(adapter, params, {"kernel": params["kernel"]}, scale="none")
    with pytest.raises(jpeft.SpecError, match="bits"):
        loftq(adapter, params, bits=5)


def test_a_covariance_without_full_rank_is_damped():
    """Fewer inputs than directions: the part that they use is adapted, the rest stays."""
    params = {"kernel": zoo.normal(8, 5)}
    x = zoo.normal(1, 8)
    _, residual = corda(new(params, rank=1), params, {"kernel": x.T @ x})
    before, after = (float(jnp.linalg.norm(x @ p["kernel"])) for p in (params, residual))
    assert after < 0.05 * before
    assert float(jnp.linalg.norm(residual["kernel"])) > 0.5 * float(jnp.linalg.norm(params["kernel"]))
    assert bool(jnp.isfinite(corda(new(params), params, {"kernel": jnp.zeros((8, 8))}).params["kernel"]).all())


# ---- EVA ----


def batches_for(params, n=4, rows=24, seed=0, scales=None):
    """Moments of random inputs, with a spectrum of their own for each weight."""
    rng = np.random.default_rng(seed)
    stream = []
    for _ in range(n):
        sums = {}
        for i, (path, leaf) in enumerate(sorted(flatten(params).items())):
            size = leaf.shape[-2]
            x = jnp.asarray(np.float32(1 + rng.standard_normal((rows, size)) * (0.4 + 0.15 * i) ** np.arange(size)))
            sums[path] = moments(x, jnp.ones(rows, bool))
        stream.append(sums)
    return stream


PARAMS = {name: {"kernel": zoo.normal(6, 4, seed=i)} for i, name in enumerate("abc")}


def test_eva_deals_the_ranks_out_anew_and_the_spec_says_so():
    adapter = new(PARAMS, rank=2, alpha=3)
    found = eva(adapter, batches_for(PARAMS))
    ranks = {site.path: site.rank for site in found.sites}
    assert sum(ranks.values()) == 6 and ranks["a/kernel"] < ranks["c/kernel"] <= 4
    again = jpeft.init(KEY, found.spec, PARAMS)
    assert again.meta == found.meta
    for path, leaves in found.constant.items():
        np.testing.assert_allclose(leaves["scaling"], again.constant[path]["scaling"], rtol=1e-6)
        np.testing.assert_allclose(leaves["scaling"], 1.5, rtol=1e-6)
        a = found.trained[path]["a"]
        np.testing.assert_allclose(a.T @ a, np.eye(a.shape[1]), atol=1e-5)


def test_eva_may_leave_a_weight_out():
    """Where one input has four strong directions and the other none that stands out."""
    params = {name: {"kernel": zoo.normal(40, 4)} for name in "ab"}
    rows = lambda seed, scales: zoo.normal(400, 40, seed=seed, scale=1) * np.float32(scales)
    keep, strong = jnp.ones(400, bool), np.r_[9, 8, 7, 6, [0.1] * 36]
    stream = [{"a/kernel": moments(rows(1, np.ones(40)), keep), "b/kernel": moments(rows(2, strong), keep)}]
    found = eva(new(params, alpha=3), stream)
    assert {site.path: site.rank for site in found.sites} == {"a/kernel": 0, "b/kernel": 4}
    assert found.constant["a/kernel"]["scaling"] == 0
    lifted = jpeft.lift(lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"].T)
    assert lifted(jpeft.attach(params, found), jnp.ones((2, 40))).shape == (2, 40)
    assert jpeft.init(KEY, found.spec, params).meta == found.meta


def test_eva_without_redistribution_keeps_the_ranks_and_takes_stacks():
    w = zoo.normal(3, 6, 4)
    kernels = jpeft.Kernels((("w", jpeft.Kernel((3, 6, 4), (1,), (2,), (0,))),))
    x = jnp.stack([zoo.normal(40, 6, seed=i, scale=1) * 0.5 ** jnp.arange(6.0) for i in range(3)])
    sums = jax.vmap(lambda x: moments(x, jnp.ones(40, bool)))(x)
    found = eva(new({"w": w}, kernels), [{"w": sums}], rho=1)
    for i in range(3):
        _, _, vh = np.linalg.svd(np.asarray(x[i] - x[i].mean(0)), full_matrices=False)
        a = found.trained["w"]["a"][i]
        np.testing.assert_allclose(a @ a.T, vh[:2].T @ vh[:2], atol=1e-5)
    with pytest.raises(jpeft.KernelError, match="rho=1"):
        eva(new({"w": w}, kernels), [{"w": sums}])


def test_eva_gives_up_with_a_reason():
    adapter, stream = new(PARAMS), batches_for(PARAMS)
    with pytest.raises(jpeft.SpecError, match="stream ended"):
        eva(adapter, iter(stream[:1]))
    with pytest.raises(jpeft.SpecError, match="not converged after 5"):
        eva(adapter, stream, tau=1.0, max_batches=5)
    with pytest.raises(jpeft.KernelError, match="no 'b/kernel'"):
        eva(adapter, [{path: sums for path, sums in batch.items() if path != "b/kernel"} for batch in stream])
    with pytest.raises(jpeft.SpecError, match="rho must be"):
        eva(adapter, stream, rho=0.5)
    with pytest.raises(jpeft.KernelError, match="rho \\* rank is 8"):
        eva(new(PARAMS, rank=4), stream)
    nothing = lambda batch: jax.tree.map(jnp.zeros_like, batch)
    with pytest.raises(jpeft.KernelError, match="saw no input"):
        eva(adapter, [nothing(batch) for batch in stream])


# ---- the tap ----


def gram(*inputs):
    rows = [np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in inputs]
    return sum(x.T @ x for x in rows)


def assert_sums(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def tapped(case, **options):
    return tap(case.fn, **options)(jpeft.attach(case.params, adapter_of(case)), case.x)


def test_what_goes_into_each_layer():
    case = zoo.get("linen_dense")
    params = flatten(case.params)
    hidden = jax.nn.silu(case.x @ params["up/kernel"] + params["up/bias"])
    found = tapped(case)
    for path, x in (("up/kernel", case.x), ("down/kernel", hidden)):
        assert_sums(found[path]["gram"], gram(x))
        np.testing.assert_allclose(found[path]["sum"], x.reshape(-1, x.shape[-1]).sum(0), rtol=1e-5)
        assert found[path]["count"] == 6


@pytest.mark.parametrize("geometry", ["linen_scan", "linen_scan_axis_1", "linen_scan_remat"])
def test_each_layer_of_a_scan(geometry):
    """The stack against its layers one after another."""
    case = zoo.get(geometry)
    found = jax.jit(lambda params, x: tap(case.fn)(params, x))(jpeft.attach(case.params, adapter_of(case)), case.x)
    axis = 1 if geometry == "linen_scan_axis_1" else 0
    x, params = case.x, flatten(case.params)
    at = lambda name, i: jnp.take(params[f"layers/mlp/{name}"], i, axis)
    for i in range(zoo.LAYERS):
        hidden = jax.nn.silu(x @ at("up/kernel", i) + at("up/bias", i))
        assert_sums(found["layers/mlp/up/kernel"]["gram"][i], gram(x))
        assert_sums(found["layers/mlp/down/kernel"]["gram"][i], gram(hidden))
        x = x + jnp.tanh(hidden @ at("down/kernel", i) + at("down/bias", i))
    assert found["layers/mlp/up/kernel"]["count"].tolist() == [6, 6, 6]


def test_several_uses_add_up():
    case = zoo.get("linen_shared")
    params = flatten(case.params)
    dense = lambda x: x @ params["dense/kernel"] + params["dense/bias"]
    found = tapped(case)["dense/kernel"]
    assert_sums(found["gram"], gram(case.x, jnp.tanh(dense(case.x))))
    assert found["count"] == 12


def test_axes_in_any_order():
    """Contracted axes apart in the weight, the weight transposed on its way, and first in the product."""
    fn = lambda p, x: jnp.einsum("hedo,bhtd->btoe", p["w"].transpose(2, 3, 0, 1), x)  # w (d, o, h, e)
    case = zoo.plain(fn, zoo.normal(2, 5, 3, 4, scale=1), w=zoo.normal(4, 2, 5, 3))
    assert case.found["w"].contracted == (0, 2)
    rows = case.x.transpose(0, 2, 3, 1).reshape(-1, 4 * 5)  # in the weight's order: d, then h
    assert_sums(tapped(case)["w"]["gram"], gram(rows))


def test_experts_have_inputs_of_their_own():
    x = zoo.normal(2, 7, 6)
    case = zoo.plain(lambda p, x: jnp.einsum("etd,edf->etf", x, p["w"]), x, w=zoo.normal(2, 6, 5))
    found = tapped(case)["w"]
    for i in range(2):
        assert_sums(found["gram"][i], gram(x[i]))


def test_a_branch_that_is_not_taken_sees_nothing():
    def fn(params, x):
        return jax.lax.cond(x.sum() > 0, lambda x: x @ params["one"], lambda x: x @ params["two"], x)

    case = zoo.plain(fn, jnp.ones((3, 4)), one=zoo.normal(4, 5), two=zoo.normal(4, 5))
    found = tapped(case)
    assert found["one"]["count"] == 3 and found["two"]["count"] == 0 and not found["two"]["gram"].any()


def test_rows_that_do_not_count():
    case = zoo.get("linen_dense")
    mask = jnp.array([[True, True, False], [True, False, False]])
    found = tapped(case, rows=lambda params, x: mask)
    assert_sums(found["up/kernel"]["gram"], gram(case.x[mask]))
    assert found["up/kernel"]["count"] == 3
    with pytest.raises(jpeft.KernelError, match="sees 6 rows, and rows= tells of 5"):
        tapped(case, rows=lambda params, x: jnp.ones(5))


def test_the_base_is_what_runs_and_half_precision_is_summed_in_full():
    case = zoo.plain(lambda p, x: jnp.tanh(x @ p["one"]) @ p["two"], one=zoo.normal(8, 8), two=zoo.normal(8, 8))
    adapter = adapter_of(case)
    noisy = adapter.replace(trained=jax.tree.map(lambda leaf: leaf + 1, adapter.trained))
    one, other = (tap(case.fn)(jpeft.attach(case.params, a), case.x) for a in (adapter, noisy))
    assert largest_difference(one, other) == 0
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), case.params)
    found = tap(case.fn)(jpeft.attach(half, adapter), case.x.astype(jnp.bfloat16))
    assert_sums(found["one"]["gram"], gram(case.x.astype(jnp.bfloat16)))


def test_a_statistic_of_one_s_own():
    largest = lambda x, keep: {"norms": (x**2).sum(-1).max()}
    case = zoo.get("linen_dense")
    np.testing.assert_allclose(
        tapped(case, statistic=largest)["up/kernel"]["norms"], (case.x**2).sum(-1).max(), rtol=1e-6
    )


def test_what_cannot_be_tapped_is_told():
    case = zoo.get("linen_lm")
    adapter = new(case.params, case.found, targets=["embed", "dense"])
    with pytest.raises(jpeft.LiftError, match="'embed/embedding' meets no product.*gather"):
        tap(case.fn)(jpeft.attach(case.params, adapter), case.x)
    with pytest.raises(jpeft.LiftError, match="attach an adapter first"):
        tap(case.fn)(case.params, case.x)


def test_inputs_that_the_results_do_not_depend_on_are_missed_and_said_to_be():
    case = zoo.plain(lambda p, x: jnp.argmax(x @ p["w"], -1), w=zoo.normal(8, 5))
    with pytest.raises(jpeft.KernelError, match="'w' saw no input"):
        covariance(tapped(case, statistic=scaled_gram))
