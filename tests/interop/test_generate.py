"""Generation: greedy against transformers' own, draws against the distribution they are from."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import jpeft
from jpeft_interop.generate import generate
from jpeft_interop.models import ModelError, Output
from torch_twins import randomise, twin

CONFIGS = {
    "LlamaForCausalLM": transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "MistralForCausalLM": transformers.MistralConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4,
    ),
    "GPT2LMHeadModel": transformers.GPT2Config(
        vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=32,
        tie_word_embeddings=False,
    ),
}  # fmt: skip


@functools.cache
def models(name: str):
    torch.manual_seed(0)
    model = randomise(getattr(transformers, name)(CONFIGS[name]))
    # Words loud enough that what is said next depends on what was said.
    model.get_input_embeddings().weight.data.mul_(10 if name.startswith("GPT2") else 2)
    return (model, *twin(model))


def prompts(padded: bool) -> tuple[np.ndarray, np.ndarray | None]:
    ids = np.random.default_rng(3).integers(1, 61, (3, 6))
    if not padded:
        return ids, None
    mask = np.ones_like(ids)
    mask[0, :4], mask[1, :1] = 0, 0
    return ids * mask, mask


def torch_greedy(model, ids, mask, new: int, eos=None) -> np.ndarray:
    mask = np.ones_like(ids) if mask is None else mask
    tokens = model.generate(
        torch.as_tensor(ids), attention_mask=torch.as_tensor(mask), max_new_tokens=new, do_sample=False,
        pad_token_id=0, eos_token_id=eos,
    ).numpy()  # fmt: skip
    return np.pad(tokens, ((0, 0), (0, ids.shape[1] + new - tokens.shape[1])))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_equals_transformers(name, padded):
    model, forward, params = models(name)
    ids, mask = prompts(padded)
    theirs = torch_greedy(model, ids, mask, 10)
    ours = generate(forward, params, ids, mask, max_new_tokens=10)
    assert all(len(np.unique(row)) > 2 for row in theirs[:, 6:])
    np.testing.assert_array_equal(ours, theirs)


def test_an_end_stops_its_row_and_padding_follows():
    model, forward, params = models("LlamaForCausalLM")
    ids, mask = prompts(True)
    free = torch_greedy(model, ids, mask, 10)
    eos = [int(free[0, 8]), int(free[1, 11])]
    theirs = torch_greedy(model, ids, mask, 10, eos)
    assert (theirs != free).any()
    ours = generate(forward, params, ids, mask, max_new_tokens=10, eos_token_id=eos, pad_token_id=0)
    np.testing.assert_array_equal(ours, theirs)
    padded_with_eos = generate(forward, params, ids, mask, max_new_tokens=10, eos_token_id=eos)
    assert (np.asarray(padded_with_eos)[0, 8:] == eos[0]).all()


def test_streaming_gives_the_same_tokens_as_they_come():
    _, forward, params = models("LlamaForCausalLM")
    ids, mask = prompts(True)
    whole, seen = generate(forward, params, ids, mask, max_new_tokens=5), []
    streamed = generate(forward, params, ids, mask, max_new_tokens=5, on_token=seen.append)
    np.testing.assert_array_equal(streamed, whole)
    np.testing.assert_array_equal(np.stack(seen, axis=1), whole[:, 6:])
    ends, stopped = np.unique(whole[:, 7]), []
    generate(forward, params, ids, mask, max_new_tokens=5, eos_token_id=ends.tolist(), on_token=stopped.append)
    assert len(stopped) == 2


def test_a_lifted_forward_with_an_adapter_attached():
    _, forward, params = models("LlamaForCausalLM")
    kernels = jpeft.kernels(forward, params, jnp.ones((1, 3), jnp.int32))
    adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=2, alpha=64), params, kernels=kernels)
    adapter = adapter.replace(trained=jax.tree.map(lambda x: x + 0.1, adapter.trained))
    ids, mask = prompts(True)
    plain = generate(forward, params, ids, mask, max_new_tokens=5)
    merged = generate(forward, jpeft.merge(params, adapter), ids, mask, max_new_tokens=5)
    lifted = generate(jpeft.lift(forward), jpeft.attach(params, adapter), ids, mask, max_new_tokens=5)
    assert (np.asarray(merged) != plain).any()
    np.testing.assert_array_equal(lifted, merged)


LOGITS = jnp.log(jnp.array([0.5, 0.25, 0.15, 0.1]))


def coin(params, input_ids, attention_mask=None, *, position_ids, cache, logits_to_keep=None) -> Output:
    """Draws from one distribution, whatever came before."""
    del attention_mask, position_ids, logits_to_keep
    return Output(logits=jnp.broadcast_to(params, (*input_ids.shape, 4)), cache=cache)


def shares(**rules) -> np.ndarray:
    tokens = generate(coin, LOGITS, np.zeros((2000, 1), int), max_new_tokens=2, key=jax.random.key(1), **rules)
    return np.bincount(np.asarray(tokens)[:, 1:].ravel(), minlength=4) / 4000


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"temperature": 1.0}, [0.5, 0.25, 0.15, 0.1]),
        ({"temperature": 0.5}, [0.7246, 0.1812, 0.0652, 0.029]),
        ({"temperature": 1.0, "top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.7}, [2 / 3, 1 / 3, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.8}, [0.5556, 0.2778, 0.1667, 0]),
        ({"temperature": 1.0, "top_p": 1e-6}, [1, 0, 0, 0]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.8}, [2 / 3, 1 / 3, 0, 0]),
    ],
)
def test_draws_have_the_shares_they_should(rules, expected):
    found = shares(**rules)
    np.testing.assert_allclose(found, expected, atol=0.03)
    assert (found[np.equal(expected, 0)] == 0).all()


def test_the_nucleus_keeps_what_transformers_keeps():
    from jpeft_interop.generate import _least_of_nucleus

    logits = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32) * 3
    keep: Any = transformers.TopPLogitsWarper(0.8)
    theirs = keep(torch.zeros(4, 1), torch.as_tensor(logits)).isfinite().numpy()
    ours = logits >= np.asarray(_least_of_nucleus(jnp.asarray(logits), jnp.float32(0.8)))
    np.testing.assert_array_equal(ours, theirs)


def test_the_key_decides_the_draw():
    draw = functools.partial(generate, coin, LOGITS, np.zeros((20, 1), int), max_new_tokens=3, temperature=1.0)
    one, again, other = (draw(key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (np.asarray(one) != other).any()
    assert (np.asarray(one)[:, 1] != np.asarray(one)[:, 2]).any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "at least 1; found 0"),
        ({"temperature": 1.0}, "needs a key"),
        ({"top_p": 0.0}, "0 < top_p"),
        ({"attention_mask": np.array([[1, 1], [1, 0]])}, r"rows \[1\] end in padding: pad prompts on the left"),
        ({"attention_mask": np.ones((2, 3))}, "shape of input_ids"),
        ({"input_ids": np.ones((2, 2))}, "must be integers"),
    ],
)
def test_what_means_nothing_is_refused(options, words):
    arguments = {"input_ids": np.ones((2, 2), int), "max_new_tokens": 2} | options
    with pytest.raises(ModelError, match=words):
        generate(coin, LOGITS, **arguments)
