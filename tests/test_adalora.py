"""AdaLoRA's budget: what is kept, what is pruned, and that pruning changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
import zoo
from agreement import assert_close, perturbed
from jpeft.adalora import budgets
from jpeft.methods import adalora as method

PARAMS = {name: {"kernel": zoo.normal(6, 5, seed=i)} for i, name in enumerate("xyz")}
SPEC = jpeft.AdaLoRA(rank=4, target_rank=1, total_steps=12, initial_steps=2, final_steps=3, every=2, targets=".*")
STACKED = {"layers": {"kernel": zoo.normal(3, 6, 5)}}
KERNELS = jpeft.Kernels((("layers/kernel", jpeft.Kernel((3, 6, 5), (1,), (2,), (0,))),))


def start(spec=SPEC):
    return perturbed(jpeft.init(jax.random.key(0), spec, PARAMS))


def steps(adapter, optimizer, n, key=0):
    """The adapter and the state after each step, on random gradients."""
    state = optimizer.init(adapter.trained)
    update = jax.jit(optimizer.update)
    for i in range(n):
        rng = np.random.default_rng(key + i)
        draw = lambda leaf, rng=rng: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)
        updates, state = update(jax.tree.map(draw, adapter.trained), state, adapter.trained)
        adapter = adapter.replace(trained=optax.apply_updates(adapter.trained, updates))
        yield adapter, state


def total(adapter):
    return sum(int(one.sum()) for one in jpeft.ranks(adapter).values())


def test_the_budget_is_met_at_every_allocation():
    found = [total(adapter) for adapter, _ in steps(start(), jpeft.adalora(optax.adam(1e-2), start()), 14)]
    budget = budgets(SPEC, 3)
    assert list(budget[:3]) == [12] * 3 and list(budget[9:]) == [3] * 4
    for step, ranks in enumerate(found, 1):
        if step <= 2:
            assert ranks == 12
        elif step >= 9:
            assert ranks == 3, "final, and kept for good"
        elif step % 2 == 0:
            assert ranks == budget[step]
        else:
            assert ranks == 12, "between allocations every direction learns on"


def test_final_masks_stay_whatever_the_gradients():
    runs = list(steps(start(), jpeft.adalora(optax.sgd(1.0), start()), 14))
    masks = [jax.tree.map(np.asarray, state.masks) for _, state in runs[8:]]
    jax.tree.map(np.testing.assert_array_equal, *masks[:2])
    jax.tree.map(np.testing.assert_array_equal, masks[0], masks[-1])
    last = runs[-1][0]
    for path, mask in masks[0].items():
        np.testing.assert_array_equal(np.asarray(last.trained[path]["e"]) != 0, mask)


def test_one_compilation_for_the_whole_schedule():
    adapter, traces = start(), []
    optimizer = jpeft.adalora(optax.adam(1e-2), adapter)

    @jax.jit
    def step(trained, state):
        traces.append(1)
        updates, state = optimizer.update(jax.tree.map(jnp.cos, trained), state, trained)
        return optax.apply_updates(trained, updates), state

    trained, state = adapter.trained, optimizer.init(adapter.trained)
    for _ in range(14):
        trained, state = step(trained, state)
    assert len(traces) == 1


def test_each_layer_of_a_stack_has_its_own_rank():
    adapter = perturbed(jpeft.init(jax.random.key(0), SPEC, STACKED, kernels=KERNELS))
    *_, (last, state) = steps(adapter, jpeft.adalora(optax.adam(1e-2), adapter), 12)
    found = jpeft.ranks(last)["layers/kernel"]
    assert found.shape == (3,) and found.sum() == 3 and state.masks["layers/kernel"].shape == (3, 4)
    pruned = jpeft.prune(last)
    assert pruned.trained["layers/kernel"]["a"].shape == (3, 6, found.max())
    assert_close(jpeft.apply(STACKED, pruned), jpeft.apply(STACKED, last), 1e-7)


def test_layers_left_alone_count_for_nothing():
    spec = jpeft.AdaLoRA(rank=4, target_rank=1, total_steps=4, layers_to_transform=[0, 2], targets=".*")
    adapter = perturbed(jpeft.init(jax.random.key(0), spec, STACKED, kernels=KERNELS))
    *_, (_, state) = steps(adapter, jpeft.adalora(optax.adam(1e-2), adapter), 4)
    masks = np.asarray(state.masks["layers/kernel"])
    assert masks[[0, 2]].sum() == 2


@pytest.mark.parametrize("target", [0, 1])
def test_pruning_changes_nothing_but_the_rank(target, tmp_path):
    """Whole kernels go: rank 0 stays legal in apply, merge, lift, save and load."""
    spec = jpeft.AdaLoRA(rank=2, target_rank=target, total_steps=3, targets=".*")
    adapter = perturbed(jpeft.init(jax.random.key(0), spec, PARAMS))
    *_, (last, _) = steps(adapter, jpeft.adalora(optax.adam(1e-2), adapter), 3)
    pruned = jpeft.prune(last)
    assert total(last) == 3 * target == sum(site.rank for site in pruned.sites)
    assert {site.path: site.rank for site in pruned.sites} == {p: int(r) for p, r in jpeft.ranks(last).items()}
    assert pruned.spec.rank_of("x") == jpeft.ranks(last)["x/kernel"]
    assert_close(jpeft.merge(PARAMS, pruned), jpeft.merge(PARAMS, last), 1e-7)
    model = lambda params, x: sum(x @ leaves["kernel"] for leaves in params.values())
    x = zoo.normal(3, 6, seed=9)
    lifted = jax.jit(jax.value_and_grad(lambda t: jpeft.lift(model)(jpeft.attach(PARAMS, t), x).sum(), allow_int=True))
    np.testing.assert_allclose(lifted(pruned)[0], lifted(last)[0], rtol=1e-5)
    jpeft.save(tmp_path / "a.safetensors", pruned)
    back = jpeft.load(tmp_path / "a.safetensors")
    jax.tree.map(np.testing.assert_array_equal, back, pruned)
    assert back.meta == pruned.meta


def test_the_penalty_is_zero_for_orthogonal_factors():
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 4)))[0]
    leaves = {"a": jnp.asarray(q, jnp.float32), "b": jnp.eye(4, 5), "e": jnp.ones(4)}
    adapter = start().replace(trained={path: leaves for path in start().trained})
    value, gradient = jax.value_and_grad(lambda t: jpeft.penalty(adapter.replace(trained=t)))(adapter.trained)
    assert abs(value) < 1e-6 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    other = start().trained["x/kernel"]
    a, b = (np.asarray(other[name], np.float64) for name in "ab")
    norm = lambda g: np.linalg.norm(g - np.eye(4))
    expected = 0.5 * (norm(a.T @ a) + norm(b @ b.T)) / 2
    found = method.penalty([{name: other[name] for name in ("a", "b")}]) * SPEC.penalty_weight
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_schedule_is_checked():
    for wrong in ({"initial_steps": 6, "final_steps": 6}, {"every": 0}, {"rank": 0}, {"beta1": 1}):
        with pytest.raises(jpeft.SpecError, match="AdaLoRA: "):
            jpeft.AdaLoRA(**{"rank": 4, "target_rank": 1, "total_steps": 12, **wrong})
    with pytest.raises(jpeft.SpecError, match="total_steps="):
        jpeft.adalora(optax.sgd(1.0), jpeft.init(jax.random.key(0), jpeft.AdaLoRA(), PARAMS))
    above = jpeft.init(jax.random.key(0), jpeft.AdaLoRA(rank=4, target_rank=5, total_steps=12), PARAMS)
    with pytest.raises(jpeft.SpecError, match=r"target_rank must be at most rank \(4\)"):
        jpeft.adalora(optax.sgd(1.0), above)
    with pytest.raises(jpeft.SpecError, match="its adapter is pruned, and the budget starts from whole ones"):
        jpeft.adalora(optax.sgd(1.0), jpeft.prune(jpeft.init(jax.random.key(0), SPEC, PARAMS)))
    lora = jpeft.init(jax.random.key(0), jpeft.LoRA(), PARAMS)
    with pytest.raises(jpeft.SpecError, match="the budget is AdaLoRA's"):
        jpeft.adalora(optax.sgd(1.0), lora)
    optimizer = jpeft.adalora(optax.sgd(1.0), start())
    with pytest.raises(jpeft.SpecError, match=r"call update\(gradients, state, adapter.trained\)"):
        optimizer.update(start().trained, optimizer.init(start().trained))


def test_other_leaves_get_the_inner_update():
    params = {"x": {"kernel": PARAMS["x"]["kernel"], "bias": jnp.ones(5)}}
    spec = jpeft.AdaLoRA(rank=2, target_rank=0, total_steps=1, bias="all", targets=".*")
    adapter = jpeft.init(jax.random.key(0), spec, params)
    *_, (last, _) = steps(adapter, jpeft.adalora(optax.sgd(1.0), adapter), 1)
    rng = np.random.default_rng(0)
    expected = jax.tree.map(lambda leaf: leaf - rng.standard_normal(leaf.shape), adapter.trained)
    np.testing.assert_allclose(last.trained["x/bias"]["value"], expected["x/bias"]["value"], rtol=1e-6)
    assert jpeft.ranks(last) == {"x/kernel": 0}
