"""RoBERTa and XLM-RoBERTa against torch: random weights, fp32."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from folder_twins import through_a_folder
from jpeft_interop.load_model import load_model
from jpeft_interop.models import ModelError, build
from jpeft_interop.torch_params import params_from_torch
from torch_twins import difference, randomise, run_torch, twin

SIZES = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(max_position_embeddings=16)
TOLERANCE = 1e-5
PAD = 1


def model_of(name: str, **options) -> Any:
    config = "XLMRobertaConfig" if name.startswith("XLM") else "RobertaConfig"
    torch.manual_seed(0)
    return randomise(getattr(transformers, name)(getattr(transformers, config)(**SIZES | options)))


def inputs_of(pad: int = PAD) -> dict[str, np.ndarray]:
    """Three rows: padded on the right, padded on the left, whole; token types as the table allows."""
    random = np.random.default_rng(0)
    ids, mask = random.integers(5, 61, (3, 9)), np.ones((3, 9), int)
    mask[0, 6:] = 0
    mask[1, :2] = 0
    return dict(input_ids=np.where(mask, ids, pad), attention_mask=mask, token_type_ids=random.integers(0, 2, (3, 9)))


MODELS = {
    "base": ("RobertaModel", {}),
    "other numbers": ("RobertaModel", {"hidden_act": "relu", "layer_norm_eps": 1e-2, "max_position_embeddings": 11}),
    "other padding": ("RobertaModel", {"pad_token_id": 3}),
    "classifier": ("RobertaForSequenceClassification", {"num_labels": 3}),
    "masked lm": ("RobertaForMaskedLM", {}),
    "masked lm, always gelu": ("RobertaForMaskedLM", {"hidden_act": "relu"}),
    "masked lm, untied": ("RobertaForMaskedLM", {"tie_word_embeddings": False}),
    "xlm": ("XLMRobertaModel", {}),
    "xlm classifier": ("XLMRobertaForSequenceClassification", {}),
}


@pytest.mark.parametrize("row", MODELS)
def test_all_outputs_equal_torch(row):
    name, options = MODELS[row]
    model, inputs = model_of(name, **options), inputs_of(options.get("pad_token_id", PAD))
    forward, params = twin(model)
    ours = forward(params, **inputs, output_hidden_states=True)
    theirs = run_torch(model, **inputs, output_hidden_states=True)
    assert len(ours.hidden_states) == 3
    for mine, torchs in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert difference(mine, torchs, inputs["attention_mask"]) < TOLERANCE
    if name.endswith("Model"):
        assert difference(ours.pooled, theirs.pooler_output) < TOLERANCE
        assert ours.logits is None
    else:
        where = inputs["attention_mask"] if "MaskedLM" in name else None
        assert difference(ours.logits, theirs.logits, where) < TOLERANCE
        assert ours.pooled is None


def test_positions_pass_over_padding_by_the_ids_alone():
    model, inputs = model_of("RobertaModel"), inputs_of()
    forward, params = twin(model)
    ids = inputs["input_ids"]
    ours, theirs = forward(params, ids).last_hidden_state, run_torch(model, input_ids=ids).last_hidden_state
    assert difference(ours, theirs) < TOLERANCE
    counted = np.tile(np.arange(9) + PAD + 1, (3, 1))
    other = forward(params, ids, position_ids=counted).last_hidden_state
    assert difference(other, theirs, ids != PAD) > 1e-3
    assert difference(other, run_torch(model, input_ids=ids, position_ids=counted).last_hidden_state) < TOLERANCE


def test_embeddings_given_have_no_padding_to_see():
    model = model_of("RobertaModel")
    forward, params = twin(model)
    embeds = np.array(params["embeddings"]["word_embeddings"]["embedding"])[inputs_of()["input_ids"]]
    ours = forward(params, inputs_embeds=embeds).last_hidden_state
    assert difference(ours, run_torch(model, inputs_embeds=embeds).last_hidden_state) < TOLERANCE


@pytest.mark.parametrize("row", [row for row in MODELS if row not in ("other numbers", "other padding")])
def test_folders(row, tmp_path):
    name, options = MODELS[row]
    model, inputs = model_of(name, **options), inputs_of()
    forward, params, _ = through_a_folder(model, tmp_path)
    theirs = run_torch(model, **inputs)
    key = "last_hidden_state" if name.endswith("Model") else "logits"
    where = None if "Sequence" in name else inputs["attention_mask"]
    assert difference(getattr(forward(params, **inputs), key), getattr(theirs, key), where) < TOLERANCE


def test_a_base_model_from_a_checkpoint_with_a_head(tmp_path):
    model = model_of("RobertaForMaskedLM")
    model.save_pretrained(tmp_path)
    with pytest.raises(Exception, match=r"'pooler/dense/bias'.*init_missing"):
        load_model(tmp_path, architecture="RobertaModel")
    model = model_of("RobertaForSequenceClassification")
    model.save_pretrained(tmp_path)
    with pytest.raises(Exception, match=r"'lm_head/bias'.*init_missing"):
        load_model(tmp_path, architecture="RobertaForMaskedLM")


def test_tied_names_are_one_leaf():
    params = params_from_torch(model_of("RobertaForMaskedLM"))
    assert set(params["lm_head"]) == {"bias", "dense", "layer_norm"}
    assert "decoder" in params_from_torch(model_of("RobertaForMaskedLM", tie_word_embeddings=False))["lm_head"]


def test_more_tokens_than_positions():
    forward, params = twin(model_of("RobertaModel", max_position_embeddings=10))
    with pytest.raises(ModelError, match="9 tokens; this model has 8 positions"):
        forward(params, inputs_of()["input_ids"])


@pytest.mark.parametrize(
    ("options", "words"),
    [({"is_decoder": True}, "is_decoder=True is not supported"), ({"hidden_act": "mish"}, "'mish' is not supported")],
)
def test_what_is_not_here_is_refused(options, words):
    with pytest.raises(ModelError, match=words):
        nnx.eval_shape(lambda: build({"model_type": "roberta"} | SIZES | options, architecture="RobertaModel"))
