"""The fast path against the definition, on models in every style, and what it takes and returns."""

import inspect
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

import jpeft
import zoo
from agreement import (
    QUICK,
    adapter_for,
    assert_close,
    by_definition,
    by_fast_path,
    check,
    functional,
    is_floating,
    outputs_and_gradients,
    perturbed,
    reference,
)

BF16 = jnp.dtype(jnp.bfloat16)


@pytest.mark.parametrize("name", zoo.CASES)
def test_values_and_every_gradient(name):
    check(name)


@pytest.mark.parametrize("name", zoo.CASES)
def test_coverage_says_which_weights_stay_factored(name):
    case = zoo.get(name)
    adapter = adapter_for(case)
    found = jpeft.coverage(case.fn, jpeft.attach(case.params, adapter), case.x)
    assert {row.path for row in found.rows} == {*case.kernels, *case.by_hand}
    assert {row.path for row in found.rows if row.how != "factored"} == set(case.dense)
    for row in found.rows:
        assert row.how == "factored" or "(" in row.uses[-1], "a dense weight says why"


@pytest.mark.parametrize("name", ["linen_dense", "linen_tied", "einsum_attention", "linen_conv_1d", "linen_scan_remat"])
def test_forward_mode(name):
    """Both modes: the pushforward of a tangent is what the gradient says."""
    check(name, forward_mode=True)
    case = zoo.get(name)
    adapter = adapter_for(case)
    run = by_fast_path(case, adapter, forward_mode=True)
    tangent = jax.tree.map(jnp.cos, adapter.trained)

    def pushed(trained):
        along = lambda trained: functional(run(trained, case.params, case.x))
        return jax.jvp(along, (trained,), (tangent,))[1], jax.linearize(along, trained)[1](tangent)

    gradient = reference(name)[1][0]
    products = jax.tree.leaves(jax.tree.map(lambda g, t: np.sum(np.float64(g) * np.float64(t)), gradient, tangent))
    atol = 1e-4 * max(map(abs, products))
    np.testing.assert_allclose(jax.jit(pushed)(adapter.trained), [sum(products)] * 2, atol=atol)


@pytest.mark.parametrize("name", ["linen_tied", "linen_conv_1d", "linen_experts", "linen_scan"])
def test_rank_0(name):
    """The base's own values and gradients, and empty ones for the adapter; an optimizer can step."""
    case = zoo.get(name)
    adapter = adapter_for(case, rank=0)
    args = adapter.trained, case.params, case.x
    base = outputs_and_gradients(lambda t, params, x: case.fn(params, x), *args, options=QUICK)
    expected = outputs_and_gradients(by_definition(case, adapter), *args, options=QUICK)
    found, (trained, params, x) = outputs_and_gradients(by_fast_path(case, adapter), *args)
    assert_close((found, (trained, params, x)), expected)
    assert_close((found, params), (base[0], base[1][1]))
    optimizer = optax.adamw(1e-2)
    updates, _ = optimizer.update(trained, optimizer.init(adapter.trained), adapter.trained)
    assert jax.tree.map(jnp.shape, optax.apply_updates(adapter.trained, updates)) == jax.tree.map(jnp.shape, trained)


def test_rank_0_of_one_weight():
    case = zoo.get("linen_dense")
    adapter = adapter_for(case, rank_pattern={"up": 0})
    assert [site.rank for site in adapter.sites] == [2, 0]
    expected = outputs_and_gradients(by_definition(case, adapter), adapter.trained, case.params, case.x, options=QUICK)
    assert_close(outputs_and_gradients(by_fast_path(case, adapter), adapter.trained, case.params, case.x), expected)


@pytest.mark.parametrize("name", ["linen_dense", "linen_scan", "experts_batched", "linen_tied", "linen_conv_1d"])
def test_bf16_is_close_to_fp32(name):
    """bf16 params and activations, fp32 factors: as near to the fp32 result as bf16 is, and no cast is left out."""
    case = zoo.get(name)
    adapter = adapter_for(case)
    half = lambda tree: jax.tree.map(lambda v: jnp.asarray(np.asarray(v, BF16)) if is_floating(v) else v, tree)
    params, x = half(case.params), half(case.x)
    with jax.numpy_dtype_promotion("strict"):
        found, gradients = outputs_and_gradients(by_fast_path(case, adapter), adapter.trained, params, x)
    expected, expected_gradients = reference(name)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {BF16}
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients[0])} == {jnp.dtype(jnp.float32)}
    assert_close(found, expected, 0.05)
    assert_close(gradients[0], expected_gradients[0], 0.1)


@pytest.mark.parametrize("name", ["linen_dense", "linen_tied", "linen_conv_1d", "linen_scan"])
def test_bf16_factors(name):
    """Factors of half the size are legal, and promote nothing."""
    case = zoo.get(name)
    adapter = adapter_for(case, dtype=jnp.bfloat16, factor_bias=name == "linen_dense")
    expected = outputs_and_gradients(by_definition(case, adapter), adapter.trained, case.params, case.x, options=QUICK)
    with jax.numpy_dtype_promotion("strict"):
        found = outputs_and_gradients(by_fast_path(case, adapter), adapter.trained, case.params, case.x)
    assert_close(found[0], expected[0], 0.05)
    assert {leaf.dtype for leaf in jax.tree.leaves(found[1][0])} == {BF16}


@pytest.mark.parametrize("name", ["linen_dense", "linen_tied", "experts_batched"])
@pytest.mark.parametrize("kind", [list, dict])
def test_several_adapters_with_weights(name, kind):
    case = zoo.get(name)
    pair = [adapter_for(case, seed=1), adapter_for(case, seed=2, rank=3, alpha=1)]
    weights = [0.5, -1.5]
    adapters, amounts = (
        (pair, weights) if kind is list else ({"lora": pair[0], "self_attn": pair[1]}, {"self_attn": -1.5, "lora": 0.5})
    )
    trained = [adapter.trained for adapter in pair]
    new = lambda trained: [adapter.replace(trained=t) for adapter, t in zip(pair, trained, strict=True)]
    put = lambda trained: new(trained) if kind is list else dict(zip(adapters, new(trained), strict=True))
    slow = lambda t, p, x: case.fn(jpeft.apply(p, put(t), amounts), x)
    fast = lambda t, p, x: jpeft.lift(case.fn)(jpeft.attach(p, put(t), amounts), x)
    expected = outputs_and_gradients(slow, trained, case.params, case.x, options=QUICK)
    assert_close(outputs_and_gradients(fast, trained, case.params, case.x), expected)
    by_hand = jpeft.apply(case.params, pair[0], [0.5])
    delta = jax.tree.map(
        lambda one, other, base: one + other - base, by_hand, jpeft.apply(case.params, pair[1], [-1.5]), case.params
    )
    assert_close(jpeft.apply(case.params, adapters, amounts), delta, 1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linen_dense", {"factor_bias": True}),
        ("linen_scan", {"factor_bias": True}),
        ("linen_scan_axis_1", {"factor_bias": True}),
        ("linen_dense_general", {"factor_bias": True}),
        ("linen_conv_1d", {"factor_bias": True}),
        ("linen_dense", {"bias": "all"}),
        ("linen_lm", {"bias": "lora_only", "targets": "dense"}),
        ("linen_lm", {"modules_to_save": ["lm_head", "norm"]}),
        ("linen_lm", {"modules_to_save": "embed", "targets": "dense", "bias": "all", "factor_bias": True}),
        ("nnx_state", {"modules_to_save": ["norm"], "bias": "all", "factor_bias": True, "targets": ["up"]}),
        ("linen_loop", {"rank_pattern": {"up": 1, "layers_1.mlp.down": 3}, "alpha_pattern": {"down": 7}}),
        ("linen_scan", {"layers_to_transform": [0, 2], "rank_stabilized": True}),
    ],
)
def test_options(name, options):
    case = zoo.get(name)
    options = {**options, "targets": [options["targets"]]} if isinstance(options.get("targets"), str) else options
    adapter = adapter_for(case, **options)
    expected = outputs_and_gradients(by_definition(case, adapter), adapter.trained, case.params, case.x, options=QUICK)
    assert_close(outputs_and_gradients(by_fast_path(case, adapter), adapter.trained, case.params, case.x), expected)


def test_a_bias_of_b_without_a_base_bias():
    """No plain params can hold it, so `apply` refuses and names `lift`, which adds it to the product."""
    case = zoo.get("transposed")
    adapter = adapter_for(case, factor_bias=True)
    with pytest.raises(jpeft.KernelError, match=r"no 'bias' to hold it.*lift"):
        jpeft.apply(case.params, adapter)
    found = jpeft.lift(case.fn)(jpeft.attach(case.params, adapter), case.x)
    factors = {path: {"a": leaves["a"], "b": leaves["b"]} for path, leaves in adapter.trained.items()}
    dense = jpeft.apply(case.params, adapter.replace(trained=factors))
    beside = {path: adapter.constant[path]["scaling"] * adapter.trained[path]["bias"] for path in adapter.trained}
    hidden = jnp.tanh(case.x @ dense["square"].T + beside["square"])
    assert_close(found, jnp.tanh(hidden @ dense["w"].T + beside["w"]))


@pytest.mark.parametrize("name", ["linen_dense", "linen_tied", "linen_scan", "linen_conv_1d", "experts_batched"])
def test_vmap_over_adapters(name):
    """One program for many adapters: trained leaves and scalings stacked."""
    case = zoo.get(name)
    adapters = [adapter_for(case, seed=seed) for seed in (1, 2)]
    adapters[1] = adapters[1].replace(constant=jax.tree.map(lambda s: 2 * s, adapters[1].constant))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
    run = jpeft.lift(case.fn)
    loss = lambda adapter: (run(jpeft.attach(case.params, adapter), case.x) ** 2).sum()
    slow = lambda adapter: (case.fn(jpeft.apply(case.params, adapter), case.x) ** 2).sum()
    found = jax.jit(jax.vmap(jax.value_and_grad(loss)))(stacked)
    each = jax.jit(jax.value_and_grad(slow))
    assert_close(found, jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(each, adapters)))


def test_vmap_of_the_lifted_function_over_a_batch():
    case = zoo.get("linen_dense")
    adapter = adapter_for(case)
    run, params = jpeft.lift(case.fn), jpeft.attach(case.params, adapter)
    expected = case.fn(jpeft.apply(case.params, adapter), case.x)
    assert_close(jax.vmap(run, in_axes=(None, 0))(params, case.x), expected)


def test_second_derivatives():
    case = zoo.get("vmapped_model")
    adapter = adapter_for(case)

    def twice(run):
        inner = lambda t: (run(t, case.params, case.x) ** 2).sum()
        return jax.jit(jax.grad(lambda t: sum((g**2).sum() for g in jax.tree.leaves(jax.grad(inner)(t)))))(
            adapter.trained
        )

    expected = twice(by_definition(case, adapter))
    assert_close(twice(by_fast_path(case, adapter)), expected)
    assert_close(twice(by_fast_path(case, adapter, forward_mode=True)), expected)


def test_the_base_is_trained_too():
    """A caller who also trains norms or the base gets their gradients, not a silent zero."""
    case = zoo.get("linen_lm")
    adapter = adapter_for(case)
    _, (_, params, _) = outputs_and_gradients(by_fast_path(case, adapter), adapter.trained, case.params, case.x)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_without_jit():
    case = zoo.get("stacked_by_hand")
    adapter = adapter_for(case)
    assert_close(
        jpeft.lift(case.fn)(jpeft.attach(case.params, adapter), case.x),
        case.fn(jpeft.apply(case.params, adapter), case.x),
    )


def test_no_retrace_and_no_leak():
    """One trace for new values of adapter, params and input; and no tracer outlives it."""
    case = zoo.get("linen_scan")
    traces = []

    def fn(params, x):
        traces.append(1)
        return case.fn(params, x)

    step = jax.jit(lambda adapter, params, x: jpeft.lift(fn)(jpeft.attach(params, adapter), x))
    for seed in range(3):
        step(adapter_for(case, seed=seed), jax.tree.map(partial(jnp.add, seed), case.params), case.x + seed)
    assert len(traces) == 1
    with jax.checking_leaks():
        jax.jit(jax.grad(lambda t: by_fast_path(case, adapter_for(case))(t, case.params, case.x).sum()))(
            adapter_for(case).trained
        )


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool, scale=None):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(5, name="dense")(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return x if scale is None else x * scale


def test_mutable_collections_keywords_and_static_arguments():
    """Batch statistics flow through; bools, strings and None are static; keyword arrays pass."""
    model, x = Normed(), zoo.X
    variables = model.init(jax.random.key(0), x, train=False)
    adapter = perturbed(jpeft.init(jax.random.key(1), jpeft.LoRA(rank=2), variables["params"]))
    other = {"batch_stats": variables["batch_stats"]}
    options = {
        "train": True,
        "mutable": ["batch_stats"],
        "rngs": {"dropout": jax.random.key(2)},
        "scale": jnp.full(5, 2.0),
    }
    found = jpeft.lift(model.apply)({"params": jpeft.attach(variables["params"], adapter), **other}, x, **options)
    expected = model.apply({"params": jpeft.apply(variables["params"], adapter), **other}, x, **options)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert_close(found, expected)
    still = jpeft.lift(model.apply)({"params": jpeft.attach(variables["params"], adapter), **other}, x, train=False)
    assert np.abs(still - found[0]).max() > 0.1


def test_the_signature_stays_and_equal_lifts_are_equal():
    assert inspect.signature(jpeft.lift(zoo.attention)) == inspect.signature(zoo.attention)
    assert jpeft.lift(zoo.attention) == jpeft.lift(zoo.attention) != jpeft.lift(zoo.attention, forward_mode=True)


def test_without_adapters_it_is_the_function_itself():
    case = zoo.get("linen_dense")
    assert_close(jpeft.lift(case.fn)(case.params, case.x), case.fn(case.params, case.x), 0)


def test_lifted_twice():
    case = zoo.get("linen_dense")
    params = jpeft.attach(case.params, adapter_for(case))
    assert_close(jpeft.lift(jpeft.lift(case.fn))(params, case.x), jpeft.lift(case.fn)(params, case.x), 0)


def test_what_comes_out_is_plain():
    """A function may return its params, adapted as `apply` has them, and in the tree they came in."""
    case = zoo.get("linen_frozen_dict")
    adapter = adapter_for(case)
    loss, params = jpeft.lift(lambda params, x: (case.fn(params, x).sum(), params))(
        jpeft.attach(case.params, adapter), case.x
    )
    assert isinstance(params, FrozenDict)
    assert_close(params, jpeft.apply(case.params, adapter))


def test_literal_and_repeated_outputs():
    params, adapter = {"kernel": zoo.normal(8, 8)}, None
    adapter = perturbed(jpeft.init(jax.random.key(0), jpeft.LoRA(rank=1), params))
    fn = lambda params, x: (y := x @ params["kernel"], y, 3, x, None, {"one": jnp.ones(())})
    assert_close(jpeft.lift(fn)(jpeft.attach(params, adapter), zoo.X), fn(jpeft.apply(params, adapter), zoo.X))


# ---- what it refuses ----


def test_a_weight_that_is_never_read():
    case = zoo.get("linen_dense")
    params = jpeft.attach(case.params, adapter_for(case))
    with pytest.raises(jpeft.LiftError, match=r"never read.*'down/kernel'.*exclude="):
        jpeft.lift(lambda params, x: x @ params["up"]["kernel"])(params, case.x)


def test_a_weight_scanned_but_not_read():
    case = zoo.get("scan_of_scan")
    params = jpeft.attach(case.params, adapter_for(case))
    with pytest.raises(jpeft.LiftError, match="'w'"):
        jpeft.lift(lambda p, x: jax.lax.scan(lambda x, w: (x @ p["shared"], None), x, p["w"])[0])(params, case.x)


def test_an_nnx_module():
    model = zoo.NnxMlp(nnx.Rngs(0))
    graph, state = nnx.split(model)
    params = jpeft.attach(state, jpeft.init(jax.random.key(0), jpeft.LoRA(), state))
    for call in (jpeft.lift(lambda model, x: model(x)), lambda m, x: jpeft.coverage(lambda m, x: m(x), m, x)):
        with pytest.raises(jpeft.LiftError, match=r"NnxMlp.*nnx\.split"):
            call(nnx.merge(graph, params), zoo.X)
    with pytest.raises(jpeft.LiftError, match=r"NnxMlp.*nnx\.split"):
        jpeft.kernels(lambda model, x: model(x), model, zoo.X)


def test_attached_params_outside_of_a_lifted_function():
    case = zoo.get("linen_dense")
    params = jpeft.attach(case.params, adapter_for(case))
    for fn in (case.fn, lambda p, x: x @ p["up"]["kernel"], lambda p, x: jnp.dot(x, p["up"]["kernel"])):
        with pytest.raises(jpeft.LiftError, match=r"'(up|down)/kernel'.*jpeft\.lift"):
            fn(params, case.x)


def test_a_weight_in_a_closure():
    """Params that the function closes over are not its arguments."""
    case = zoo.get("vmapped_model")
    params = jpeft.attach(case.params, adapter_for(case))
    with pytest.raises(jpeft.LiftError, match=r"jpeft\.lift"):
        jpeft.lift(lambda x: x @ params["up"])(case.x)
