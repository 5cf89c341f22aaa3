"""GPT-2 against torch: random weights, fp32."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from jpeft_interop.models import ModelError, build, init_cache
from torch_twins import difference, randomise, run_torch, twin

SIZES = dict(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=24)
TOLERANCE = 1e-5


def options_of(options: dict[str, Any]) -> dict[str, Any]:
    return SIZES | options


def model_of(name: str = "GPT2LMHeadModel", **options) -> Any:
    torch.manual_seed(0)
    return randomise(getattr(transformers, name)(transformers.GPT2Config(**options_of(options))))


def ids_of(batch: int = 3, time: int = 9) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 61, (batch, time))


MODELS = {
    "tied": ("GPT2LMHeadModel", {}),
    "untied": ("GPT2LMHeadModel", {"tie_word_embeddings": False}),
    "every scaling": ("GPT2LMHeadModel", {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}),
    "other numbers": ("GPT2LMHeadModel", {"n_inner": 40, "activation_function": "gelu", "layer_norm_epsilon": 1e-2}),
    "base": ("GPT2Model", {}),
}


@pytest.mark.parametrize("row", MODELS)
def test_hidden_states_and_logits_equal_torch(row):
    name, options = MODELS[row]
    model = model_of(name, **options)
    forward, params = twin(model)
    ours = forward(params, ids_of(), output_hidden_states=True)
    theirs = run_torch(model, input_ids=ids_of(), output_hidden_states=True)
    assert len(ours.hidden_states) == 3
    for mine, torchs in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert difference(mine, torchs) < TOLERANCE
    if name != "GPT2Model":
        assert difference(ours.logits, theirs.logits) < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side):
    model, ids = model_of(), ids_of()
    forward, params = twin(model)
    mask = np.ones_like(ids)
    mask[0, slice(0, 4) if side == "left" else slice(5, None)] = 0
    types = np.random.default_rng(1).integers(0, 61, ids.shape)
    for more in ({}, {"token_type_ids": types}, {"position_ids": np.maximum(mask.cumsum(-1) - 1, 0)}):
        inputs = dict(input_ids=ids, attention_mask=mask, **more)
        theirs = run_torch(model, **inputs)
        assert difference(forward(params, **inputs).logits, theirs.logits, mask) < TOLERANCE


def test_classification_reads_the_last_token_that_is_not_padding():
    model = model_of("GPT2ForSequenceClassification", num_labels=3, pad_token_id=0)
    forward, params = twin(model)
    ids = ids_of()
    ids[0, 5:], ids[1, :3] = 0, 0
    inputs = dict(input_ids=ids, attention_mask=(ids != 0).astype(int))
    assert difference(forward(params, **inputs).logits, run_torch(model, **inputs).logits) < TOLERANCE


def test_cached_forward_equals_the_whole_one():
    forward, params = twin(model_of())
    ids = ids_of()
    whole, cache, parts = forward(params, ids).logits, init_cache(12), []
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        output = forward(params, ids[:, start:stop], cache=cache)
        cache = output.cache
        parts.append(output.logits)
    assert np.abs(np.concatenate(parts, axis=1) - whole).max() < TOLERANCE


def test_what_does_not_fit_is_refused():
    with pytest.raises(ModelError, match="add_cross_attention=True is not supported"):
        config = {"model_type": "gpt2", "add_cross_attention": True}
        nnx.eval_shape(lambda: build(config | SIZES, architecture="GPT2Model"))
    forward, params = twin(model_of(n_positions=8))
    with pytest.raises(ModelError, match="9 tokens or slots; this model has 8 positions"):
        forward(params, ids_of())


def test_bf16_is_as_near_to_fp32_as_torch_is():
    half = model_of().to(torch.bfloat16)
    forward, params = twin(half)
    ours, theirs = forward(params, ids_of()).logits, run_torch(half, input_ids=ids_of()).logits
    assert str(ours.dtype) == "bfloat16"
    exact = run_torch(half.float(), input_ids=ids_of()).logits
    assert difference(ours, exact) < 1.5 * difference(theirs.float(), exact)
    assert difference(ours, theirs) < 0.02 * float(exact.abs().max())
