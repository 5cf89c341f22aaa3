"""BERT against torch: random weights, fp32."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from jpeft_interop.models import ModelError, build
from torch_twins import difference, randomise, run_torch, twin

SIZES = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
TOLERANCE = 1e-5


def options_of(options: dict[str, Any]) -> dict[str, Any]:
    return SIZES | options


def model_of(name: str, **options) -> Any:
    torch.manual_seed(0)
    return randomise(getattr(transformers, name)(transformers.BertConfig(**options_of(options))))


def inputs_of(batch: int = 3, time: int = 9) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    mask = np.ones((batch, time), int)
    mask[0, 6:] = 0
    mask[1, :2] = 0
    types = random.integers(0, 2, (batch, time))
    return dict(input_ids=random.integers(1, 61, (batch, time)), attention_mask=mask, token_type_ids=types)


MODELS = {
    "base": ("BertModel", {}),
    "other numbers": ("BertModel", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-2, "max_position_embeddings": 9}),
    "classifier": ("BertForSequenceClassification", {"num_labels": 3}),
    "masked lm": ("BertForMaskedLM", {}),
    "masked lm, untied": ("BertForMaskedLM", {"tie_word_embeddings": False}),
}


@pytest.mark.parametrize("row", MODELS)
def test_all_outputs_equal_torch(row):
    name, options = MODELS[row]
    model, inputs = model_of(name, **options), inputs_of()
    forward, params = twin(model)
    ours = forward(params, **inputs, output_hidden_states=True)
    theirs = run_torch(model, **inputs, output_hidden_states=True)
    assert len(ours.hidden_states) == 3
    for mine, torchs in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert difference(mine, torchs, inputs["attention_mask"]) < TOLERANCE
    if name == "BertModel":
        assert difference(ours.pooled, theirs.pooler_output) < TOLERANCE
        assert ours.logits is None
    else:
        where = inputs["attention_mask"] if "MaskedLM" in name else None
        assert difference(ours.logits, theirs.logits, where) < TOLERANCE
        assert (ours.pooled is None) == ("MaskedLM" in name)


def test_defaults_and_embeddings_given():
    model, ids = model_of("BertModel"), inputs_of()["input_ids"]
    forward, params = twin(model)
    theirs = run_torch(model, input_ids=ids)
    assert difference(forward(params, ids).last_hidden_state, theirs.last_hidden_state) < TOLERANCE
    embeds = params["embeddings"]["word_embeddings"]["embedding"][ids]
    given = forward(params, inputs_embeds=embeds).last_hidden_state
    assert difference(given, theirs.last_hidden_state) < TOLERANCE
    shifted = dict(input_ids=ids, position_ids=np.arange(9)[None] + 3)
    theirs = run_torch(model, **shifted)
    assert difference(forward(params, **shifted).last_hidden_state, theirs.last_hidden_state) < TOLERANCE


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"is_decoder": True}, "is_decoder=True is not supported"),
        ({"position_embedding_type": "relative_key"}, "only 'absolute'"),
        ({"hidden_act": "mish"}, "activation 'mish' is not supported; supported: gelu"),
        ({"num_attention_heads": 5}, "can't be split evenly into 5 heads"),
    ],
)
def test_what_is_not_here_is_refused(options, words):
    with pytest.raises(ModelError, match=words):
        nnx.eval_shape(lambda: build({"model_type": "bert"} | SIZES | options, architecture="BertModel"))


def test_more_tokens_than_positions():
    forward, params = twin(model_of("BertModel", max_position_embeddings=8))
    with pytest.raises(ModelError, match="9 tokens; this model has 8 positions"):
        forward(params, inputs_of()["input_ids"])


def test_bf16_is_as_near_to_fp32_as_torch_is():
    half, inputs = model_of("BertForSequenceClassification", num_labels=3).to(torch.bfloat16), inputs_of()
    forward, params = twin(half)
    ours, theirs = forward(params, **inputs), run_torch(half, **inputs, output_hidden_states=True)
    assert str(ours.logits.dtype) == "bfloat16"
    exact = run_torch(half.float(), **inputs, output_hidden_states=True)
    mask, last = inputs["attention_mask"], exact.hidden_states[-1]
    torchs = difference(theirs.hidden_states[-1].float(), last, mask)
    assert difference(ours.last_hidden_state, last, mask) < 1.5 * torchs
    assert difference(ours.logits, exact.logits) < 0.02 * float(exact.logits.abs().max())
