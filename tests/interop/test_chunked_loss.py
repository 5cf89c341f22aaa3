"""The loss whose logits are never all there: the same loss and gradients as of whole logits, in less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

import decoder_checks as checks
import jpeft
from jpeft.tree import flatten
from jpeft_interop import data, train
from jpeft_interop.models import ModelError, build, chunked_loss, pure
from jpeft_interop.torch_params import params_from_torch
from tiny_folder import CONFIGS
from torch_twins import module_of

FEW = 200  # logits at once: of 4 rows of 61 not even one token's, of 2 rows one's
RNG = np.random.default_rng(0)
NEXT = np.where(RNG.random((2, 9)) < 0.3, data.IGNORE, RNG.integers(1, 61, (2, 9)))


@pytest.fixture
def chunks(monkeypatch):
    """A function that has logits worked out so many at a time."""
    return lambda most=FEW: monkeypatch.setattr(chunked_loss, "LOGITS", most)


def gap(one, other):
    """The largest difference, as a share of the largest number there is."""
    leaves = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
    return max(float(jnp.abs(a - b).max()) for a, b in leaves) / max(float(jnp.abs(b).max()) for _, b in leaves)


def test_nothing_to_learn_is_the_same_number_in_data_sets():
    assert chunked_loss.IGNORE == data.IGNORE


@pytest.mark.parametrize("most", [1, 400, 10_000])
def test_chunks_make_no_difference(chunks, most):
    hidden, kernel = jnp.asarray(RNG.normal(size=(2, 9, 5))), jnp.asarray(RNG.normal(size=(5, 61)))

    def sums(hidden, kernel):
        losses, hits = chunked_loss.token_scores(lambda x: x @ kernel, hidden, jnp.asarray(NEXT), 61)
        return jnp.sum(losses * jnp.arange(9)), (losses, hits)

    total = lambda: jax.jit(jax.value_and_grad(sums, (0, 1), has_aux=True))(hidden, kernel)
    (_, whole), gradient = total()
    chunks(most)
    (_, parts), chunked = total()
    assert gap(parts[0], whole[0]) < 1e-6 and (parts[1] == whole[1]).all() and gap(chunked, gradient) < 1e-6
    assert (whole[0][NEXT == data.IGNORE] == 0).all() and not whole[1][NEXT == data.IGNORE].any()
    assert ("scan[" in str(jax.make_jaxpr(sums)(hidden, kernel))) == (most < 2 * 9 * 61)


TORCH = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {"tie_word_embeddings": False}),
    "gemma 2, cap": ("Gemma2ForCausalLM", "Gemma2Config", {"head_dim": 12, "final_logit_softcapping": 0.5}),
}


def gpt2():
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    return checks.randomise(transformers.GPT2LMHeadModel(config))


@pytest.mark.parametrize("row", [*TORCH, "gpt2"])
def test_loss_and_gradient_are_torchs(chunks, row):
    chunks()
    model = gpt2() if row == "gpt2" else checks.model_of(TORCH[row][0], TORCH[row][1], **TORCH[row][2])
    forward, _ = pure(module_of(model))
    ids = checks.ids_of()
    labels = np.concatenate([np.full((2, 1), data.IGNORE), NEXT[:, :-1]], 1)  # torch shifts them by itself
    following = np.concatenate([NEXT[:, :-1], np.full((2, 1), data.IGNORE)], 1)
    theirs = model(input_ids=torch.tensor(ids), labels=torch.tensor(labels)).loss
    theirs.backward()
    theirs = theirs.detach()

    @jax.jit
    @jax.value_and_grad
    def mean(params):
        output = forward(params, ids, next_tokens=following)
        assert output.logits is None
        return output.losses.sum() / (following != data.IGNORE).sum()

    loss, gradient = mean(params_from_torch(model))
    assert float(loss) == pytest.approx(float(theirs), rel=1e-6)
    path = "transformer/wte/embedding" if row == "gpt2" else "model/embed_tokens/embedding"
    expected = model.get_input_embeddings().weight.grad.numpy()
    assert gap(flatten(gradient)[path], expected) < 1e-5 and np.abs(expected).max() > 1e-3


def test_the_likeliest_token_is_a_hit():
    model = checks.model_of(*TORCH["gemma 2, cap"][:2], **TORCH["gemma 2, cap"][2])
    forward, _ = pure(module_of(model))
    params, ids = params_from_torch(model), checks.ids_of()

    @jax.jit
    def hits(params):
        told = jnp.argmax(forward(params, ids).logits, -1).at[:, ::2].add(-1)
        last = forward(params, ids, next_tokens=told[:, -3:], logits_to_keep=3)
        return forward(params, ids, next_tokens=told).hits, last.hits

    whole, last = hits(params)
    assert whole[:, 1::2].all() and not whole[:, ::2].any() and (last == whole[:, -3:]).all()


def test_labels_of_another_shape_are_refused():
    model = checks.model_of("LlamaForCausalLM", "LlamaConfig")
    forward, _ = pure(module_of(model))
    with pytest.raises(ModelError, match=r"next_tokens must be .*\(2, 9\); found shape \(2, 8\)"):
        forward(params_from_torch(model), checks.ids_of(), next_tokens=NEXT[:, 1:])


def llama(dtype="float32", **options):
    """A forward, params and a batch of four rows."""
    config = CONFIGS["llama"] | {"vocab_size": 61} | options
    forward, abstract = pure(nnx.eval_shape(lambda: build(config)))
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape) + (leaf.ndim == 1), dtype)
    ids, labels = rng.integers(1, 61, (4, 9)), rng.integers(1, 61, (4, 9))
    labels[rng.random((4, 9)) < 0.4] = data.IGNORE
    return forward, jax.tree.map(draw, abstract), {"input_ids": ids, "labels": labels}


def adapter_of(params, spec):
    adapter = jpeft.init(jax.random.key(0), spec, params)
    noise = lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape, leaf.dtype)
    return adapter.replace(trained=jax.tree.map(noise, adapter.trained))


UNTIED = {"tie_word_embeddings": False}
LORA = functools.partial(jpeft.LoRA, rank=2, alpha=4)
HEADS = {
    "lm_head": (UNTIED, LORA(targets=["q_proj", "lm_head"])),
    "tied": ({}, LORA(targets=["q_proj", "embed_tokens"])),
    "saved": (UNTIED, LORA(targets=["q_proj"], modules_to_save=["lm_head"])),
}


@pytest.mark.parametrize(("row", "dtype"), [*((row, "float32") for row in HEADS), ("tied", "bfloat16")])
def test_an_adapter_learns_the_same(chunks, row, dtype):
    chunks()
    options, spec = HEADS[row]
    forward, params, batch = llama(dtype, **options)
    adapter = adapter_of(params, spec)

    def sums(loss):
        def total(trained):
            tally = loss(jpeft.lift(forward), jpeft.attach(params, adapter.replace(trained=trained)), batch)
            return tally.loss, tally

        return jax.jit(jax.grad(total, has_aux=True))(adapter.trained)

    (expected, tally), (found, chunked) = sums(train.loss_of_logits), sums(train.next_token_loss)
    # In bf16 every sum of cotangents is rounded, and chunks are summed in another order.
    assert gap(found, expected) < (1e-6 if dtype == "float32" else 2e-2)
    assert float(chunked.loss) == pytest.approx(float(tally.loss), rel=1e-6)
    assert (int(chunked.right), int(chunked.labels)) == (int(tally.right), int(tally.labels))


@pytest.mark.parametrize("row", ["lm_head", "tied"])
def test_the_heads_adapter_stays_factored(chunks, row):
    chunks()
    options, spec = HEADS[row]
    forward, params, batch = llama(**options)
    attached = jpeft.attach(params, adapter_of(params, spec))
    covered = jpeft.coverage(forward, attached, batch["input_ids"], next_tokens=batch["labels"])
    path = "lm_head/kernel" if row == "lm_head" else "model/embed_tokens/embedding"
    assert covered[path].how == "factored" and covered.count("factored") == len(covered.rows)


def test_each_row_of_a_batch_may_have_its_own_head(chunks):
    forward, params, batch = llama(**UNTIED)
    adapters = [adapter_of(params, LORA(rank=rank, targets=["q_proj", "lm_head"])) for rank in (1, 3)]
    attached = jpeft.attach(params, adapters, gates=jnp.array([0, 1, -1, 1]))

    def losses(forward, params):
        run = lambda params: forward(params, batch["input_ids"], next_tokens=batch["labels"]).losses
        return jax.jit(run)(params)

    whole, plain = losses(jpeft.lift(forward), attached), losses(forward, params)
    chunks()
    assert gap(losses(jpeft.lift(forward), attached), whole) < 1e-6 < 1e-2 < gap(plain, whole)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "remat": True}], ids=str)
def test_a_step_is_the_same(chunks, options):
    chunks()
    forward, params, batch = llama()
    adapter = adapter_of(params, HEADS["tied"][1])

    def after(loss):
        state = train.start(adapter, optax.sgd(1.0), jax.random.key(0))
        return train.step(forward, optax.sgd(1.0), loss=loss, **options)(state, params, batch)

    (expected, metrics), (found, chunked) = after(train.loss_of_logits), after(train.next_token_loss)
    moved = lambda state: jax.tree.map(jnp.subtract, state.adapter.trained, adapter.trained)
    assert gap(moved(found), moved(expected)) < 2e-6
    assert float(chunked.loss) == pytest.approx(float(metrics.loss), rel=1e-6)
    assert (float(chunked.accuracy), int(chunked.labels)) == (float(metrics.accuracy), int(metrics.labels))


def test_a_score_is_the_same(chunks):
    chunks()
    forward, params, batch = llama()
    adapter = adapter_of(params, HEADS["tied"][1])
    expected, found = (
        train.scorer(forward, loss=loss)(params, adapter, [batch])
        for loss in (train.loss_of_logits, train.next_token_loss)
    )
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert (found.accuracy, found.labels) == (expected.accuracy, expected.labels)


def memory_of(loss, vocabulary, rows, spec, **options):
    """MiB of temporary memory of a step on four rows of so many tokens, compiled and not run."""
    config = CONFIGS["llama"] | {"vocab_size": vocabulary}
    forward, params = pure(nnx.eval_shape(lambda: build(config)))
    adapter = jax.eval_shape(lambda params: jpeft.init(jax.random.key(0), spec, params), params)
    state = jax.eval_shape(lambda adapter: train.start(adapter, optax.sgd(0.1), jax.random.key(0)), adapter)
    ids = jax.ShapeDtypeStruct((4, rows // 4), jnp.int32)
    step = train.step(forward, optax.sgd(0.1), loss=loss, **options)
    lowered = step.lower(state, params, {"input_ids": ids, "labels": ids})  # pyright: ignore[reportFunctionMemberAccess]
    return lowered.compile().memory_analysis().temp_size_in_bytes / 2**20


@pytest.mark.parametrize("remat", [False, True])
def test_not_all_logits_are_there_at_once(remat):
    """All of them are 256 MiB."""
    measure = functools.partial(memory_of, vocabulary=32768, rows=2048, spec=HEADS["tied"][1], remat=remat)
    assert measure(train.next_token_loss) < 350 < 500 < measure(train.loss_of_logits)
