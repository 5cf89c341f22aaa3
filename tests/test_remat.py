"""Rematerialisation keeps the result of an adapted product, and not the terms of the sum that it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft

N, D, LAYERS = 16, 8, 3
POLICIES = jax.checkpoint_policies
DOTS = POLICIES.dots_with_no_batch_dims_saveable
BOTH = POLICIES.save_from_both_policies(DOTS, jpeft.adapted_saveable)


def unrolled(params, x):
    for name in sorted(params):
        x = jnp.tanh(x @ params[name]["kernel"])
    return x


def scanned(params, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"]["kernel"])[0]


def params_of(fn):
    draw = lambda *shape: jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32) / 3
    layers = {f"w{n}": {"kernel": draw(D, D)} for n in range(LAYERS)}
    return layers if fn is unrolled else {"stack": {"kernel": draw(LAYERS, D, D)}}


def kept(loss, trained):
    """How many numbers of a layer's rows a backward pass has to wait with."""
    saved = jax.tree.leaves(jax.eval_shape(lambda trained: jax.vjp(loss, trained)[1], trained))
    return sum(leaf.size for leaf in saved if leaf.shape[-1:] == (D,) and N in leaf.shape) / (N * D)


@pytest.mark.parametrize("fn", [unrolled, scanned])
@pytest.mark.parametrize("spec", [jpeft.LoRA(rank=2), jpeft.DoRA(rank=2)], ids=lambda spec: spec.method)
def test_one_array_for_each_product(fn, spec):
    params, x = params_of(fn), jnp.ones((N, D))
    adapter = jpeft.init(jax.random.key(0), spec, params, kernels=jpeft.kernels(fn, params, x))
    lifted = jpeft.lift(fn)
    loss = lambda trained: lifted(jpeft.attach(params, adapter.replace(trained=trained)), x).sum()
    found = {name: jax.checkpoint(loss, policy=policy) for name, policy in (("dots", DOTS), ("both", BOTH))}
    assert kept(found["both"], adapter.trained) <= LAYERS + 1 < 2 * LAYERS <= kept(found["dots"], adapter.trained)
    close = lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, jax.grad(found["both"])(adapter.trained), jax.grad(loss)(adapter.trained))
