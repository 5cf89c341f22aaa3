"""The form that products take where they are not for the CPU: rows keep their axes. Run here, on the CPU."""

import jax
import jax.numpy as jnp
import pytest

import jpeft
import zoo
from agreement import assert_close, perturbed
from jpeft import low_rank, whole
from jpeft.rewrite import products

SPECS = (
    jpeft.LoRA(rank=2, targets=".*"),
    jpeft.DoRA(rank=2, targets=".*"),
    jpeft.AdaLoRA(rank=3, target_rank=2, targets=".*"),
    jpeft.IA3(targets=".*", feedforward=["o"]),
)
PARAMS = {"q": {"kernel": zoo.normal(8, 2, 3)}, "o": {"kernel": zoo.normal(2, 3, 8, seed=1)}}


def model(params, x):
    heads = jnp.tanh(jnp.einsum("btd,dnh->btnh", x, params["q"]["kernel"]))
    return jnp.einsum("btnh,nhd->btd", heads, params["o"]["kernel"])


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch):
    jax.clear_caches()  # what is traced does not know that it was traced for something else
    for module in (low_rank, products, whole):
        monkeypatch.setattr(module, "for_cpu", lambda: False)
    yield
    jax.clear_caches()


def adapted(spec, x):
    kernels = jpeft.kernels(model, PARAMS, x)
    return perturbed(jpeft.init(jax.random.key(0), spec, PARAMS, kernels=kernels))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.method)
@pytest.mark.parametrize("forward_mode", [False, True])
def test_values_and_gradients(spec, forward_mode):
    x = zoo.normal(2, 5, 8, seed=2)
    adapter, fast = adapted(spec, x), jpeft.lift(model, forward_mode=forward_mode)
    of = lambda run: lambda trained, x: jnp.sin(run(adapter.replace(trained=trained), x)).sum()
    both = lambda run: jax.jit(jax.value_and_grad(of(run), argnums=(0, 1)))(adapter.trained, x)
    expected = both(lambda adapter, x: model(jpeft.apply(PARAMS, adapter), x))
    assert_close(both(lambda adapter, x: fast(jpeft.attach(PARAMS, adapter), x)), expected)


def test_gates():
    x = zoo.normal(2, 5, 8, seed=2)
    adapter, fast = adapted(jpeft.LoRA(rank=2, targets=".*"), x), jpeft.lift(model)
    found = fast(jpeft.attach(PARAMS, [adapter], gates=jnp.array([[1.0], [0.0]])), x)
    expected = jnp.stack([model(jpeft.apply(PARAMS, adapter), x[:1])[0], model(PARAMS, x[1:])[0]])
    biased = fast(jpeft.attach(PARAMS, adapter), x)
    assert_close(found[0], biased[0])
    assert_close(found[1], expected[1])


def test_rows_keep_their_axes():
    x = zoo.normal(2, 5, 8, seed=2)
    adapter = adapted(jpeft.LoRA(rank=2, targets=".*"), x)
    traced = jax.make_jaxpr(lambda adapter, x: jpeft.lift(model)(jpeft.attach(PARAMS, adapter), x))(adapter, x)
    assert "2,5,2]" in str(traced) and "10,2]" not in str(traced)
