"""Adapters of experts' kernels: rows sorted by expert, and every expert on every row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
import zoo
from agreement import (
    QUICK,
    adapter_for,
    agree,
    assert_close,
    by_definition,
    by_fast_path,
    outputs_and_gradients,
    perturbed,
)

D, FF, E = zoo.D, zoo.FF, zoo.E

# ---- every expert on every row ----

ALL = {  # how a weight is used, its shape, and its contracted, output and batch axes with each expert a matrix
    "btd,edf->btef": ((3, D, FF), (1,), (2,), (0,)),
    "btd,edf->ebtf": ((3, D, FF), (1,), (2,), (0,)),
    "def,btd->betf": ((D, 3, FF), (0,), (2,), (1,)),
    "btd,efd->etfb": ((3, FF, D), (2,), (1,), (0,)),
    "btd,gedf->tgbef": ((3, 2, D, FF), (2,), (3,), (0, 1)),
    "bte,bedf->bdtf": ((2, D, 5, FF), (1,), (3,), (0, 2)),
}
WITH = {
    "lora": jpeft.LoRA(rank=2, alpha=3, targets=["w"]),
    "shared": jpeft.LoRA(rank=2, targets=["w"], share_a=True),
    "dora": jpeft.DoRA(rank=2, targets=["w"]),
    "ia3": jpeft.IA3(targets=["w"]),
}


@pytest.mark.parametrize(
    ("equation", "spec"),
    [*((equation, "lora") for equation in ALL), *(("btd,edf->ebtf", spec) for spec in ("shared", "dora", "ia3"))],
)
def test_an_adapter_for_each_expert_where_all_see_every_row(equation, spec):
    """By kernels that say so, a layout's: the program's own geometry has the expert axis as one of the result's."""
    shape, *axes = ALL[equation]
    case = zoo.plain(lambda p, x: jnp.tanh(jnp.einsum(equation, x, p["w"])), w=zoo.normal(*shape, seed=1))
    if equation.startswith("def"):
        case = zoo.plain(lambda p, x: jnp.tanh(jnp.einsum(equation, p["w"], x)), w=case.params["w"])
    kernels = jpeft.Kernels((("w", jpeft.Kernel(shape, *axes, experts=axes[-1])),))
    assert case.found["w"].batch != kernels["w"].batch
    adapter = perturbed(jpeft.init(jax.random.key(0), WITH[spec], case.params, kernels=kernels), scale=0.2)
    agree(case, adapter)
    assert jpeft.coverage(case.fn, jpeft.attach(case.params, adapter), case.x)["w"].how == "factored"


def test_an_input_scaled_for_each_expert_is_dense():
    """One input for all: scaled otherwise for each, it would have to be formed as often."""
    case, spec = zoo.get("experts_all"), jpeft.IA3(targets=["up"], feedforward=["up"])
    kernels = jpeft.Kernels((("up", jpeft.Kernel((4, D, FF), (1,), (2,), (0,))),))
    adapter = perturbed(jpeft.init(jax.random.key(0), spec, case.params, kernels=kernels))
    agree(case, adapter)
    assert jpeft.coverage(case.fn, jpeft.attach(case.params, adapter), case.x)["up"].how == "dense"


# ---- rows sorted by expert ----


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank_pattern": {"up": 0}}, {"rank_stabilized": True}])
def test_ranks(options):
    agree(zoo.get("experts_ragged_swapped"), adapter_for(zoo.get("experts_ragged_swapped"), **options))


def test_bf16():
    """bf16 params and activations, fp32 factors: as near to the fp32 result as bf16 is."""
    case = zoo.get("experts_ragged_swapped")
    adapter = adapter_for(case)
    half = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)
    args = adapter.trained, case.params, case.x
    expected = outputs_and_gradients(by_definition(case, adapter), *args, options=QUICK)
    with jax.numpy_dtype_promotion("strict"):
        args = adapter.trained, half(case.params), half(case.x)
        found, gradients = outputs_and_gradients(by_fast_path(case, adapter), *args)
    assert found.dtype == jnp.bfloat16
    assert_close(found, expected[0], 0.05)
    assert_close(gradients[0], expected[1][0], 0.1)


def test_forward_mode():
    case = zoo.get("experts_ragged")
    adapter = adapter_for(case)
    tangent = jax.tree.map(jnp.cos, adapter.trained)
    pushed = lambda run: jax.jit(lambda t, dt: jax.jvp(lambda t: run(t, case.params, case.x), (t,), (dt,)))
    found = pushed(by_fast_path(case, adapter, forward_mode=True))(adapter.trained, tangent)
    assert_close(found, pushed(by_definition(case, adapter))(adapter.trained, tangent))


def test_used_in_both_directions():
    """x W and, with the same experts, y Wᵀ: the factors change places; DoRA's norms are of the columns, so it can't."""

    def fn(p, x):
        hidden = jnp.tanh(jax.lax.ragged_dot(x.reshape(6, D), p["w"], zoo.SIZES))
        return jnp.tanh(jax.lax.ragged_dot(hidden, p["w"].swapaxes(1, 2), zoo.SIZES))

    case = zoo.plain(fn, w=zoo.normal(E, D, FF, seed=1))
    adapter = adapter_for(case)
    agree(case, adapter)
    assert jpeft.coverage(fn, jpeft.attach(case.params, adapter), case.x)["w"].how == "factored"
    dora = perturbed(jpeft.init(jax.random.key(0), jpeft.DoRA(targets=["w"]), case.params, kernels=case.found))
    row = jpeft.coverage(fn, jpeft.attach(case.params, dora), case.x)["w"]
    assert row.uses == (
        "ragged_dot_general",
        "ragged_dot_general (the product contracts other axes than the adapter's)",
    )
    assert_close(jpeft.lift(fn)(jpeft.attach(case.params, dora), case.x), fn(jpeft.apply(case.params, dora), case.x))


def biased(p, x):
    """Experts with biases, each row its expert's."""
    bias = jnp.repeat(p["up"]["bias"], zoo.SIZES, axis=0, total_repeat_length=6)
    return jnp.tanh(jax.lax.ragged_dot(x.reshape(6, D), p["up"]["kernel"], zoo.SIZES) + bias)


BIASED = {"up": {"kernel": zoo.normal(E, D, FF, seed=1), "bias": zoo.normal(E, FF, seed=2)}}


@pytest.mark.parametrize(
    "spec",
    [
        jpeft.LoRA(rank=2, targets=["up"], factor_bias=True),
        jpeft.LoRA(rank=2, targets=["up"], factor_bias=True, share_a=True),
        jpeft.IA3(targets=["up"]),
    ],
)
def test_what_changes_the_bias_too(spec):
    """Each row gets its own expert's; and the model's bias, though looked up row by row, is no embedding."""
    case = zoo.Case(BIASED, biased, zoo.X, ("up/kernel",))
    assert "is a bias" in dict(case.found.unknown)["up/bias"]
    adapter = perturbed(jpeft.init(jax.random.key(0), spec, BIASED, kernels=case.found))
    assert list(adapter.trained) == ["up/kernel"]
    agree(case, adapter)


def test_dropout_of_the_branch():
    """With the identity for A B, each entry of the branch is that of the input, dropped or scaled up."""
    params = {"w": zoo.normal(E, D, D, seed=1)}
    fn = lambda p, x: jax.lax.ragged_dot(x, p["w"], zoo.SIZES)
    x = zoo.normal(6, D, seed=2, scale=1)
    found = jpeft.kernels(lambda p, x: jnp.tanh(fn(p, x)), params, x)
    adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=D, dropout=0.25), params, kernels=found)
    identity = jnp.broadcast_to(jnp.eye(D), (E, D, D))
    adapter = adapter.replace(trained={"w": {"a": identity, "b": identity}})
    run = lambda key: jpeft.lift(fn)(jpeft.attach(params, adapter, dropout_key=key), x) - fn(params, x)
    ratios = np.concatenate([np.asarray(run(jax.random.key(i)) / x).ravel() for i in range(4)])
    kept = np.abs(ratios) > 0.1
    np.testing.assert_allclose(ratios[kept], 4 / 3, rtol=1e-3)
    np.testing.assert_allclose(ratios[~kept], 0, atol=1e-4)
    assert 0.6 < kept.mean() < 0.9
    assert np.abs(run(jax.random.key(0)) - run(jax.random.key(1))).max() > 0.1


def test_gates_are_refused():
    """They are for rows in the order of the batch."""
    case = zoo.get("experts_ragged_swapped")
    params = jpeft.attach(case.params, [adapter_for(case), adapter_for(case, 2)], gates=jnp.zeros(6, jnp.int32))
    with pytest.raises(jpeft.LiftError, match=r"'up'.*sorted by expert"):
        jpeft.lift(case.fn)(params, case.x)


def test_groups_of_the_contracted_axis_are_dense():
    """One product for each part of the contracted axis: no expert has a weight of its own here."""
    numbers = jax.lax.RaggedDotDimensionNumbers((((1,), (0,)), ((), ())), (1,), ())
    fn = lambda p, x: jax.lax.ragged_dot_general(x, p["kernel"], jnp.array([3, 5]), numbers)
    params, x = {"kernel": zoo.normal(D, FF)}, zoo.normal(6, D, seed=1)
    adapter = perturbed(jpeft.init(jax.random.key(0), jpeft.LoRA(rank=2), params))
    attached = jpeft.attach(params, adapter)
    row = jpeft.coverage(fn, attached, x)["kernel"]
    assert row.how == "dense"
    assert "the groups divide an axis that is contracted" in row.uses[0]
    assert_close(jpeft.lift(fn)(attached, x), fn(jpeft.apply(params, adapter), x))


# ---- experts and layers ----


def test_layers_are_chosen_not_experts():
    """(experts, layers, in, out): the layers are those of the second axis."""
    case = zoo.get("experts_ragged_scanned")
    adapter = adapter_for(case, layers_to_transform=[2])
    assert adapter.constant["up"]["scaling"].tolist() == [[0, 0, 1.5]] * E
    new = jpeft.apply(case.params, adapter)
    for name in ("up", "down"):
        np.testing.assert_array_equal(new[name][:, :2], case.params[name][:, :2])
        assert np.abs(new[name][:, 2] - case.params[name][:, 2]).min((1, 2)).max() > 0
    assert_close(jax.jit(jpeft.lift(case.fn))(jpeft.attach(case.params, adapter), case.x), case.fn(new, case.x))
    assert jpeft.count(case.params, adapter).trainable == 2 * E * (2 * D + 2 * FF)
    with pytest.raises(jpeft.SpecError, match="3 is none of the 3 layers"):
        adapter_for(case, layers_to_transform=[3])


def test_experts_alone_are_no_layers():
    """A number means nothing for experts without layers: nothing is adapted, rather than one expert."""
    case = zoo.get("experts_ragged_swapped")
    with pytest.raises(jpeft.SpecError):
        adapter_for(case, layers_to_transform=[1])
