"""Adapters whose experts share an A: one leaf for all of them, a B for each."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
import zoo
from agreement import adapter_for, agree, assert_close, perturbed
from jpeft.algebra import combine, scale, shrink
from jpeft.initialize import pissa

D, FF, E, LAYERS = zoo.D, zoo.FF, zoo.E, zoo.LAYERS
SHARING = {  # path, and the shapes of A and B there
    "experts_batched": ("up", (1, D, 2), (2, 2, FF)),
    "experts_transposed": ("up", (1, D, 2), (2, 2, FF)),
    "experts_ragged": ("up", (1, D, 2), (E, 2, FF)),
    "experts_ragged_moved": ("w", (1, D, 2), (E, 2, zoo.HEADS, zoo.HEAD)),
    "experts_ragged_scanned": ("up", (1, LAYERS, D, 2), (E, LAYERS, 2, FF)),
}


def new(case, **options):
    spec = jpeft.LoRA(**{"rank": 2, "alpha": 3, "targets": ".*", **options})
    return jpeft.init(jax.random.key(0), spec, case.params, kernels=case.adapted)


@pytest.mark.parametrize("name", SHARING)
def test_values_and_every_gradient_with_a_shared_a(name):
    """Layers keep an A each: only the axes that one product goes over are shared."""
    case, (path, a, b) = zoo.get(name), SHARING[name]
    adapter = adapter_for(case, share_a=True)
    assert jax.tree.map(jnp.shape, adapter.trained[path]) == {"a": a, "b": b}
    agree(case, adapter)
    assert jpeft.coverage(case.fn, jpeft.attach(case.params, adapter), case.x)[path].how == "factored"


def test_it_is_the_adapter_whose_every_expert_has_that_a():
    case = zoo.get("experts_ragged_scanned")
    shared, own = adapter_for(case, share_a=True), adapter_for(case)
    repeated = {
        path: leaves | {"a": jnp.broadcast_to(leaves["a"], own.trained[path]["a"].shape)}
        for path, leaves in shared.trained.items()
    }
    assert_close(jpeft.merge(case.params, shared), jpeft.merge(case.params, own.replace(trained=repeated)), 0)
    different = jpeft.merge(case.params, own)["up"] - jpeft.merge(case.params, shared)["up"]
    assert np.abs(different).max() > 0.1


@pytest.mark.parametrize("kind", [jpeft.LoRA, jpeft.DoRA])
def test_a_new_one_changes_nothing(kind):
    case = zoo.get("experts_ragged")
    spec = kind(rank=2, targets=["up", "down"], share_a=True)
    adapter = jpeft.init(jax.random.key(0), spec, case.params, kernels=case.found)
    assert_close(jpeft.apply(case.params, adapter), case.params, 1e-6)
    assert adapter.trained["up"]["a"].shape == (1, D, 2)
    agree(case, perturbed(adapter, scale=0.1))


def test_count():
    case = zoo.get("experts_ragged")
    up, down = D * 2 + E * 2 * FF, FF * 2 + E * 2 * D
    assert jpeft.count(case.params, new(case, targets=["up", "down"], share_a=True)).trainable == up + down
    assert jpeft.count(case.params, new(case, targets=["up"])).trainable == E * (D * 2 + 2 * FF)


def test_save_and_load(tmp_path):
    adapter = adapter_for(zoo.get("experts_ragged_scanned"), share_a=True)
    jpeft.save(tmp_path / "adapter", adapter)
    found = jpeft.load(tmp_path / "adapter")
    assert found.meta == adapter.meta
    assert found.spec.share_a
    assert_close(found.trained, adapter.trained, 0)


def test_a_file_with_another_a_is_refused(tmp_path):
    """An A of each expert's own where the spec says that they share one, and one of three where there are four."""
    adapter = adapter_for(zoo.get("experts_ragged"), share_a=True)
    for experts in (E, 3):
        a = jnp.ones((experts, D, 2))
        jpeft.save(
            tmp_path / "bad", adapter.replace(trained=adapter.trained | {"up": adapter.trained["up"] | {"a": a}})
        )
        with pytest.raises(jpeft.AdapterError, match="'up'"):
            jpeft.load(tmp_path / "bad")


@pytest.mark.parametrize("kind", ["cat", "ties"])
def test_combined_with_one_that_shares_nothing(kind):
    """The result has an A for each expert; what is exact for any LoRA is exact here."""
    case = zoo.get("experts_ragged")
    one, other = adapter_for(case, share_a=True), adapter_for(case, seed=2)
    repeated = jax.tree.map(lambda own, like: jnp.broadcast_to(own, like.shape), one.trained, other.trained)
    options = {"density": 0.5} if kind == "ties" else {}
    found = combine([one, other], [0.5, -1.0], kind, **options)
    expected = combine([other.replace(trained=repeated), other], [0.5, -1.0], kind, **options)
    assert not found.spec.share_a
    assert_close(jpeft.apply(case.params, found), jpeft.apply(case.params, expected), 1e-6)
    if kind == "cat":
        assert_close(jpeft.apply(case.params, found), jpeft.apply(case.params, [one, other], [0.5, -1.0]), 1e-6)


def test_scaled_and_shrunk():
    case = zoo.get("experts_ragged")
    adapter = adapter_for(case, share_a=True)
    scaled = scale(adapter, 0.5)
    assert scaled.trained["up"]["a"].shape == (1, D, 2)
    assert_close(jpeft.apply(case.params, scaled), jpeft.apply(case.params, adapter, 0.5), 1e-6)
    small, errors = shrink(adapter, 1)
    assert small.trained["up"]["a"].shape == (E, D, 1)
    assert errors["up"].shape == (E,)


def test_lora_fa_corrects_the_b_of_each_expert():
    """As for the adapter whose experts each have that A."""
    case = zoo.get("experts_ragged")
    one, other = adapter_for(case, share_a=True), adapter_for(case)
    other = other.replace(
        trained=jax.tree.map(lambda own, like: jnp.broadcast_to(own, like.shape), one.trained, other.trained)
    )
    updates = []
    for adapter in (one, other):
        optimizer = jpeft.lora_fa(adapter, 0.1)
        gradients = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), adapter.trained)
        updates.append(optimizer.update(gradients, optimizer.init(adapter.trained), adapter.trained)[0]["up"])
    assert_close(updates[0]["b"], updates[1]["b"], 1e-6)
    assert updates[0]["a"].shape == (1, D, 2)


def test_training_moves_the_one_a():
    case = zoo.get("experts_ragged")
    adapter, run = new(case, targets=["up", "down"], share_a=True), jpeft.lift(case.fn)
    loss = lambda trained: (run(jpeft.attach(case.params, adapter.replace(trained=trained)), case.x) ** 2).sum()
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(trained, state):
        value, gradients = jax.value_and_grad(loss)(trained)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(trained, updates), state, value

    trained, state, values = adapter.trained, optimizer.init(adapter.trained), []
    for _ in range(5):
        trained, state, value = step(trained, state)
        values.append(float(value))
    assert values[-1] < values[0]
    assert np.abs(trained["up"]["a"] - adapter.trained["up"]["a"]).max() > 0


def test_without_experts_there_is_nothing_to_share():
    """Layers of a stack are none, and an axis that no program was read for may be anything."""
    for name in ("linen_dense", "nnx_scan", "experts_all"):
        with pytest.raises(jpeft.SpecError, match=r"no target has any.*jpeft\.kernels.*experts=\(0,\)"):
            new(zoo.get(name), share_a=True)
    by_hand = lambda **more: jpeft.Kernels((("w", jpeft.Kernel((3, 4, 5), (1,), (2,), (0,), **more)),))
    params, spec = {"w": jnp.ones((3, 4, 5))}, jpeft.LoRA(rank=2, share_a=True)
    with pytest.raises(jpeft.SpecError, match="no target has any"):
        jpeft.init(jax.random.key(0), spec, params, kernels=by_hand())
    adapter = jpeft.init(jax.random.key(0), spec, params, kernels=by_hand(experts=(0,)))
    assert adapter.trained["w"]["a"].shape == (1, 4, 2)


def test_starts_that_give_each_expert_its_own_are_refused():
    case = zoo.get("experts_ragged")
    with pytest.raises(jpeft.SpecError, match=r"'down'.*share an A.*share_a=False"):
        pissa(new(case, share_a=True), case.params)
