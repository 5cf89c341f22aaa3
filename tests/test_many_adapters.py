"""Adapters stacked: each row of a batch with one of its own, and what can't be stacked."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.stacked import stack

ROWS, TOKENS, VOCAB = 6, 5, 13
IDS = jnp.array([2, 0, 1, 1, 2, 0])
SPECS = {
    "lora": jpeft.LoRA(rank=2, targets=["up", "down", "embed"]),
    "lora with a bias": jpeft.LoRA(rank=2, targets=["up", "down"], factor_bias=True),
    "dora": jpeft.DoRA(rank=2, targets=["up", "down"]),
    "adalora": jpeft.AdaLoRA(rank=3, target_rank=2, targets=["up", "down"]),
    "ia3": jpeft.IA3(targets=["up", "down"], feedforward=["down"]),
    "a head of its own": jpeft.LoRA(rank=2, targets=["up"], modules_to_save=["down"]),
}


def forward(params, ids):
    """Tokens (rows, tokens) to logits (rows, tokens, vocabulary)."""
    x = params["embed"]["embedding"][ids]
    x = x + jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]
    return x @ params["embed"]["embedding"].T


@pytest.fixture
def params(key):
    draw = lambda number, *shape: jax.random.normal(jax.random.fold_in(key, number), shape) / shape[0] ** 0.5
    return {
        "embed": {"embedding": draw(0, VOCAB, 8)},
        "up": {"kernel": draw(1, 8, 24)},
        "down": {"kernel": draw(2, 24, 8)},
    }


@pytest.fixture
def tokens(key):
    return jax.random.randint(key, (ROWS, TOKENS), 0, VOCAB)


def adapters_of(spec, params, key):
    """Three that do something, each its own; of LoRA, with an alpha of its own."""
    kernels = jpeft.kernels(forward, params, jnp.zeros((2, TOKENS), int))
    for number in range(3):
        own = dataclasses.replace(spec, alpha=1.0 + number) if spec.method == "lora" else spec
        made = jpeft.init(key, own, params, kernels=kernels)
        yield made.replace(trained=jax.tree.map(partial(noisy, jax.random.fold_in(key, number)), made.trained))


def noisy(key, leaf):
    return leaf + 0.3 * jax.random.normal(key, leaf.shape)


def by_row(params, stacked, ids, tokens):
    """The recipe of `jpeft.stacked`."""
    fast = jpeft.lift(forward)
    one = lambda adapter, row: fast(jpeft.attach(params, adapter), row[None])[0]
    return jax.vmap(one)(jax.tree.map(lambda leaf: leaf[ids], stacked), tokens)


@pytest.mark.parametrize("name", SPECS)
def test_each_row_has_the_logits_of_its_adapter(name, params, tokens, key):
    adapters = list(adapters_of(SPECS[name], params, key))
    found = jax.jit(by_row)(params, stack(adapters), IDS, tokens)
    alone = [jpeft.lift(forward)(jpeft.attach(params, adapter), tokens) for adapter in adapters]
    expected = jnp.stack([alone[number][row] for row, number in enumerate(IDS)])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert float(jnp.abs(expected - alone[0]).max()) > 1e-2


def test_each_adapter_learns_from_its_rows_alone(params, tokens, key):
    adapters = list(adapters_of(SPECS["lora"], params, key))
    many, readout = stack(adapters), jax.random.normal(key, (ROWS, TOKENS, VOCAB))
    rows = lambda t: jnp.vdot(readout, by_row(params, many.replace(trained=t), IDS, tokens))
    together = jax.jit(jax.grad(rows))(many.trained)
    logits = lambda adapter, t: jpeft.lift(forward)(jpeft.attach(params, adapter.replace(trained=t)), tokens)
    loss = lambda own, adapter, t: jnp.vdot(own, logits(adapter, t))
    for number, adapter in enumerate(adapters):
        own = readout * (number == IDS)[:, None, None]
        alone = jax.jit(jax.grad(partial(loss, own, adapter)))(adapter.trained)
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[number], b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


def test_the_frozen_product_stays_one(params, tokens, key):
    """No kernel gets an axis for the rows, and the arithmetic is one adapter's."""
    adapters = list(adapters_of(SPECS["lora"], params, key))
    many = jax.jit(by_row).lower(params, stack(adapters), IDS, tokens)
    for path in ("up", "down"):
        shape = "x".join(map(str, params[path]["kernel"].shape))
        assert f"tensor<{shape}xf32>" in many.as_text() and f"x{shape}xf32>" not in many.as_text()
    one = jax.jit(lambda params, adapter: jpeft.lift(forward)(jpeft.attach(params, adapter), tokens))
    flops = lambda lowered: lowered.compile().cost_analysis()["flops"]
    assert flops(many) < 1.1 * flops(one.lower(params, adapters[0]))


def test_which_row_gets_which_does_not_compile_again(params, tokens, key):
    traces = []
    many = stack(adapters_of(SPECS["lora"], params, key))
    step = jax.jit(lambda ids: traces.append(1) or by_row(params, many, ids, tokens))
    first, second = step(IDS), step(IDS[::-1])
    assert len(traces) == 1 and float(jnp.abs(first - second).max()) > 1e-2


def test_one_of_the_stacked_is_what_it_was(params, key):
    adapters = list(adapters_of(SPECS["dora"], params, key))
    again = jax.tree.map(lambda leaf: leaf[1], stack(adapters))
    assert again.meta == adapters[1].meta
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(adapters[1])))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (dict(rank=3), "'down/kernel': adapter 1 has lora of rank 3, adapter 0 lora of rank 2"),
        (dict(targets=["up"]), "'down/kernel': adapter 1 has nothing, adapter 0 lora of rank 2"),
        (dict(factor_bias=True), "adapter 1 has leaves"),
        (dict(dropout=0.5), "adapter 1 has dropout 0.5, adapter 0 has 0.0"),
    ],
)
def test_what_differs_in_more_than_values_is_refused(other, message, params, key):
    spec = jpeft.LoRA(rank=2, targets=["up", "down"])
    adapters = [jpeft.init(key, one, params) for one in (spec, dataclasses.replace(spec, **other))]
    with pytest.raises(jpeft.SpecError, match=message):
        stack(adapters)


def test_nothing_is_refused():
    with pytest.raises(jpeft.SpecError, match="found none"):
        stack([])
