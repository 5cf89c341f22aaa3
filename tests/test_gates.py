"""Routing: adapters that differ from row to row, against each of them alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
import zoo
from agreement import assert_close, perturbed


def model(params, x):
    x = jnp.tanh(x @ params["q"]["kernel"] + params["q"]["bias"])
    return x @ params["v"]["kernel"] + x @ params["k"]["kernel"]


PARAMS = {
    "q": {"kernel": zoo.normal(6, 6), "bias": zoo.normal(6, seed=1)},
    "k": {"kernel": zoo.normal(6, 4, seed=2)},
    "v": {"kernel": zoo.normal(6, 4, seed=3)},
}
X = zoo.normal(4, 3, 6, seed=4)


def experts():
    """Different targets, ranks, scalings and methods."""
    specs = [
        jpeft.LoRA(rank=2, alpha=4, targets=["q", "v"]),
        jpeft.LoRA(rank=3, targets=["q", "k", "v"], rank_stabilized=True, factor_bias=True),
        jpeft.AdaLoRA(rank=2, target_rank=1, targets=["k"]),
    ]
    return [perturbed(jpeft.init(jax.random.key(i), spec, PARAMS), i) for i, spec in enumerate(specs)]


def run(gates, params=PARAMS, **options):
    forward = lambda adapters, gates, x: jpeft.lift(model)(jpeft.attach(params, adapters, gates=gates, **options), x)
    return jax.jit(forward)(experts(), gates, X)


def alone(adapters, weights=None):
    return jpeft.lift(model)(jpeft.attach(PARAMS, adapters, weights), X)


def test_an_index_a_row_is_that_rows_adapter():
    found = run(jnp.array([2, -1, 0, 1]))
    expected = [alone(experts()[2]), model(PARAMS, X), alone(experts()[0]), alone(experts()[1])]
    assert_close(found, jnp.stack([one[i] for i, one in enumerate(expected)]))
    sizes = [float(jnp.abs(one[i] - model(PARAMS, X)[i]).max()) for i, one in enumerate(expected)]
    assert min(sizes[:1] + sizes[2:]) > 1e-2 and sizes[1] == 0


def test_weights_a_row():
    gates = zoo.normal(4, 3, seed=5)
    found = run(gates)
    for i in range(4):
        assert_close(found[i], alone(experts(), [float(g) for g in gates[i]])[i])


def test_weights_a_token_have_gradients():
    """Against a dense computation of each token by itself, gates' gradients and all."""
    gates = zoo.normal(4, 3, 3, seed=6)
    adapters = experts()

    def dense(gates):
        token = lambda x, g: model_of(jpeft_apply(adapters, g), x)
        return jax.vmap(jax.vmap(token))(X, gates)

    routed = lambda gates: jpeft.lift(model)(jpeft.attach(PARAMS, adapters, gates=gates), X)
    assert_close(jax.jit(routed)(gates), jax.jit(dense)(gates))
    loss = lambda fn: jax.jit(jax.grad(lambda gates: jnp.sin(fn(gates)).sum()))(gates)
    assert_close(loss(routed), loss(dense))


def jpeft_apply(adapters, gates):
    """Biases of B have no place in `k` and `v`: give them one."""
    params = {name: {"bias": jnp.zeros(leaves["kernel"].shape[1])} | leaves for name, leaves in PARAMS.items()}
    return jpeft.apply(params, adapters, [gates[k] for k in range(3)])


def model_of(params, x):
    dense = lambda name, x: x @ params[name]["kernel"] + params[name]["bias"]
    x = jnp.tanh(dense("q", x))
    return dense("v", x) + dense("k", x)


def test_gates_by_path():
    gates = {f"{name}/kernel": zoo.normal(4, 3, 3, seed=i) for i, name in enumerate("qkv")}
    everywhere = {path: jnp.broadcast_to(gates["q/kernel"], (4, 3, 3)) for path in gates}
    assert_close(run(everywhere), run(gates["q/kernel"]))
    assert float(jnp.abs(run(gates) - run(everywhere)).max()) > 1e-2


def test_stacked_kernels_under_scan():
    case = zoo.get("linen_scan")
    adapters = [
        perturbed(jpeft.init(jax.random.key(i), jpeft.LoRA(rank=2, targets=".*"), case.params, kernels=case.adapted), i)
        for i in range(2)
    ]
    n = jax.tree.leaves(case.x)[0].shape[0]
    found = jpeft.lift(case.fn)(jpeft.attach(case.params, adapters, gates=jnp.arange(n) % 2), case.x)
    each = [case.fn(jpeft.apply(case.params, adapter), case.x) for adapter in adapters]
    assert_close(found, jnp.stack([each[i % 2][i] for i in range(n)]))


def test_bf16():
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    attach = lambda params: jpeft.attach(params, experts(), gates=zoo.normal(4, 3, seed=5))
    plain = jpeft.lift(lambda p, x: x @ p["k"]["kernel"] + (x @ p["q"]["kernel"])[..., :4] + x @ p["v"]["kernel"])
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        found = plain(attach(half), X.astype(jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    assert_close(found, plain(attach(PARAMS), X), 0.05)


def test_what_can_not_be_routed():
    q = [jpeft.init(jax.random.key(0), spec, PARAMS) for spec in (jpeft.DoRA(rank=1), jpeft.IA3())]
    for adapter in q:
        with pytest.raises(jpeft.SpecError, match="gates are for low-rank adapters, lora or adalora; adapter 0"):
            jpeft.attach(PARAMS, adapter, gates=jnp.zeros((4, 1)))
    with pytest.raises(jpeft.SpecError, match=r"gates of shape \(4, 2\) for 3 adapters"):
        run(jnp.zeros((4, 2)))
    with pytest.raises(jpeft.SpecError, match=r"numbers of 3 adapters, from 0, or -1 for none; found \[0, 3, 1, 2\]"):
        jpeft.attach(PARAMS, experts(), gates=[0, 3, 1, 2])
    with pytest.raises(jpeft.LiftError, match=r"meets rows of shape \(4, 3\), and the gates are for \(5,\)"):
        run(jnp.zeros((5, 3)))
    with pytest.raises(jpeft.SpecError, match="no gates for 'k/kernel'"):
        run({"q/kernel": jnp.zeros((4, 3)), "v/kernel": jnp.zeros((4, 3))})
    with pytest.raises(jpeft.LiftError, match="the gates differ from row to row, and this use has no rows"):
        jpeft.lift(lambda p, x: x + p["q"]["kernel"].sum())(jpeft.attach(PARAMS, experts(), gates=jnp.zeros((4, 3))), X)


def test_in_a_flattened_batch_or_not():
    """A model that joins batch and tokens: gates for both follow, gates for the batch alone are refused."""
    flat = lambda params, x: model(params, x.reshape(12, 6)).reshape(4, 3, 4)
    gates = zoo.normal(4, 3, 3, seed=6)
    attached = jpeft.attach(PARAMS, experts(), gates=gates)
    assert_close(jpeft.lift(flat)(attached, X), run(gates))
    with pytest.raises(jpeft.LiftError, match=r"rows of shape \(12,\), and the gates are for \(4,\)"):
        jpeft.lift(flat)(jpeft.attach(PARAMS, experts(), gates=gates[:, 0]), X)


def test_dropout_of_routed_adapters():
    spec = jpeft.LoRA(rank=2, targets=["q"], dropout=0.5)
    adapters = [perturbed(jpeft.init(jax.random.key(i), spec, PARAMS), i) for i in range(2)]
    out = lambda key: jpeft.lift(model)(
        jpeft.attach(PARAMS, adapters, gates=jnp.ones((4, 2)), dropout_key=jax.random.key(key)), X
    )
    assert float(jnp.abs(out(0) - out(1)).max()) > 1e-2
    np.testing.assert_array_equal(out(0), out(0))


def test_numbers_that_the_program_knows():
    params, x = {"q": {"kernel": jax.random.normal(jax.random.key(0), (4, 3))}}, jnp.ones((2, 4))
    adapters = [jpeft.init(jax.random.key(n), jpeft.LoRA(rank=2, targets=["q"]), params) for n in range(2)]
    adapters = [one.replace(trained=jax.tree.map(jnp.ones_like, one.trained)) for one in adapters]
    lifted = jpeft.lift(lambda params, x: x @ params["q"]["kernel"])
    serve = lambda numbers: lambda x: lifted(jpeft.attach(params, adapters, gates=numbers), x)
    known = serve(jnp.array([1, -1]))
    assert jnp.array_equal(jax.jit(known)(x), known(x))
    with pytest.raises(jpeft.SpecError, match="numbers of 2 adapters"):
        jax.jit(serve(jnp.array([1, 2])))(x)
