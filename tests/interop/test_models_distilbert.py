"""DistilBERT against torch: random weights, fp32."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from folder_twins import through_a_folder
from jpeft_interop.models import ModelError, build
from jpeft_interop.torch_params import params_from_torch
from torch_twins import difference, randomise, run_torch, twin

SIZES = dict(vocab_size=61, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=12)
TOLERANCE = 1e-5


def model_of(name: str, **options) -> Any:
    torch.manual_seed(0)
    return randomise(getattr(transformers, name)(transformers.DistilBertConfig(**SIZES | options)))


def inputs_of() -> dict[str, np.ndarray]:
    mask = np.ones((3, 9), int)
    mask[0, 6:] = 0
    mask[1, :2] = 0
    return dict(input_ids=np.random.default_rng(0).integers(1, 61, (3, 9)), attention_mask=mask)


MODELS = {
    "base": ("DistilBertModel", {}),
    "other numbers": ("DistilBertModel", {"activation": "relu", "n_heads": 2, "max_position_embeddings": 9}),
    "sinusoids": ("DistilBertModel", {"sinusoidal_pos_embds": True}),
    "classifier": ("DistilBertForSequenceClassification", {"num_labels": 3}),
    "masked lm": ("DistilBertForMaskedLM", {}),
    "masked lm, relu": ("DistilBertForMaskedLM", {"activation": "relu"}),
    "masked lm, untied": ("DistilBertForMaskedLM", {"tie_word_embeddings": False}),
}


@pytest.mark.parametrize("row", MODELS)
def test_all_outputs_equal_torch_and_pass_through_folders(row, tmp_path):
    name, options = MODELS[row]
    model, inputs = model_of(name, **options), inputs_of()
    through_a_folder(model, tmp_path)
    forward, params = twin(model)
    ours = forward(params, **inputs, output_hidden_states=True)
    theirs = run_torch(model, **inputs, output_hidden_states=True)
    assert len(ours.hidden_states) == 3
    for mine, torchs in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert difference(mine, torchs, inputs["attention_mask"]) < TOLERANCE
    assert difference(ours.last_hidden_state, theirs.hidden_states[-1], inputs["attention_mask"]) < TOLERANCE
    if name == "DistilBertModel":
        assert ours.logits is None
    else:
        where = inputs["attention_mask"] if "MaskedLM" in name else None
        assert difference(ours.logits, theirs.logits, where) < TOLERANCE


def test_defaults_positions_and_embeddings_given():
    model, ids = model_of("DistilBertModel"), inputs_of()["input_ids"]
    forward, params = twin(model)
    embeds = np.array(params["embeddings"]["word_embeddings"]["embedding"])[ids]
    positions = np.tile(np.arange(9) + 3, (3, 1))
    for inputs in (dict(input_ids=ids), dict(inputs_embeds=embeds), dict(input_ids=ids, position_ids=positions)):
        theirs = run_torch(model, **inputs).last_hidden_state
        assert difference(forward(params, **inputs).last_hidden_state, theirs) < TOLERANCE


def test_tied_names_are_one_leaf():
    assert set(params_from_torch(model_of("DistilBertForMaskedLM"))["vocab_projector"]) == {"bias"}
    untied = params_from_torch(model_of("DistilBertForMaskedLM", tie_word_embeddings=False))
    assert set(untied["vocab_projector"]) == {"bias", "kernel"}


def test_more_tokens_than_positions():
    forward, params = twin(model_of("DistilBertModel", max_position_embeddings=8))
    with pytest.raises(ModelError, match="9 tokens; this model has 8 positions"):
        forward(params, inputs_of()["input_ids"])


@pytest.mark.parametrize(
    ("options", "words"), [({"n_heads": 5}, "split evenly into 5 heads"), ({"activation": "mish"}, "'mish' is not")]
)
def test_what_is_not_here_is_refused(options, words):
    with pytest.raises(ModelError, match=words):
        nnx.eval_shape(lambda: build({"model_type": "distilbert"} | SIZES | options, architecture="DistilBertModel"))
