"""Phi-3 against torch: random weights, hidden states and logits, fp32."""

from typing import Any

import numpy as np
import pytest
from flax import nnx

import decoder_checks as checks
from jpeft_interop.models import ModelError, build, pure
from jpeft_interop.torch_params import params_from_torch
from torch_twins import difference, run_torch, twin

FACTORS = {"short_factor": [1.0, 1.1, 1.3, 2.0], "long_factor": [1.5, 3.0, 7.0, 12.0]}
LONGROPE = {
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 100.0, **FACTORS},
    "original_max_position_embeddings": 12,
    "max_position_embeddings": 48,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped": ("Phi3ForCausalLM", {}),
    "tied, no grouping": ("Phi3ForCausalLM", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "window": ("Phi3ForCausalLM", {"sliding_window": 3}),
    "partial": ("Phi3ForCausalLM", {"rope_parameters": {"rope_theta": 50.0, "partial_rotary_factor": 0.75}}),
    "base": ("Phi3Model", {"hidden_act": "gelu", "rms_norm_eps": 1e-2}),
}


def model_of(name: str, **options: Any) -> Any:
    return checks.model_of(name, "Phi3Config", **options)


@pytest.mark.parametrize("row", MODELS)
def test_hidden_states_and_logits_equal_torch(row: str):
    name, options = MODELS[row]
    checks.assert_torchs(model_of(name, **options))


@pytest.mark.parametrize("row", ["window", "partial"])
def test_cached_forward_equals_the_whole_one(row: str):
    name, options = MODELS[row]
    checks.assert_same_with_a_cache(model_of(name, **options))


def test_generation_equals_transformers():
    checks.assert_generates(model_of("Phi3ForCausalLM", sliding_window=3))


def test_classification():
    checks.assert_classifies(model_of("Phi3ForSequenceClassification", num_labels=3))


@pytest.mark.parametrize("row", ["grouped", "tied, no grouping"])
def test_folders_there_and_back(row: str, tmp_path: Any):
    name, options = MODELS[row]
    checks.assert_there_and_back(model_of(name, **options), tmp_path)


def test_projections_are_fused_as_torch_has_them():
    attention = params_from_torch(model_of("Phi3Model"))["layers"]["0"]
    shapes = pure(nnx.eval_shape(lambda: build(model_of("Phi3Model").config.to_dict(), architecture="Phi3Model")))[1]
    assert shapes["layers"]["0"]["self_attn"]["qkv_proj"]["kernel"].shape == (32, 32 + 16 + 16)
    assert shapes["layers"]["0"]["mlp"]["gate_up_proj"]["kernel"].shape == (32, 96)
    assert attention["self_attn"].keys() == shapes["layers"]["0"]["self_attn"].keys()


@pytest.mark.parametrize("time", [12, 13, 30])
@pytest.mark.parametrize("more", [{}, {"attention_factor": 1.7}, {"factor": 2.0}])
def test_longrope_changes_beyond_the_trained_length(time: int, more: dict[str, float]):
    rope = LONGROPE["rope_parameters"] | more
    model = model_of("Phi3ForCausalLM", **(LONGROPE | {"rope_parameters": rope}))
    checks.assert_torchs(model, checks.ids_of(1, time))


def test_longrope_of_older_files():
    model = model_of("Phi3ForCausalLM", **LONGROPE)
    config = {key: value for key, value in model.config.to_dict().items() if key != "rope_parameters"}
    config |= {"rope_theta": 100.0, "rope_scaling": {"type": "su", **FACTORS}}
    forward, _ = pure(nnx.eval_shape(lambda: build(config, architecture="Phi3ForCausalLM")))
    ids = checks.ids_of(1, 20)
    theirs = run_torch(model, input_ids=ids).logits
    assert difference(forward(params_from_torch(model), ids).logits, theirs) < checks.TOLERANCE
    plain = twin(model_of("Phi3ForCausalLM"))
    assert difference(plain[0](plain[1], ids).logits, theirs) > 1e-3


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_type": "yarn", "factor": 2.0}, "rope_type 'yarn' is not supported in a 'phi3' model"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 4}, "'longrope' needs 'long_factor'; the config"),
        ({"rope_type": "longrope", **FACTORS, "long_factor": [1.0]}, "needs 4 numbers as 'long_factor'; found"),
    ],
)
def test_ropes_that_it_has_not_are_refused(rope: dict[str, Any], words: str):
    config = {"model_type": "phi3", "rope_parameters": rope} | checks.SIZES
    with pytest.raises(ModelError, match=words):
        nnx.eval_shape(lambda: build(config, architecture="Phi3Model"))


def test_a_config_that_is_silent_is_read_as_transformers_reads_it():
    model = model_of("Phi3ForCausalLM")
    config = {"model_type": "phi3"} | {key: value for key, value in checks.SIZES.items() if key != "pad_token_id"}
    forward, _ = pure(nnx.eval_shape(lambda: build(config, architecture="Phi3ForCausalLM")))
    params, ids = params_from_torch(model), np.asarray(checks.ids_of())
    assert difference(forward(params, ids).logits, run_torch(model, input_ids=ids).logits) < checks.TOLERANCE
