"""What `attach` puts into the params, and dropout on the way through."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
import zoo
from agreement import adapter_for, assert_close


def runs(case, adapter, **options):
    """Outputs for many dropout keys, compiled once."""
    lifted = jpeft.lift(case.fn, **options)
    return jax.jit(jax.vmap(lambda key: lifted(jpeft.attach(case.params, adapter, dropout_key=key), case.x)))


def keys(n):
    return jax.random.split(jax.random.key(0), n)


@pytest.mark.parametrize("name", ["linen_dense", "nnx_state", "linen_frozen_dict", "containers", "linen_partitioned"])
def test_the_kind_of_tree_stays(name):
    case = zoo.get(name)
    new = jpeft.attach(case.params, adapter_for(case))
    assert type(new) is type(case.params)
    if isinstance(new, nnx.State):
        assert isinstance(new["layers"][0]["up"]["kernel"], nnx.Param)
    if name == "linen_partitioned":
        assert isinstance(new["dense"]["kernel"], nn.Partitioned)


def test_the_base_is_not_copied():
    case = zoo.get("linen_dense")
    leaves = jax.tree.leaves(jpeft.attach(case.params, adapter_for(case)))
    for leaf in jax.tree.leaves(case.params):
        assert any(leaf is other for other in leaves)


def test_attached_params_go_through_jit_as_a_pytree():
    case = zoo.get("linen_dense")
    params = jpeft.attach(case.params, adapter_for(case))
    assert_close(
        jax.jit(jpeft.lift(case.fn))(params, case.x), case.fn(jpeft.apply(case.params, adapter_for(case)), case.x)
    )


def test_attaching_to_different_weights_one_after_the_other():
    """Legal: it is what attaching both at once is."""
    case = zoo.get("linen_dense")
    up, down = (adapter_for(case, targets=[name]) for name in ("up", "down"))
    one_by_one = jpeft.attach(jpeft.attach(case.params, up), down)
    assert jax.tree.structure(one_by_one) == jax.tree.structure(jpeft.attach(case.params, [up, down]))


# ---- dropout ----


LINEAR = zoo.plain(lambda p, x: x @ p["w"], w=zoo.normal(zoo.D, zoo.FF))
TWICE = zoo.plain(lambda p, x: (x @ p["w"], x @ p["w"]), w=zoo.normal(zoo.D, zoo.FF))
SCANNED = zoo.plain(
    lambda p, x: jax.lax.scan(lambda _, w: (None, x @ w), None, p["w"])[1], w=jnp.stack([zoo.normal(zoo.D, zoo.FF)] * 3)
)
REPEATED = zoo.plain(
    lambda p, x: jax.lax.scan(lambda _, __: (None, x @ p["w"]), None, length=3)[1], w=zoo.normal(zoo.D, 5)
)
LOOPED = zoo.plain(
    lambda p, x: jax.lax.fori_loop(0, 2, lambda i, out: out.at[i].set(x @ p["w"]), jnp.zeros((2, *x.shape[:2], 5))),
    w=zoo.normal(zoo.D, 5),
)
CONVOLVED = zoo.plain(lambda p, x: jax.lax.conv(x.swapaxes(1, 2), p["w"], (1,), "SAME"), w=zoo.normal(5, zoo.D, 2))
EXPERTS = zoo.plain(
    lambda p, x: jnp.einsum("ebtd,edf->ebtf", jnp.stack([x] * 2), p["w"]), w=jnp.stack([zoo.normal(8, 5)] * 2)
)


@pytest.mark.parametrize("case", [LINEAR, CONVOLVED, EXPERTS, SCANNED], ids=["dot", "conv", "experts", "scan"])
def test_the_mean_over_many_masks_is_no_dropout(case):
    adapter = adapter_for(case, dropout=0.4)
    without = jpeft.lift(case.fn)(jpeft.attach(case.params, adapter), case.x)
    many = runs(case, adapter)(keys(4000))
    assert np.abs(np.asarray(many[0] - many[1])).max() > 0.1
    spread = np.asarray(many).std(0) / np.sqrt(len(many))
    assert (np.abs(np.asarray(many).mean(0) - without) < 6 * spread + 1e-4).all()


def test_by_hand():
    """y = x W + s (mask * x / keep) A B: the values say which inputs were kept, and all the others are exact."""
    case = zoo.plain(lambda p, x: x @ p["w"], x=jnp.ones((50, 1)), w=zoo.normal(1, 3))
    adapter = adapter_for(case, rank=1, alpha=2, dropout=0.25)
    out = jpeft.lift(case.fn)(jpeft.attach(case.params, adapter, dropout_key=jax.random.key(1)), case.x)
    branch = 2 * adapter.trained["w"]["a"] @ adapter.trained["w"]["b"] / 0.75
    kept = jnp.abs(out - case.params["w"]).max(-1) > 1e-6
    assert 25 < kept.sum() < 48
    np.testing.assert_allclose(out, case.params["w"] + kept[:, None] * branch, rtol=1e-5)


def test_the_same_key_the_same_mask_and_another_another():
    case = zoo.get("linen_dense")
    adapter = adapter_for(case, dropout=0.5)
    one, again, other = (
        jpeft.lift(case.fn)(jpeft.attach(case.params, adapter, dropout_key=jax.random.key(seed)), case.x)
        for seed in (1, 1, 2)
    )
    assert_close(again, one, 0)
    assert np.abs(one - other).max() > 0.01


def test_without_a_key_all_of_the_input():
    case = zoo.get("linen_dense")
    dropping = adapter_for(case, dropout=0.5)
    found = jpeft.lift(case.fn)(jpeft.attach(case.params, dropping), case.x)
    assert_close(found, case.fn(jpeft.apply(case.params, dropping), case.x))


def test_a_key_without_a_rate():
    case = zoo.get("linen_dense")
    adapter = adapter_for(case)
    with_key = jpeft.attach(case.params, adapter, dropout_key=jax.random.key(0))
    assert_close(jpeft.lift(case.fn)(with_key, case.x), case.fn(jpeft.apply(case.params, adapter), case.x))


def test_raw_keys():
    """The old kind, which Flax's own documentation still shows."""
    for case in (LINEAR, SCANNED):
        adapter = adapter_for(case, dropout=0.5)
        old, new = (
            jpeft.lift(case.fn)(jpeft.attach(case.params, adapter, dropout_key=key), case.x)
            for key in (jax.random.PRNGKey(7), jax.random.key(7))
        )
        assert_close(old, new, 0)


def test_each_adapter_has_its_own_rate_and_mask():
    one = adapter_for(LINEAR, dropout=0.5)
    never = one.replace(meta=type(one.meta)(jpeft.LoRA(rank=2, alpha=3, targets=".*"), one.sites))
    key = jax.random.key(3)
    run = lambda group: jpeft.lift(LINEAR.fn)(jpeft.attach(LINEAR.params, group, dropout_key=key), LINEAR.x)
    base, dropped, plain = LINEAR.fn(LINEAR.params, LINEAR.x), run([one]), run([never])
    assert_close(run([one, never]) - base, (dropped - base) + (plain - base), 1e-4)
    assert np.abs(run([one, one]) - base - 2 * (dropped - base)).max() > 0.01


@pytest.mark.parametrize(
    "case", [TWICE, SCANNED, REPEATED, LOOPED, EXPERTS], ids=["twice", "layers", "repeated", "looped", "experts"]
)
def test_each_use_and_each_layer_drops_its_own(case):
    """One weight used twice, or in every turn of a loop; and layers or experts of equal weights."""
    adapter = adapter_for(case, dropout=0.5)
    trained = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape) if case in (SCANNED, EXPERTS) else leaf, adapter.trained
    )
    params = jpeft.attach(case.params, adapter.replace(trained=trained), dropout_key=jax.random.key(0))
    out = jax.jit(jpeft.lift(case.fn))(params, case.x)
    assert np.abs(out[0] - out[1]).max() > 0.01


@pytest.mark.parametrize("name", ["linen_scan_remat", "linen_attention", "linen_conv_1d", "nnx_remat"])
def test_gradients_see_the_same_mask(name):
    """Finite differences with the key fixed: a recomputed forward pass has to draw the same mask."""
    case = zoo.get(name)
    adapter = adapter_for(case, dropout=0.5)
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda leaf: jnp.asarray(np.float32(rng.standard_normal(leaf.shape))), adapter.trained)
    lifted = jpeft.lift(case.fn)

    def loss(step):
        trained = jax.tree.map(lambda leaf, d: leaf + step * d, adapter.trained, direction)
        params = jpeft.attach(case.params, adapter.replace(trained=trained), dropout_key=jax.random.key(4))
        return (jnp.asarray(lifted(params, case.x)) ** 2).mean()

    run = jax.jit(jax.value_and_grad(loss))
    numeric = (run(1e-2)[0] - run(-1e-2)[0]) / 2e-2
    np.testing.assert_allclose(run(0.0)[1], numeric, rtol=2e-2)


def test_no_dropout_on_embeddings():
    """PEFT has none either."""
    case = zoo.plain(lambda p, x: p["w"][x], zoo.TOKENS, w=zoo.normal(zoo.VOCAB, 4))
    adapter = adapter_for(case, dropout=0.5)
    found = jpeft.lift(case.fn)(jpeft.attach(case.params, adapter, dropout_key=jax.random.key(0)), case.x)
    assert_close(found, case.fn(jpeft.apply(case.params, adapter), case.x))


def test_dropout_where_the_weight_has_to_be_dense():
    """There is no input of the branch to drop: an error, not a silence."""
    case = zoo.get("custom_vjp")
    params = jpeft.attach(case.params, adapter_for(case, dropout=0.5), dropout_key=jax.random.key(0))
    with pytest.raises(jpeft.LiftError, match=r"'odd': dropout acts on the branch's input"):
        jpeft.lift(case.fn)(params, case.x)
    case = zoo.get("carried")
    params = jpeft.attach(case.params, adapter_for(case, dropout=0.5), dropout_key=jax.random.key(0))
    with pytest.raises(jpeft.LiftError, match="'changed': dropout"):
        jpeft.lift(case.fn)(params, case.x)


def test_a_bias_of_b_where_the_weight_has_to_be_dense():
    case = zoo.get("both_ways")
    with pytest.raises(jpeft.LiftError, match="'w': its 'lora' adapter adds a bias to the layer's result"):
        jpeft.lift(case.fn)(jpeft.attach(case.params, adapter_for(case, factor_bias=True)), case.x)


def test_a_bias_of_b_has_no_place_where_an_embedding_is_the_head():
    params = {"embed": {"embedding": jnp.ones((5, 3))}}
    tied = lambda params, ids: params["embed"]["embedding"][ids] @ params["embed"]["embedding"].T
    kernels = jpeft.kernels(tied, params, jnp.zeros((2, 4), int))
    adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(targets=["embed"], factor_bias=True), params, kernels=kernels)
    with pytest.raises(jpeft.LiftError, match="adds a bias to the layer's result"):
        jpeft.lift(tied)(jpeft.attach(params, adapter), jnp.zeros((2, 4), int))
