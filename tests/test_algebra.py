"""Laws of the algebra: what is exact, what is best, what is refused; stacks, convolutions, embeddings, rank 0, jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.algebra import combine, interpolate, scale, shrink, sparsify, subtract, to_lora
from jpeft.algebra.combine import KINDS
from jpeft.kernel import to_matrix
from jpeft.methods.lora import matrices as to_matrices
from jpeft.tree import flatten
from nearness import assert_as_near_as

KERNELS = jpeft.Kernels(
    (
        ("conv/kernel", jpeft.Kernel((3, 4, 6), (0, 1), (2,), kind="conv")),
        ("dense/kernel", jpeft.Kernel((7, 6), (0,), (1,))),
        ("stack/kernel", jpeft.Kernel((3, 5, 2, 4), (1,), (2, 3), (0,))),
        ("table/embedding", jpeft.Kernel((9, 4), (0,), (1,), kind="embedding")),
    )
)
SPARSE = [kind for kind in KINDS if kind.startswith(("ties", "dare", "magnitude"))]


def noise(tree, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.standard_normal(leaf.shape), leaf.dtype), tree)


PARAMS = noise(
    {
        "conv": {"kernel": jnp.ones((3, 4, 6)), "bias": jnp.ones(6)},
        "dense": {"kernel": jnp.ones((7, 6))},
        "stack": {"kernel": jnp.ones((3, 5, 2, 4))},
        "table": {"embedding": jnp.ones((9, 4))},
    },
    0,
)


def adapter_of(seed=1, spec=None, **options):
    spec = jpeft.LoRA(**{"rank": 2, "alpha": 3, "targets": ".*", **options}) if spec is None else spec
    adapter = jpeft.init(jax.random.key(0), spec, PARAMS, kernels=KERNELS)
    return adapter.replace(trained=noise(adapter.trained, seed))


def change(*adapters, weights=None):
    """ΔW by path in fp32, of one or of several with weights."""
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    applied = jpeft.apply(zeros, list(adapters), weights)
    return {path: to_matrix(leaf, KERNELS[path]) for path, leaf in flatten(applied).items() if path in KERNELS}


def change_in_float64(adapters, weights, path):
    """ΔW of several with weights."""

    def one(adapter, weight):
        leaves = to_matrices(adapter.leaves(path), KERNELS[path])
        a, b, scaling = (np.asarray(leaves[name], np.float64) for name in ("a", "b", "scaling"))
        return weight * scaling[..., None, None] * (a @ b)

    return sum(one(adapter, weight) for adapter, weight in zip(adapters, weights, strict=True))


def cut(matrix, rank):
    """The best of this rank, in the matrix's own precision."""
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]


def assert_close(one, other, atol=2e-5):
    assert one.keys() == other.keys()
    for path in one:
        np.testing.assert_allclose(one[path], other[path], atol=atol, err_msg=path)


def options_of(kind, density=0.5):
    options = {"density": density} if kind in SPARSE else {}
    return options | ({"key": jax.random.key(7)} if kind.startswith("dare") else {})


def test_cat_is_the_weighted_sum_of_the_changes():
    adapters = adapter_of(1), adapter_of(2, rank=3, alpha=4, targets=["dense", "stack"]), adapter_of(3, rank=1)
    weights = [0.7, -0.4, 1.3]
    new = combine(adapters, weights, "cat")
    assert_close(change(new), change(*adapters, weights=weights))
    assert {site.path: site.rank for site in new.sites} == {
        "conv/kernel": 3,
        "dense/kernel": 6,
        "stack/kernel": 6,
        "table/embedding": 3,
    }


def test_subtract_interpolate_and_scale_are_exact():
    one, two = adapter_of(1), adapter_of(2, rank=3, targets=["dense", "conv"])
    assert_close(change(subtract(one, two)), change(one, two, weights=[1, -1]))
    assert_close(change(interpolate(one, two, 0.3)), change(one, two, weights=[0.7, 0.3]))
    assert_close(change(scale(one, -0.25)), change(one, weights=[-0.25]))
    assert max(float(jnp.abs(leaf).max()) for leaf in change(subtract(one, one)).values()) < 1e-5


def test_a_scaled_spec_says_the_scaling():
    adapter = adapter_of(alpha=6, alpha_pattern={"dense": 5}, rank_stabilized=True)
    new = scale(adapter, 0.5)
    again = jpeft.init(jax.random.key(0), new.spec, PARAMS, kernels=KERNELS)
    for path, leaves in again.constant.items():
        np.testing.assert_allclose(leaves["scaling"], new.constant[path]["scaling"], rtol=1e-6)
    assert scale(adapter, jnp.float32(0.5)).spec == adapter.spec


@pytest.mark.parametrize("kind", ["cat", "svd", "linear"])
def test_the_spec_of_a_combination_makes_an_adapter_of_its_shapes(kind):
    adapters = adapter_of(1, targets=["dense", "table"]), adapter_of(2, targets=["dense", "stack"])
    new = combine(adapters, [1, 2], kind)
    again = jpeft.init(jax.random.key(0), new.spec, PARAMS, kernels=KERNELS)
    assert again.sites == new.sites
    assert jax.tree.map(jnp.shape, again.trained) == jax.tree.map(jnp.shape, new.trained)
    jax.tree.map(np.testing.assert_array_equal, again.constant, new.constant)


def test_linear_has_the_cross_terms_and_the_sign():
    one, two = adapter_of(1, targets=["dense"]), adapter_of(2, targets=["dense"])
    new = combine([one, two], [0.7, -0.4], "linear").trained["dense/kernel"]
    (a1, b1), (a2, b2) = ((x.trained["dense/kernel"]["a"], x.trained["dense/kernel"]["b"]) for x in (one, two))
    root1, root2 = np.sqrt(0.7 * 1.5), np.sqrt(0.4 * 1.5)
    np.testing.assert_allclose(new["a"], root1 * a1 - root2 * a2, atol=1e-6)
    np.testing.assert_allclose(new["b"], root1 * b1 + root2 * b2, atol=1e-6)


def test_svd_is_the_best_of_its_rank():
    adapters = adapter_of(1), adapter_of(2, rank=3)
    total = change(*adapters, weights=[0.5, 2.0])
    best = change(combine(adapters, [0.5, 2.0], "svd", rank=2))
    for path, matrix in total.items():
        truth = cut(change_in_float64(adapters, [0.5, 2.0], path), 2)
        assert_as_near_as(best[path], cut(np.asarray(matrix), 2), truth, 2e-5, path)


@pytest.mark.parametrize("kind", ["ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd"])  # dare's masks differ
def test_a_stack_is_combined_as_its_layers_apart(kind):
    adapters = adapter_of(1, targets=["stack"]), adapter_of(2, targets=["stack"], layers_to_transform=[0, 2])
    together = change(combine(adapters, [0.7, -0.4], kind, **options_of(kind)))["stack/kernel"]
    for layer in range(3):
        single = [alone(adapter, layer) for adapter in adapters if layer != 1 or adapter.sites[0].layers is None]
        new = combine(single, [0.7, -0.4][: len(single)], kind, **options_of(kind))
        dense = jpeft.apply({"kernel": jnp.zeros((5, 2, 4))}, new)["kernel"]
        np.testing.assert_allclose(together[layer], dense.reshape(5, 8), atol=1e-5)


def alone(adapter, layer):
    """The adapter of one layer of the stack, as of a model whose layers are not stacked."""
    kernels = jpeft.Kernels((("kernel", jpeft.Kernel((5, 2, 4), (0,), (1, 2))),))
    spec = jpeft.LoRA(rank=2, alpha=3, targets=".*")
    new = jpeft.init(jax.random.key(0), spec, {"kernel": jnp.zeros((5, 2, 4))}, kernels=kernels)
    return new.replace(trained={"kernel": {n: leaf[layer] for n, leaf in adapter.trained["stack/kernel"].items()}})


@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_ties_by_its_definition_in_numpy(sign):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 6, 5))
    w = np.array([0.7, -0.4, 1.3])
    sparse = np.where(np.abs(x) >= np.sort(np.abs(x).reshape(3, -1))[:, -15, None, None], x, 0)
    vote = sparse.sum(0) if sign == "total" else np.sign(sparse).sum(0)
    agrees = np.sign(sparse) == np.where(vote >= 0, 1, -1)
    expected = (w[:, None, None] * sparse * agrees).sum(0) / np.maximum(agrees.sum(0), 1)
    pruned = [sparsify.largest(jnp.asarray(one, jnp.float32), 0.5) for one in x]
    found = sparsify.elected_mean(pruned, [jnp.float32(one) for one in w], sign)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_dare_keeps_its_share_and_its_expectation():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 5)), jnp.float32)
    draws = jax.vmap(lambda key: sparsify.random(key, x, 0.3))(jax.random.split(jax.random.key(0), 4000))
    assert abs(float((draws != 0).mean()) - 0.3) < 0.01
    np.testing.assert_allclose(draws.mean(0), x, atol=6 * float(jnp.abs(x).max()) * np.sqrt(0.7 / 0.3 / 4000))
    kept = np.asarray(draws) != 0
    np.testing.assert_allclose(np.asarray(draws)[kept] * 0.3, np.broadcast_to(x, draws.shape)[kept], rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "same"), [("dare_linear", "linear"), ("magnitude_prune", "linear"), ("dare_ties", "ties")]
)
def test_pruning_nothing_is_not_pruning(kind, same):
    adapters = adapter_of(1, targets=["dense"]), adapter_of(2, targets=["dense"])
    one, other = (combine(adapters, [0.7, -0.4], k, **options_of(k, density=1)) for k in (kind, same))
    jax.tree.map(np.testing.assert_array_equal, one.trained, other.trained)


def test_dare_ties_of_adapters_in_numpy():
    """The whole of it for A, the masks read off runs in which one adapter acts alone."""
    adapters = adapter_of(1, targets=["dense"]), adapter_of(2, targets=["dense"])
    run = lambda kind, w: combine(adapters, w, kind, density=0.6, key=jax.random.key(3)).trained["dense/kernel"]["a"]
    root = np.sqrt(1.5)
    pruned = [np.asarray(run("dare_linear", w)) / root for w in ([1, 0], [0, 1])]
    for mine, adapter in zip(pruned, adapters, strict=True):
        a = np.asarray(adapter.trained["dense/kernel"]["a"])
        np.testing.assert_allclose(mine, np.where(mine == 0, 0, a / 0.6), rtol=1e-5)
    agrees = [np.sign(x) == np.where(sum(pruned) >= 0, 1, -1) for x in pruned]
    total = root * (np.sqrt(0.7) * pruned[0] * agrees[0] - np.sqrt(0.4) * pruned[1] * agrees[1])
    np.testing.assert_allclose(run("dare_ties", [0.7, -0.4]), total / np.maximum(sum(agrees, 0), 1), atol=1e-5)


def test_dare_is_random_by_its_key_alone_and_different_for_every_tensor():
    adapters = [adapter_of(1, targets=["dense", "table"])] * 2
    run = lambda seed: combine(adapters, [1, 1], "dare_linear", density=0.5, key=jax.random.key(seed)).trained
    jax.tree.map(np.testing.assert_array_equal, run(0), run(0))
    assert not jnp.array_equal(run(0)["dense/kernel"]["a"], run(1)["dense/kernel"]["a"])
    # Two equal adapters under one mask would give only 0 and twice the value.
    ratio = run(0)["dense/kernel"]["a"] / (2 * np.sqrt(1.5) * adapters[0].trained["dense/kernel"]["a"])
    assert {round(float(one), 3) for one in ratio.ravel()} == {0.0, 1.0, 2.0}


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "magnitude_prune", "dare_ties_svd"])
def test_combinations_under_jit(kind):
    adapters = adapter_of(1, targets=["stack"]), adapter_of(2, targets=["stack"])
    run = lambda adapters, weights: combine(adapters, weights, kind, **options_of(kind))
    weights = jnp.array([0.7, -0.4])
    new = jax.jit(run)(adapters, weights)
    assert new.meta == run(adapters, weights).meta
    assert_close(change(new), change(run(adapters, weights)))


@pytest.mark.parametrize("kind", ["linear", "cat"])
def test_gradients_to_the_weights(kind):
    adapters = adapter_of(1, targets=["dense"]), adapter_of(2, targets=["dense"])
    loss = lambda weights: (change(combine(adapters, weights, kind))["dense/kernel"] ** 2).sum()
    at = jnp.array([0.7, -0.4])
    found = jax.grad(loss)(at)
    step = 1e-2 * jnp.eye(2)
    expected = [(loss(at + one) - loss(at - one)) / 2e-2 for one in step]
    np.testing.assert_allclose(found, jnp.stack(expected), rtol=1e-2)


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties", "dare_ties_svd"])
def test_rank_zero_counts_as_not_adapted(kind):
    both = {"targets": ["dense", "conv"]}
    nothing = adapter_of(2, **both, rank_pattern={"dense": 0})
    one, other = adapter_of(1, **both), adapter_of(3, targets=["conv"])
    found = change(combine([one, nothing], [0.7, -0.4], kind, **options_of(kind)))["dense/kernel"]
    expected = change(combine([one, other], [0.7, -0.4], kind, **options_of(kind)))["dense/kernel"]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    empty = combine([nothing, nothing], [0.7, -0.4], kind, **options_of(kind))
    assert empty.trained["dense/kernel"]["a"].shape == (7, 0)
    assert not change(empty)["dense/kernel"].any()


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_biases_of_b_add_up(kind):
    one, two = adapter_of(1, targets=["conv"], factor_bias=True), adapter_of(2, targets=["conv"])
    new = combine([one, two], [0.7, -0.4], kind)
    expected = 0.7 * 1.5 * one.trained["conv/kernel"]["bias"]
    np.testing.assert_allclose(jpeft.apply(PARAMS, new)["conv"]["bias"] - PARAMS["conv"]["bias"], expected, atol=1e-5)


def test_bf16_factors_stay_bf16_and_nothing_is_cast_implicitly(strict):
    spec = jpeft.LoRA(rank=2, targets=["dense"])
    half = jpeft.init(jax.random.key(0), spec, PARAMS, kernels=KERNELS, dtype=jnp.bfloat16)
    half = half.replace(trained=noise(half.trained, 1))
    run = lambda half: [
        *(combine([half, half], [0.5, 0.5], kind, **options_of(kind)) for kind in KINDS),
        *(shrink(half, 1).adapter, to_lora(half, rank=1).adapter, scale(half, 0.5), interpolate(half, half, 0.5)),
    ]
    with strict():
        results = jax.eval_shape(run, half)
    assert {leaf.dtype for one in results for leaf in jax.tree.leaves(one.trained)} == {jnp.dtype("bfloat16")}


def test_a_shrunk_adapter_is_the_nearest_and_its_error_is_the_truth():
    adapter = adapter_of(1, rank=4, rank_pattern={"table": 1})
    before, (small, errors) = change(adapter), shrink(adapter, 2)
    after = change(small)
    for path, error in errors.items():
        norm = lambda x: np.linalg.norm(np.asarray(x), axis=(-2, -1))
        np.testing.assert_allclose(error, norm(after[path] - before[path]) / norm(before[path]), atol=1e-5)
    assert {site.path: site.rank for site in small.sites}["table/embedding"] == 1
    assert float(errors["table/embedding"]) < 1e-6 < float(errors["dense/kernel"])
    assert shrink(adapter, 4).adapter is adapter


def test_nothing_as_large_as_the_weight_is_formed_by_shrinking():
    kernels = jpeft.Kernels((("kernel", jpeft.Kernel((300, 200), (0,), (1,))),))
    adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=4), {"kernel": jnp.ones((300, 200))}, kernels=kernels)
    sizes = {var.aval.size for eqn in jax.make_jaxpr(lambda a: shrink(a, 2))(adapter).eqns for var in eqn.outvars}
    assert max(sizes) < 300 * 200 / 10


def test_shrinking_to_nothing_and_of_nothing():
    adapter = adapter_of(1, rank_pattern={"dense": 0})
    small, errors = shrink(adapter, 0)
    assert all(leaf.size == 0 for leaf in jax.tree.leaves(small.trained))
    assert float(errors["dense/kernel"]) == 0
    assert float(errors["conv/kernel"]) == 1
    assert to_lora(adapter, energy=0.9).adapter.trained["dense/kernel"]["a"].shape == (7, 0)


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.99, 1.0])
def test_energy_is_the_share_of_the_squared_singular_values(energy):
    adapter = adapter_of(1, rank=4)
    before, (new, errors) = change(adapter), to_lora(adapter, energy=energy)
    for site in new.sites:
        s = np.linalg.svd(np.asarray(before[site.path]), compute_uv=False)[..., :4] ** 2
        share = (np.cumsum(s, -1) / s.sum(-1, keepdims=True)).reshape(-1, s.shape[-1]).min(0)
        assert share[site.rank - 1] >= energy - 1e-6
        assert energy == 1 or site.rank == 1 or share[site.rank - 2] < energy
        assert (np.asarray(errors[site.path]) ** 2 <= 1 - energy + 1e-6).all()


@pytest.mark.parametrize(
    "spec",
    [
        jpeft.DoRA(rank=2, alpha=3, targets=["dense", "stack"]),
        jpeft.AdaLoRA(rank=3, target_rank=2, targets=["dense", "stack"]),
        jpeft.IA3(targets=["dense", "stack"], feedforward=["stack"]),
    ],
    ids=lambda spec: spec.method,
)
def test_other_methods_become_a_lora_with_the_same_weights(spec):
    adapter = adapter_of(3, spec)
    new, errors = to_lora(adapter, energy=1.0, params=PARAMS)
    assert type(new.spec) is jpeft.LoRA
    found, expected = (jpeft.apply(PARAMS, one) for one in (new, adapter))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=5e-5), found, expected)
    assert max(float(jnp.max(one)) for one in errors.values()) < 1e-3
    assert not jnp.array_equal(expected["dense"]["kernel"], PARAMS["dense"]["kernel"])


def test_conversion_keeps_what_is_trained_whole():
    adapter = adapter_of(1, bias="all", factor_bias=True, targets=["conv"], rank=3)
    new, _ = to_lora(adapter, rank=3)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, atol=2e-5),
        jpeft.apply(PARAMS, new),
        jpeft.apply(PARAMS, adapter),
    )
    assert new.spec.bias == "all"


def test_ia3_adapters_are_added():
    one = adapter_of(1, jpeft.IA3(targets=["dense", "stack"], feedforward=["stack"]))
    two = adapter_of(2, jpeft.IA3(targets=["dense", "table"]))
    new = combine([one, two], [0.7, 0.3], "linear")
    both = 0.7 * one.trained["dense/kernel"]["l"] + 0.3 * two.trained["dense/kernel"]["l"]
    np.testing.assert_allclose(new.trained["dense/kernel"]["l"], both, atol=1e-6)
    single = 0.7 * one.trained["stack/kernel"]["l_in"]
    np.testing.assert_allclose(new.trained["stack/kernel"]["l_in"], single, atol=1e-6)
    assert new.spec.is_feedforward("stack/kernel") and not new.spec.is_feedforward("dense/kernel")
    again = jpeft.init(jax.random.key(0), new.spec, PARAMS, kernels=KERNELS)
    assert again.sites == new.sites
    with pytest.raises(jpeft.SpecError, match="linear"):
        combine([one, two], [1, 1], "cat")
    with pytest.raises(jpeft.SpecError, match="input by one"):
        combine([one, adapter_of(1, jpeft.IA3(targets=["stack"]))], [1, 1], "linear")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("sum", {}, "kind must be one of"),
        ("ties", {}, "needs the share.*density=0.5"),
        ("ties", {"density": 0.0}, r"density must be in \(0, 1\]"),
        ("ties", {"density": 0.5, "majority_sign": "mean"}, "majority_sign"),
        ("dare_ties", {"density": 0.5}, "needs a key"),
        ("linear", {"density": 0.5}, "no use for density"),
        ("ties", {"density": 0.5, "key": 1}, "no use for key"),
        ("cat", {"rank": 2}, "rank is for the svd kinds"),
        ("svd", {"rank": 0}, "at least 1"),
    ],
)
def test_options_missing_out_of_range_or_unused_are_refused(kind, options, message):
    with pytest.raises(jpeft.SpecError, match=message):
        combine([adapter_of(1)] * 2, [1, 1], kind, **options)


def test_what_can_not_be_combined_is_refused_with_the_reason():
    one = adapter_of(1)
    with pytest.raises(jpeft.SpecError, match="conv/bias.*trained whole"):
        combine([one, adapter_of(1, bias="all")], [1, 1], "cat")
    with pytest.raises(jpeft.SpecError, match="'dora'.*to_lora"):
        combine([one, adapter_of(1, jpeft.DoRA(targets=["dense"]))], [1, 1], "cat")
    with pytest.raises(jpeft.KernelError, match=r"equal; found \[2, 3\].*'cat'.*shrink"):
        combine([one, adapter_of(1, rank=3)], [1, 1], "ties", density=0.5)
    with pytest.raises(jpeft.SpecError, match="factor_bias"):
        combine([adapter_of(1, factor_bias=True)] * 2, [1, 1], "ties", density=0.5)
    with pytest.raises(jpeft.SpecError, match="1 weights for 2 adapters"):
        combine([one, one], [1])
    with pytest.raises(jpeft.SpecError, match="at least one"):
        combine([])
    other = jpeft.Kernels((("dense/kernel", jpeft.Kernel((7, 6), (1,), (0,))),))
    turned = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=2), {"dense": {"kernel": jnp.ones((7, 6))}}, kernels=other)
    with pytest.raises(jpeft.KernelError, match="see the weight differently"):
        combine([one, turned], [1, 1], "cat")


def test_conversions_that_would_be_wrong_are_refused():
    with pytest.raises(jpeft.SpecError, match="conv/bias.*merge"):
        to_lora(adapter_of(1, jpeft.IA3(targets=["conv"])), rank=2, params=PARAMS)
    with pytest.raises(jpeft.SpecError, match="give params="):
        to_lora(adapter_of(1, jpeft.DoRA(targets=["dense"])), rank=2)
    with pytest.raises(jpeft.SpecError, match="one of them"):
        to_lora(adapter_of(1))
    with pytest.raises(jpeft.SpecError, match=r"energy.*\(0, 1\]"):
        to_lora(adapter_of(1), energy=1.5)
    with pytest.raises(jpeft.SpecError, match="under jit"):
        jax.jit(lambda adapter: to_lora(adapter, energy=0.5))(adapter_of(1))
    with pytest.raises(jpeft.SpecError, match="energy="):
        shrink(adapter_of(1), 0.9)
    with pytest.raises(jpeft.SpecError, match="'adalora'.*to_lora"):
        shrink(adapter_of(1, jpeft.AdaLoRA(rank=3, target_rank=2, targets=["dense"])), 1)
    with pytest.raises(jpeft.SpecError, match="'ia3' can't be scaled"):
        scale(adapter_of(1, jpeft.IA3(targets=["dense"])), 0.5)


def test_a_combination_survives_the_native_file(tmp_path):
    new = combine([adapter_of(1), adapter_of(2, rank=3, targets=["dense"])], [0.5, 2.0], "cat")
    jpeft.save(tmp_path / "a.safetensors", new)
    again = jpeft.load(tmp_path / "a.safetensors")
    assert again.meta == new.meta
    jax.tree.map(np.testing.assert_array_equal, again.trained, new.trained)
