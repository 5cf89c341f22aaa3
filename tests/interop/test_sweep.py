"""Several runs in one program: what comes of each is what it would be alone, and the base is there once."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

import jpeft
from jpeft_interop import sweep, train

RATES, SEEDS, STEPS = (1e-2, 3e-3, 1e-3), (0, 1, 5), 3
RUNS = len(RATES)
SPECS = {
    "lora": jpeft.LoRA(rank=2, alpha=4, targets=["up", "down"], dropout=0.3),
    "dora": jpeft.DoRA(rank=2, alpha=4, targets=["up", "down"]),
}


class Output(NamedTuple):
    logits: Any


def forward(params, input_ids):
    """The next token of each, by a gated layer."""
    x = params["embed"][input_ids]
    return Output((x + jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]) @ params["head"])


@pytest.fixture(scope="module")
def model():
    """Params larger than all else, and batches (steps, runs, rows, tokens): every run has data of its own."""
    rng = np.random.default_rng(0)
    noise = lambda *shape: jnp.asarray(rng.standard_normal(shape) / shape[0] ** 0.5, jnp.float32)
    params = {"embed": noise(61, 96), "up": {"kernel": noise(96, 320)}, "down": {"kernel": noise(320, 96)}}
    ids = rng.integers(1, 61, (STEPS, RUNS, 2, 5))
    return params | {"head": noise(96, 61)}, {"input_ids": ids, "labels": np.roll(ids, -1, -1)}


def starts(spec, params, optimizers):
    adapters = [jpeft.init(jax.random.key(seed), spec, params) for seed in SEEDS]
    keys = [jax.random.key(10 + seed) for seed in SEEDS]
    return [train.start(*each) for each in zip(adapters, optimizers, keys, strict=True)]


def together(spec, model, **options):
    """The states and the metrics of every step, (steps, runs)."""
    params, batches = model
    optimizer = train.adamw(1.0, STEPS, weight_decay=0.1)
    states = sweep.stacked(starts(spec, params, [sweep.at_rate(optimizer, rate) for rate in RATES]))
    step = sweep.step(forward, sweep.at_rate(optimizer), **options)
    metrics = []
    for number in range(STEPS):
        states, found = step(states, params, sweep.one_of(batches, number))
        metrics.append(found)
    return states, sweep.stacked(metrics)


def alone(spec, model, run):
    """The same of one run, as `train` has it: the rate is a Python number."""
    params, batches = model
    optimizer = train.adamw(RATES[run], STEPS, weight_decay=0.1)
    state = starts(spec, params, [optimizer] * RUNS)[run]
    step, metrics = train.step(forward, optimizer), []
    for number in range(STEPS):
        state, found = step(state, params, sweep.one_of(sweep.one_of(batches, number), run))
        metrics.append(found)
    return state, sweep.stacked(metrics)


def check(together, alone, run):
    states, metrics = together
    state, figures = alone
    own = sweep.one_of(states, run)
    for ours, theirs in zip(jax.tree.leaves(own.adapter), jax.tree.leaves(state.adapter), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * float(jnp.abs(theirs).max()))
    np.testing.assert_allclose(metrics.loss[:, run], figures.loss, rtol=1e-5)
    np.testing.assert_allclose(metrics.grad_norm[:, run], figures.grad_norm, rtol=1e-5)
    assert (metrics.tokens[:, run] == figures.tokens).all() and int(own.step) == STEPS


def test_each_run_is_what_it_would_be_alone(model):
    """One after the other and all at once; rates, first values, dropout and data are each run's own."""
    runs = [together(SPECS["lora"], model, at_once=at_once) for at_once in (False, True)]
    for run in (0, 2):
        single = alone(SPECS["lora"], model, run)
        for found in runs:
            check(found, single, run)
    assert len({round(float(loss), 4) for loss in runs[0][1].loss[-1]}) == RUNS


def test_each_dora_is_what_it_would_be_alone(model):
    check(together(SPECS["dora"], model, accumulate=2), alone(SPECS["dora"], model, 1), 1)


@pytest.fixture
def all_optimizations():
    """Programs as users compile them; none that was compiled otherwise is taken for one, here or later."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


def shapes_in(jaxpr):
    """The shapes of all that is computed, at any depth."""
    for eqn in jaxpr.eqns:
        yield from (variable.aval.shape for variable in eqn.outvars if hasattr(variable.aval, "shape"))
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: isinstance(v, Jaxpr | ClosedJaxpr)):
            if isinstance(value, Jaxpr | ClosedJaxpr):
                yield from shapes_in(getattr(value, "jaxpr", value))


def count_of(shapes, params):
    """How many have the shape of a kernel, after an axis for the runs."""
    kernels = {leaf.shape for leaf in jax.tree.leaves(params)}
    return sum(shape[:1] == (RUNS,) and shape[1:] in kernels for shape in shapes)


def test_the_base_is_there_once(model, all_optimizations):
    """Traced, in the compiled program, and in its memory: that of one run, and the states."""
    params, batches = model
    optimizer, batch = sweep.at_rate(train.adamw(1.0, STEPS)), sweep.one_of(batches, 0)
    states = sweep.stacked(starts(SPECS["lora"], params, [optimizer] * RUNS))
    count = lambda step: count_of(shapes_in(jax.make_jaxpr(step)(states, params, batch).jaxpr), params)
    assert count(sweep.step(forward, optimizer)) == count(sweep.step(forward, optimizer, at_once=True)) == 0
    one = train.step(forward, optimizer)
    a_base_each = lambda states, params, batch: jax.vmap(one)(states, sweep.stacked([params] * RUNS), batch)
    assert count(a_base_each) > 0

    single = one.lower(sweep.one_of(states, 0), params, sweep.one_of(batch, 0)).compile()
    several = sweep.step(forward, optimizer).lower(states, params, batch).compile()
    shapes = [tuple(map(int, found.split(","))) for found in re.findall(r"f32\[([\d,]+)\]", several.as_text())]
    assert params["head"].shape in shapes and count_of(shapes, params) == 0
    memory, least = several.memory_analysis(), single.memory_analysis()
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    assert memory.argument_size_in_bytes == pytest.approx(size(params) + size((states, batch)), rel=0.05)
    assert memory.temp_size_in_bytes < least.temp_size_in_bytes + 2 * size(states) + size(params) / 2
