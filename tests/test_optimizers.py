"""LoRA+ and LoRA-FA by their formulas: rates by leaf, frozen A, batch axes, slices left alone, jit, schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.optimizers import lora_fa, lora_plus

PARAMS = {"dense": {"kernel": jnp.ones((6, 5)), "bias": jnp.ones(5)}, "stack": {"kernel": jnp.ones((3, 5, 2, 4))}}
KERNELS = jpeft.Kernels(
    (
        ("dense/kernel", jpeft.Kernel((6, 5), (0,), (1,))),
        ("stack/kernel", jpeft.Kernel((3, 5, 2, 4), (1,), (2, 3), (0,))),
    )
)
TABLE = {"kernel": jpeft.Kernel((7, 4), (0,), (1,), kind="embedding")}


def noise(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), tree)


def trained_adapter(spec=None, seed=1, params=PARAMS, kernels=KERNELS):
    spec = jpeft.LoRA(rank=2, alpha=3) if spec is None else spec
    adapter = jpeft.init(jax.random.key(0), spec, params, kernels=kernels)
    return adapter.replace(trained=noise(adapter.trained, seed))


def one_update(optimizer, adapter, gradients):
    return jax.jit(optimizer.update)(gradients, optimizer.init(adapter.trained), adapter.trained)[0]


def test_lora_plus_is_the_inner_optimizer_with_a_rate_of_its_own_for_b():
    adapter = trained_adapter(jpeft.LoRA(rank=2, bias="all"))
    gradients = noise(adapter.trained, 2)
    updates = one_update(lora_plus(adapter, 0.1, 8.0, inner=optax.scale_by_lion()), adapter, gradients)
    plain = one_update(optax.lion(0.1, weight_decay=0.0), adapter, gradients)
    rate = {"a": 1, "b": 8, "value": 8}
    expected = {path: {n: rate[n] * leaf for n, leaf in leaves.items()} for path, leaves in plain.items()}
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6), updates, expected)


def test_lora_plus_decays_all_but_biases():
    adapter = trained_adapter(jpeft.LoRA(rank=2, bias="all", factor_bias=True))
    zeros = jax.tree.map(jnp.zeros_like, adapter.trained)
    updates = one_update(lora_plus(adapter, 0.1, 4.0, weight_decay=0.5), adapter, zeros)
    stack = adapter.trained["stack/kernel"]
    np.testing.assert_allclose(updates["stack/kernel"]["a"], -0.05 * stack["a"], rtol=1e-5)
    np.testing.assert_allclose(updates["stack/kernel"]["b"], -0.2 * stack["b"], rtol=1e-5)
    assert not updates["stack/kernel"]["bias"].any() and not updates["dense/bias"]["value"].any()


def test_lora_plus_follows_schedules():
    adapter = trained_adapter()
    halves = lambda step: 0.5 ** (step + 1)
    optimizer = lora_plus(adapter, halves, 3.0, inner=optax.identity())
    ones, state = jax.tree.map(jnp.ones_like, adapter.trained), optimizer.init(adapter.trained)
    for rate in (0.5, 0.25):
        updates, state = optimizer.update(ones, state, adapter.trained)
        assert updates["dense/kernel"]["a"][0, 0] == -rate
        assert updates["dense/kernel"]["b"][0, 0] == -3 * rate


def test_lora_plus_of_an_embedding_has_its_own_rate():
    params = {"kernel": jnp.ones((7, 4))}
    adapter = trained_adapter(params=params, spec=jpeft.LoRA(rank=2, targets=".*"), kernels=table())
    updates = one_update(lora_plus(adapter, 0.1, 4.0, inner=optax.identity()), adapter, adapter.trained)
    jax.tree.map(lambda u, g: np.testing.assert_allclose(u, -1e-6 * g, rtol=1e-5), updates, adapter.trained)


def table():
    return jpeft.Kernels(tuple(TABLE.items()))


@pytest.mark.parametrize(
    ("options", "message"), [({"ratio": 0}, "ratio"), ({"ratio": 2, "inner": optax.adam}, "inner")]
)
def test_lora_plus_refuses(options, message):
    with pytest.raises(jpeft.SpecError, match=message):
        lora_plus(trained_adapter(), 0.1, **options)


def test_lora_fa_by_its_formula_for_each_matrix_of_a_stack():
    """g_B ← (Aᵀ A)⁻¹ g_B / s², then Adam with ε outside the bias correction, in fp64."""
    adapter = trained_adapter(jpeft.LoRA(rank=2, alpha=3, targets=["stack"], layers_to_transform=[0, 2]))
    optimizer = lora_fa(adapter, 0.1, weight_decay=0.2)
    trained, state = adapter.trained, optimizer.init(adapter.trained)
    a = np.asarray(trained["stack/kernel"]["a"], np.float64)
    b = np.asarray(trained["stack/kernel"]["b"], np.float64)
    m = v = np.zeros_like(b)
    for step in range(1, 5):
        gradients = noise(trained, 10 + step)
        updates, state = jax.jit(optimizer.update)(gradients, state, trained)
        trained = optax.apply_updates(trained, updates)
        g = np.asarray(gradients["stack/kernel"]["b"], np.float64)
        g = np.einsum("lij,ljhk->lihk", np.linalg.inv(a.mT @ a), g) / 1.5**2
        g[1] = 0  # the slice that is left alone
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        b = b - 0.1 * np.sqrt(1 - 0.999**step) / (1 - 0.9**step) * m / (np.sqrt(v) + 1e-6)
        b = b * (1 - 0.1 * 0.2)
        np.testing.assert_allclose(trained["stack/kernel"]["b"], b, atol=1e-6)
        np.testing.assert_array_equal(trained["stack/kernel"]["a"], adapter.trained["stack/kernel"]["a"])


def test_lora_fa_takes_the_step_in_the_weights_that_full_fine_tuning_would():
    """With the gradient G of ΔW, the corrected gradient of B makes s A g_B the projection of G on the span of A."""
    adapter = trained_adapter(jpeft.LoRA(rank=2, alpha=3, targets=["dense"]))
    a, s = np.asarray(adapter.trained["dense/kernel"]["a"]), 1.5
    g = np.random.default_rng(3).standard_normal((6, 5)).astype(np.float32)
    state = lora_fa(adapter, 0.1).init(adapter.trained)
    corrected = np.asarray(state.corrections["dense/kernel"]) @ (s * a.T @ g)
    q, _ = np.linalg.qr(a)
    np.testing.assert_allclose(s * a @ corrected, q @ q.T @ g, atol=1e-5)


def test_lora_fa_trains_biases_beside_and_has_no_moments_of_a():
    adapter = trained_adapter(jpeft.LoRA(rank=2, bias="all", factor_bias=True, rank_pattern={"dense": 0}))
    optimizer = lora_fa(adapter, 0.1)
    assert all("a" not in leaves for leaves in optimizer.init(adapter.trained).m.values())
    updates = one_update(optimizer, adapter, noise(adapter.trained, 2))
    assert jax.tree.structure(updates) == jax.tree.structure(adapter.trained)
    assert updates["dense/kernel"]["b"].shape == (0, 5)
    for leaf in (updates["dense/bias"]["value"], updates["stack/kernel"]["bias"]):
        np.testing.assert_allclose(jnp.abs(leaf), 0.1, rtol=1e-3)


def test_lora_fa_refuses_what_it_can_not_train():
    new = lambda spec, params, kernels: jpeft.init(jax.random.key(0), spec, params, kernels=kernels)
    with pytest.raises(jpeft.SpecError, match=r"embedding.*exclude"):
        lora_fa(new(jpeft.LoRA(targets=".*"), {"kernel": jnp.ones((7, 4))}, table()), 0.1)
    with pytest.raises(jpeft.SpecError, match="'dora'"):
        lora_fa(new(jpeft.DoRA(), PARAMS, KERNELS), 0.1)
    with pytest.raises(jpeft.SpecError, match="b2"):
        lora_fa(trained_adapter(), 0.1, b2=1.0)
    optimizer = lora_fa(trained_adapter(), 0.1)
    trained = trained_adapter().trained
    with pytest.raises(jpeft.SpecError, match="adapter.trained"):
        optimizer.update(trained, optimizer.init(trained))
