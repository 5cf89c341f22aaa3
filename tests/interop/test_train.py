"""The training step: its loss, its gradients, what it leaves alone; and the score."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

import jpeft
from jpeft_interop import train
from jpeft_interop.data import IGNORE
from jpeft_interop.models import build, pure
from tiny_folder import CONFIGS


@pytest.fixture(scope="module")
def model():
    """A forward, its params, an adapter that does something, a batch with labels here and there."""
    config = CONFIGS["llama"] | {"vocab_size": 61}
    forward, abstract = pure(nnx.eval_shape(lambda: build(config)))
    rng = np.random.default_rng(0)
    noise = lambda scale, leaf: jnp.asarray(scale * rng.standard_normal(leaf.shape), jnp.float32)
    params = jax.tree.map(lambda leaf: noise(0.2, leaf) + (leaf.ndim == 1), abstract)  # norms about 1
    spec = jpeft.LoRA(rank=2, alpha=4, targets=["q_proj", "down_proj"], dropout=0.3)
    adapter = jpeft.init(jax.random.key(0), spec, params)
    noisy = jax.tree.map(lambda leaf: leaf + noise(0.1, leaf), adapter.trained)
    ids = rng.integers(1, 61, (4, 9))
    labels = np.where(rng.random((4, 9)) < 0.4, IGNORE, rng.integers(1, 61, (4, 9)))
    labels[3, 1:] = IGNORE
    return forward, params, adapter.replace(trained=noisy), {"input_ids": ids, "labels": labels}


def without_dropout(adapter):
    spec = dataclasses.replace(adapter.spec, dropout=0.0)
    return adapter.replace(meta=dataclasses.replace(adapter.meta, spec=spec))


def largest(tree, other):
    return max(float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True))


def scale(tree):
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def test_the_loss_is_torchs(key):
    logits = 9 * jax.random.normal(key, (3, 5, 7))
    labels = np.random.default_rng(0).integers(0, 7, (3, 5))
    labels[0, :3] = IGNORE
    theirs = torch.nn.functional.cross_entropy(
        torch.tensor(np.asarray(logits)).reshape(-1, 7), torch.tensor(labels).reshape(-1), reduction="sum"
    )
    ours = train.cross_entropy(logits, jnp.asarray(labels))
    assert float(ours.loss) == pytest.approx(float(theirs), rel=1e-6) and int(ours.labels) == 12
    right = (np.argmax(np.asarray(logits), -1) == labels) & (labels != IGNORE)
    assert int(ours.right) == right.sum()


def test_the_loss_is_taken_in_fp32():
    logits = jnp.array([[40.0, 39.75]], jnp.bfloat16)
    assert float(train.cross_entropy(logits, jnp.array([0])).loss) == pytest.approx(np.log1p(np.exp(-0.25)), rel=1e-6)


def gradient_by_the_definition(model):
    forward, params, adapter, batch = model

    @jax.jit
    @jax.value_and_grad
    def mean(trained):
        logits = forward(jpeft.apply(params, adapter.replace(trained=trained)), batch["input_ids"]).logits
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(batch["labels"], 0)[..., None], -1)[..., 0]
        return -jnp.sum(picked * (batch["labels"] != IGNORE)) / (batch["labels"] != IGNORE).sum()

    return mean(adapter.trained)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"remat": True}], ids=str)
def test_a_step_goes_down_the_mean_over_labels(model, options):
    forward, params, adapter, batch = model
    plain = without_dropout(adapter)
    state = train.start(plain, optax.sgd(1.0), jax.random.key(0))
    after, metrics = train.step(forward, optax.sgd(1.0), **options)(state, params, batch)
    moved = jax.tree.map(jnp.subtract, adapter.trained, after.adapter.trained)
    loss, expected = gradient_by_the_definition((forward, params, plain, batch))
    assert float(metrics.loss) == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics.grad_norm) == pytest.approx(float(optax.tree.norm(expected)), rel=1e-4)
    assert largest(moved, expected) < 1e-5 * max(1, scale(expected)) and scale(expected) > 1e-3
    assert (int(metrics.labels), int(metrics.tokens), int(after.step)) == ((batch["labels"] != IGNORE).sum(), 36, 1)


def test_a_step_changes_nothing_but_what_is_trained(model):
    forward, params, adapter, batch = model
    before = jax.tree.map(np.array, (params, adapter))
    state = train.start(adapter, optax.adam(0.1), jax.random.key(0))
    after, _ = train.step(forward, optax.adam(0.1))(state, params, batch)
    assert largest((params, adapter), before) == 0
    assert largest(after.adapter.constant, adapter.constant) == 0 and after.adapter.meta == adapter.meta
    assert all(
        largest(new, old) > 0
        for new, old in zip(jax.tree.leaves(after.adapter.trained), jax.tree.leaves(adapter.trained), strict=True)
    )


def test_the_base_is_an_argument_and_the_states_memory_is_reused(model):
    forward, params, adapter, batch = model
    step = train.step(forward, optax.adam(0.1))
    state = train.start(adapter, optax.adam(0.1), jax.random.key(0))
    biggest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    program = step.lower(state, params, batch).as_text()
    assert len(max(program.splitlines(), key=len)) < biggest  # a constant is written out, two digits a byte
    _, one = step(state, params, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.adapter.trained))
    again = train.start(adapter, optax.adam(0.1), jax.random.key(0))
    _, other = step(again, jax.tree.map(lambda leaf: 2 * leaf, params), batch)
    assert step._cache_size() == 1 and abs(float(one.loss) - float(other.loss)) > 0.01


def test_dropout_is_drawn_from_the_key_and_the_step(model):
    forward, params, adapter, batch = model
    step = train.step(forward, optax.sgd(0.0))
    losses = []
    for seed in (0, 0, 1):
        state = train.start(adapter, optax.sgd(0.0), jax.random.key(seed))
        state, first = step(state, params, batch)
        losses.append((float(first.loss), float(step(state, params, batch)[1].loss)))
    assert losses[0] == losses[1] and len({*losses[0], *losses[2]}) == 4


def test_parts_of_a_batch_drop_different_inputs(model):
    forward, params, adapter, batch = model
    twice = jax.tree.map(lambda array: np.concatenate([array[:2], array[:2]]), batch)
    state = lambda: train.start(adapter, optax.sgd(0.0), jax.random.key(0))
    half = train.step(forward, optax.sgd(0.0))(state(), params, jax.tree.map(lambda a: a[:2], batch))[1]
    whole = train.step(forward, optax.sgd(0.0), accumulate=2)(state(), params, twice)[1]
    assert abs(float(half.loss) - float(whole.loss)) > 1e-4


def test_adamw_warms_up_clips_and_falls():
    rates = []
    optimizer = train.adamw(0.1, 20, warmup=0.2)
    state = optimizer.init(jnp.zeros(3))
    for _ in range(20):
        update, state = optimizer.update(jnp.array([3e6, -4e6, 0.0]), state, jnp.zeros(3))
        rates.append(float(-update[0]))
    assert rates[0] == pytest.approx(0.025, rel=1e-3) and max(rates) == rates[4] == pytest.approx(0.1, rel=1e-3)
    assert rates[-1] < 0.002 and all(a > b for a, b in zip(rates[4:], rates[5:], strict=False))
    clipped = optax.clip_by_global_norm(1.0).update(jnp.array([3e6, -4e6]), optax.EmptyState())[0]
    np.testing.assert_allclose(clipped, [0.6, -0.8], rtol=1e-6)


def test_a_score_is_the_mean_over_all_labels_whatever_the_batches(model):
    forward, params, adapter, batch = model
    score = train.scorer(forward)
    split = [{name: array[n : n + 1] for name, array in batch.items()} for n in range(4)]
    whole, parts = score(params, adapter, [batch]), score(params, adapter, split)
    expected, _ = gradient_by_the_definition(model)
    assert whole.loss == pytest.approx(parts.loss, rel=1e-6) == pytest.approx(float(expected), rel=1e-5)
    assert whole.labels == parts.labels and whole.perplexity == pytest.approx(np.exp(whole.loss))


def test_training_learns_a_text_by_heart(model):
    forward, params, adapter, batch = model
    adapter, optimizer = without_dropout(adapter), train.adamw(0.1, 40)
    state, step = train.start(adapter, optimizer, jax.random.key(0)), train.step(forward, optimizer)
    before = train.scorer(forward)(params, adapter, [batch])
    *_, (last, _) = train.run(step, state, params, [batch] * 40)
    after = train.scorer(forward)(params, last.adapter, [batch])
    assert after.loss < 0.5 * before.loss and after.accuracy > before.accuracy
