"""Whisper against torch: random weights, fp32."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from folder_twins import through_a_folder
from jpeft.tree import flatten
from jpeft_interop.models import ModelError, build, init_cache
from jpeft_interop.torch_params import params_from_torch, torch_table
from torch_twins import difference, randomise, run_torch, twin

SIZES = dict(vocab_size=61, d_model=32, num_mel_bins=6, max_source_positions=7, max_target_positions=12)
SIZES |= {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
          {"layers": 2, "attention_heads": 4, "ffn_dim": 48}.items()}  # fmt: skip
IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
TOLERANCE = 1e-5


def model_of(name: str, **options) -> Any:
    torch.manual_seed(0)
    return randomise(getattr(transformers, name)(transformers.WhisperConfig(**SIZES | IDS | options)))


def inputs_of() -> dict[str, np.ndarray]:
    random, mask = np.random.default_rng(0), np.ones((3, 9), int)
    mask[0, 6:] = 0
    mask[1, :2] = 0
    features = random.normal(size=(3, 6, 14)).astype(np.float32)
    ids = random.integers(1, 61, (3, 9))
    return dict(input_features=features, decoder_input_ids=ids, decoder_attention_mask=mask)


MODELS = {
    "base": ("WhisperModel", {}),
    "sides that differ": (
        "WhisperModel",
        {"encoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "activation_function": "relu"},
    ),
    "tied": ("WhisperForConditionalGeneration", {}),
    "untied": ("WhisperForConditionalGeneration", {"tie_word_embeddings": False}),
}


@pytest.mark.parametrize("row", MODELS)
def test_all_outputs_equal_torch_and_pass_through_folders(row, tmp_path):
    name, options = MODELS[row]
    model, inputs = model_of(name, **options), inputs_of()
    through_a_folder(model, tmp_path)
    forward, params = twin(model)
    ours = forward(params, **inputs, output_hidden_states=True)
    theirs = run_torch(model, **inputs, output_hidden_states=True)
    where = inputs["decoder_attention_mask"]
    assert len(ours.hidden_states) == 3
    for mine, torchs in zip(ours.hidden_states, theirs.decoder_hidden_states, strict=True):
        assert difference(mine, torchs, where) < TOLERANCE
    for mine, torchs in zip(ours.encoder_hidden_states, theirs.encoder_hidden_states, strict=True):
        assert difference(mine, torchs) < TOLERANCE
    assert difference(ours.encoder_last_hidden_state, theirs.encoder_last_hidden_state) < TOLERANCE
    if name == "WhisperModel":
        assert difference(ours.last_hidden_state, theirs.last_hidden_state, where) < TOLERANCE
        assert ours.logits is None
    else:
        assert difference(ours.logits, theirs.logits, where) < TOLERANCE


def test_defaults_positions_and_embeddings_given():
    model, inputs = model_of("WhisperForConditionalGeneration"), inputs_of()
    forward, params = twin(model)
    inputs.pop("decoder_attention_mask")
    theirs = run_torch(model, **inputs).logits
    assert difference(forward(params, **inputs).logits, theirs) < TOLERANCE
    mask = np.zeros((3, 14), int)
    assert difference(forward(params, **inputs, attention_mask=mask).logits, theirs) < TOLERANCE
    later = inputs | dict(decoder_position_ids=np.tile(np.arange(9) + 3, (3, 1)))
    assert difference(forward(params, **later).logits, run_torch(model, **later).logits) < TOLERANCE
    words = np.array(params["model"]["decoder"]["embed_tokens"]["embedding"])
    given = {"input_features": inputs["input_features"]}
    given["decoder_inputs_embeds"] = words[inputs["decoder_input_ids"]]
    assert difference(forward(params, **given).logits, theirs) < TOLERANCE


def test_the_encoder_need_not_run_again():
    forward, params = twin(model_of("WhisperForConditionalGeneration"))
    inputs = inputs_of()
    whole = forward(params, **inputs)
    inputs.pop("input_features")
    again = forward(params, **inputs, encoder_outputs=(whole.encoder_last_hidden_state,))
    assert difference(again.logits, whole.logits) < 1e-6


def test_tied_names_are_one_leaf():
    tied = torch_table(model_of("WhisperForConditionalGeneration"))
    assert tied["model/decoder/embed_tokens/embedding"].names[1:] == ("proj_out.weight",)
    untied = params_from_torch(model_of("WhisperForConditionalGeneration", tie_word_embeddings=False))
    assert "proj_out/kernel" in flatten(untied)


def test_the_encoders_positions_begin_as_torchs_sinusoids():
    model = transformers.WhisperModel(transformers.WhisperConfig(**SIZES | IDS))
    config = model.config.to_dict() | {"architectures": ["WhisperModel"]}
    ours = build(config, jnp.float32).encoder.embed_positions.embedding[...]
    assert difference(ours, model.encoder.embed_positions.weight) < 1e-6
    abstract = nnx.eval_shape(lambda: build(config, jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(abstract))} == {jnp.dtype(jnp.bfloat16)}


def test_bf16_is_as_near_to_fp32_as_torch_is():
    half, inputs = model_of("WhisperForConditionalGeneration").to(torch.bfloat16), inputs_of()
    forward, params = twin(half)
    halved = inputs | dict(input_features=torch.tensor(inputs["input_features"]).bfloat16())
    ours, theirs, where = forward(params, **inputs), run_torch(half, **halved), inputs["decoder_attention_mask"]
    assert str(ours.logits.dtype) == "bfloat16"
    exact = run_torch(half.float(), **inputs)
    assert difference(ours.logits, exact.logits, where) < 1.5 * difference(theirs.logits.float(), exact.logits, where)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, "give input_features"),
        ({"input_features": np.ones((1, 6, 13))}, r"\(batch, 6, 14\).*found \(1, 6, 13\)"),
        ({"input_features": np.ones((1, 6, 14))}, "exactly one of decoder_input_ids"),
        ({"input_features": np.ones((1, 6, 14)), "decoder_input_ids": np.ones((1, 13), int)}, "has 12 positions"),
        ({"cache": init_cache(8)}, "takes no cache here: give all of decoder_input_ids"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs, words):
    forward, params = twin(model_of("WhisperModel"))
    with pytest.raises(ModelError, match=words):
        forward(params, **inputs)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"decoder_attention_heads": 5}, "evenly into 5 heads"), ({"activation_function": "mish"}, "'mish' is not")],
)
def test_what_is_not_here_is_refused(options, words):
    with pytest.raises(ModelError, match=words):
        nnx.eval_shape(lambda: build({"model_type": "whisper"} | SIZES | options, architecture="WhisperModel"))
