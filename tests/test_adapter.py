"""The adapter: a pytree in three parts, how it is made, counted and trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jpeft
import zoo
from agreement import adapter_for, assert_close


def lora(params, **options):
    return jpeft.init(
        jax.random.key(0, impl="unsafe_rbg"), jpeft.LoRA(**{"rank": 2, "targets": ".*", **options}), params
    )


PARAMS = {"dense": {"kernel": zoo.normal(6, 4), "bias": zoo.normal(4)}, "embed": {"embedding": zoo.normal(9, 6)}}


def test_three_parts():
    adapter = lora(PARAMS, rank=2, alpha=3)
    assert jax.tree.map(jnp.shape, adapter.trained) == {
        "dense/kernel": {"a": (6, 2), "b": (2, 4)},
        "embed/embedding": {"a": (9, 2), "b": (2, 6)},
    }
    assert jax.tree.map(float, adapter.constant) == {path: {"scaling": 1.5} for path in adapter.trained}
    assert len(jax.tree.leaves(adapter)) == 6
    assert adapter.spec == adapter.meta.spec == jpeft.LoRA(rank=2, alpha=3, targets=".*")
    assert adapter.leaves("dense/kernel").keys() == {"a", "b", "scaling"}


def test_geometry_of_the_factors():
    case = zoo.get("einsum_attention")
    adapter = adapter_for(case)
    assert adapter.trained["q"]["a"].shape == (zoo.D, 2)
    assert adapter.trained["q"]["b"].shape == (2, zoo.HEADS, zoo.HEAD)
    assert adapter.trained["o"]["a"].shape == (zoo.HEADS, zoo.HEAD, 2)
    stacked = adapter_for(zoo.get("linen_scan_axis_1"))
    assert stacked.trained["layers/mlp/up/kernel"]["a"].shape == (zoo.LAYERS, zoo.D, 2)
    assert stacked.constant["layers/mlp/up/kernel"]["scaling"].shape == (zoo.LAYERS,)


@pytest.mark.parametrize(
    ("options", "scaling"),
    [
        ({"rank": 8}, 1.0),
        ({"rank": 4, "alpha": 8}, 2.0),
        ({"rank": 16, "alpha": 8, "rank_stabilized": True}, 2.0),
        ({"rank": 0, "alpha": 8}, 0.0),
        ({"rank": 8, "alpha": 8, "rank_pattern": {"dense": 2}}, 4.0),
        ({"rank": 8, "alpha": 8, "alpha_pattern": {"dense": 4}}, 0.5),
    ],
)
def test_scaling(options, scaling):
    assert float(lora(PARAMS, targets=["dense"], **options).constant["dense/kernel"]["scaling"]) == scaling


def test_distributions():
    """A of a product is U(±1/sqrt(in)) or N(0, 1/r²) and B zero; of an embedding A is zero and B N(0, 1)."""
    params = {"dense": {"kernel": jnp.zeros((400, 3))}, "embed": {"embedding": jnp.zeros((3, 400))}}
    made = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=50, targets=".*"), params).trained
    a, b = made["dense/kernel"]["a"], made["embed/embedding"]["b"]
    bound = 1 / np.sqrt(400)
    assert 0.99 * bound < jnp.abs(a).max() <= bound and abs(a.std() - bound / np.sqrt(3)) < 0.02 * bound
    assert abs(b.std() - 1) < 0.02 and abs(b.mean()) < 0.02
    assert not made["dense/kernel"]["b"].any() and not made["embed/embedding"]["a"].any()
    a = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=50, targets=["dense"], init="gaussian"), params).trained[
        "dense/kernel"
    ]["a"]
    assert abs(a.std() - 1 / 50) < 0.02 / 50 and jnp.abs(a).max() > 3 / 50


def test_layers_of_a_stack_are_drawn_apart():
    case = zoo.get("linen_scan")
    adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=2, targets=["up"]), case.params, kernels=case.found)
    a = adapter.trained["layers/mlp/up/kernel"]["a"]
    assert jnp.abs(a[0] - a[1]).max() > 0.01


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtype(dtype):
    adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=2), PARAMS, dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter.trained)} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter.constant)} == {jnp.dtype("float32")}


def test_saved_modules_start_from_the_base_in_fp32():
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(targets=["dense"], modules_to_save=["embed"], bias="all"), half)
    value = adapter.trained["embed/embedding"]["value"]
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, half["embed"]["embedding"].astype(jnp.float32))
    assert adapter.trained["dense/bias"]["value"].shape == (4,)
    value = lora(PARAMS, targets=["dense"], modules_to_save=["embed"]).trained["embed/embedding"]["value"]
    assert value is not PARAMS["embed"]["embedding"], "a copy: donating it must not destroy the base"


@pytest.mark.parametrize(
    ("bias", "trained"), [("none", set()), ("all", {"dense/bias", "norm/bias"}), ("lora_only", {"dense/bias"})]
)
def test_biases(bias, trained):
    params = {**PARAMS, "norm": {"scale": zoo.normal(4), "bias": zoo.normal(4)}}
    adapter = lora(params, targets=["dense"], bias=bias)
    assert {site.path for site in adapter.sites if site.method == "replacement"} == trained


def test_only_biases():
    adapter = lora(PARAMS, targets=(), bias="all")
    assert [site.path for site in adapter.sites] == ["dense/bias"]


# ---- the count ----


def test_the_sentence_people_know():
    count = jpeft.count(PARAMS, lora(PARAMS, targets=["dense"]))
    assert str(count) == "trainable params: 20 || all params: 102 || trainable%: 19.6078"
    assert (count.trainable, count.total) == (20, 102)


def test_count_as_peft_counts():
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = torch.nn.Linear(6, 4)
            self.embed = torch.nn.Embedding(9, 6)

    config = peft.LoraConfig(r=2, target_modules=["dense"], modules_to_save=["embed"], bias="all")
    trainable, total = peft.get_peft_model(Net(), config).get_nb_trainable_parameters()
    count = jpeft.count(PARAMS, lora(PARAMS, targets=["dense"], modules_to_save=["embed"], bias="all"))
    assert count.trainable == trainable
    # PEFT has a copy of the saved module and trains the biases in place.
    assert count.total - count.trainable == total - trainable + 4


def test_count_of_a_state_is_of_its_parameters():
    model = zoo.NnxNet(nnx.Rngs(0))
    adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=1), nnx.state(model))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert jpeft.count(nnx.state(model), adapter).total == parameters + jpeft.count(nnx.state(model), adapter).trainable


# ---- training ----


def test_training_with_optax():
    """Only the trained part moves, weight decay included, and the loss falls."""
    case = zoo.get("linen_lm")
    adapter = jpeft.init(
        jax.random.key(0), jpeft.LoRA(rank=2, targets=".*", modules_to_save=["norm"]), case.params, kernels=case.found
    )
    forward, optimizer = jpeft.lift(case.fn), optax.adamw(3e-2, weight_decay=0.1)

    def loss(trained):
        logits = forward(jpeft.attach(case.params, adapter.replace(trained=trained)), case.x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, (case.x + 1) % zoo.VOCAB).mean()

    @jax.jit
    def step(trained, state):
        value, gradient = jax.value_and_grad(loss)(trained)
        updates, state = optimizer.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, value

    trained, state, losses = adapter.trained, optimizer.init(adapter.trained), []
    for _ in range(60):
        trained, state, value = step(trained, state)
        losses.append(float(value))
    assert losses[-1] < 0.3 * losses[0]
    assert step._cache_size() == 1
    logits = case.fn(jpeft.merge(case.params, adapter.replace(trained=trained)), case.x)
    assert_close(logits, forward(jpeft.attach(case.params, adapter.replace(trained=trained)), case.x))


def test_the_whole_adapter_as_a_jit_argument():
    case = zoo.get("linen_dense")
    run = jax.jit(lambda adapter, x: case.fn(jpeft.apply(case.params, adapter), x))
    for seed in range(2):
        run(adapter_for(case, seed=seed), case.x)
    assert run._cache_size() == 1
    run(adapter_for(case, rank=3), case.x)
    assert run._cache_size() == 2


def test_an_adapter_donated():
    """Buffers of an adapter may be given away: none is shared with the params."""
    params = jax.tree.map(jnp.array, PARAMS)
    adapter = lora(params, modules_to_save=["embed"], targets=["dense"], bias="all")
    halve = jax.jit(lambda trained: jax.tree.map(lambda leaf: leaf / 2, trained), donate_argnums=0)
    halve(adapter.trained)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_init_under_jit_and_sharding_free():
    made = jax.jit(lambda key: jpeft.init(key, jpeft.LoRA(rank=2, targets=["dense"]), PARAMS))(jax.random.key(0))
    jax.tree.map(
        np.testing.assert_allclose, made, jpeft.init(jax.random.key(0), jpeft.LoRA(rank=2, targets=["dense"]), PARAMS)
    )


# ---- what it refuses ----


@pytest.mark.parametrize("spec", [None, "all-linear", {"rank": 8}, jpeft.LoRA])
def test_no_spec(spec):
    with pytest.raises(jpeft.SpecError, match=r"init takes a spec, as in init\(key, jpeft\.LoRA\(rank=8\), params\)"):
        jpeft.init(jax.random.key(0), spec, PARAMS)


def test_kernels_of_another_model():
    kernels = jpeft.Kernels((("dance/kernel", jpeft.Kernel((6, 4), (0,), (1,))),))
    with pytest.raises(
        jpeft.KernelError, match="names 'dance/kernel', which the params do not have; nearest: 'dense/kernel'"
    ):
        jpeft.init(jax.random.key(0), jpeft.LoRA(), PARAMS, kernels=kernels)
    kernels = jpeft.Kernels((("dense/kernel", jpeft.Kernel((4, 6), (0,), (1,))),))
    with pytest.raises(jpeft.KernelError, match=r"of shape \(4, 6\); the params have \(6, 4\)"):
        jpeft.init(jax.random.key(0), jpeft.LoRA(), PARAMS, kernels=kernels)


def test_weights_that_are_not_floating():
    params = {"dense": {"kernel": jnp.ones((6, 4), jnp.int8)}}
    with pytest.raises(jpeft.KernelError, match="'dense/kernel' holds int8; expected a floating dtype: dequantize"):
        lora(params)


def test_integers_are_not_saved_whole():
    params = {**PARAMS, "head": {"kernel": zoo.normal(4, 2), "steps": jnp.zeros((), int)}}
    assert [site.path for site in lora(params, targets=["dense"], modules_to_save=["head"]).sites] == [
        "dense/kernel",
        "head/kernel",
    ]
