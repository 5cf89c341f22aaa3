"""Gemma 1, 2 and 3 (text) against torch: random weights, hidden states and logits, fp32."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import decoder_checks as checks
from jpeft_interop.models import ModelError, build, pure
from jpeft_interop.torch_params import params_from_torch
from torch_twins import difference, run_torch, twin

CONFIGS = {"Gemma3": "Gemma3TextConfig", "Gemma2": "Gemma2Config", "Gemma": "GemmaConfig"}
CAPS = {"attn_logit_softcapping": 0.3, "final_logit_softcapping": 0.5}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "1": ("GemmaForCausalLM", {}),
    "1, its old name of the activation, biases": ("GemmaForCausalLM", {"hidden_act": "gelu", "attention_bias": True}),
    "1, untied, relu": ("GemmaForCausalLM", {"tie_word_embeddings": False, "hidden_act": "relu"}),
    "1, base": ("GemmaModel", {"rms_norm_eps": 1e-2}),
    "2": ("Gemma2ForCausalLM", {"query_pre_attn_scalar": 7, "sliding_window": 3}),
    "2, caps": ("Gemma2ForCausalLM", CAPS),
    "2, no caps": ("Gemma2ForCausalLM", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "2, base": ("Gemma2Model", {"sliding_window": 3, "layer_types": ["full_attention", "sliding_attention"]}),
    "3": ("Gemma3ForCausalLM", {"query_pre_attn_scalar": 7, "sliding_window": 3, "num_hidden_layers": 7}),
    "3, caps": (
        "Gemma3ForCausalLM",
        CAPS | {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 3},
    ),
    "3, ropes": (
        "Gemma3TextModel",
        {
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 900.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
}


def config_of(name: str) -> str:
    return next(config for start, config in CONFIGS.items() if name.startswith(start))


def model_of(name: str, **options: Any) -> Any:
    return checks.model_of(name, config_of(name), **({"head_dim": 12} | options))


def row_of(row: str) -> Any:
    name, options = MODELS[row]
    return model_of(name, **options)


@pytest.mark.parametrize("row", MODELS)
def test_hidden_states_and_logits_equal_torch(row: str):
    checks.assert_torchs(row_of(row))


@pytest.mark.parametrize("row", ["1", "2, caps", "3, caps"])
def test_cached_forward_equals_the_whole_one(row: str):
    checks.assert_same_with_a_cache(row_of(row))


@pytest.mark.parametrize("row", ["1", "2", "3, caps"])
def test_generation_equals_transformers(row: str):
    checks.assert_generates(row_of(row))


@pytest.mark.parametrize(
    "name",
    ["GemmaForSequenceClassification", "Gemma2ForSequenceClassification", "Gemma3TextForSequenceClassification"],
)
def test_classification(name: str):
    checks.assert_classifies(model_of(name, num_labels=3))


@pytest.mark.parametrize("row", ["1", "2", "3, caps"])
def test_folders_there_and_back(row: str, tmp_path: Any):
    checks.assert_there_and_back(row_of(row), tmp_path)


def test_embeddings_given_are_not_scaled():
    model = row_of("2")
    forward, params = twin(model)
    embeds = params["model"]["embed_tokens"]["embedding"][checks.ids_of()]
    ours = forward(params, inputs_embeds=embeds).logits
    theirs = run_torch(model, inputs_embeds=np.array(embeds)).logits
    assert difference(ours, theirs) < checks.TOLERANCE
    assert difference(forward(params, checks.ids_of()).logits, theirs) > 1e-3


def test_caps_bound_the_logits():
    forward, params = twin(row_of("2, caps"))
    assert float(jnp.abs(forward(params, checks.ids_of()).logits).max()) <= 0.5
    last = forward(params, checks.ids_of(), logits_to_keep=jnp.array([8])).logits
    assert float(jnp.abs(last).max()) <= 0.5


def test_gemma_3s_older_configs_read_the_same():
    ropes = {"rope_theta": 900.0, "rope_local_base_freq": 50.0, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    options = {"head_dim": 12, "sliding_window": 3, "sliding_window_pattern": 2, **ropes}
    model = model_of("Gemma3ForCausalLM", **options)
    config = {"model_type": "gemma3_text"} | checks.SIZES | options
    forward, _ = pure(nnx.eval_shape(lambda: build(config, architecture="Gemma3ForCausalLM")))
    theirs = run_torch(model, input_ids=checks.ids_of()).logits
    assert difference(forward(params_from_torch(model), checks.ids_of()).logits, theirs) < checks.TOLERANCE
    plain = model_of("Gemma3ForCausalLM", sliding_window=3, sliding_window_pattern=2)
    assert difference(run_torch(plain, input_ids=checks.ids_of()).logits, theirs) > 1e-3


def typical_error(found: Any, exact: Any) -> float:
    """The root of the mean square: the largest of so few is mostly chance."""
    return float(np.sqrt(np.mean(np.square(np.asarray(found, np.float32) - np.asarray(exact)))))


@pytest.mark.parametrize("row", ["1", "2", "3, caps"])
def test_bf16_is_as_near_to_fp32_as_torch_is(row: str):
    half = row_of(row).to(torch.bfloat16)
    forward, params = twin(half)
    ours = forward(params, checks.ids_of()).logits
    assert ours.dtype == jnp.bfloat16
    theirs = run_torch(half, input_ids=checks.ids_of()).logits
    exact = run_torch(half.float(), input_ids=checks.ids_of()).logits
    assert typical_error(ours, exact) < 1.5 * typical_error(theirs.float(), exact)


@pytest.mark.parametrize(("kind", "name"), [("gemma", "Gemma"), ("gemma2", "Gemma2"), ("gemma3_text", "Gemma3Text")])
def test_attention_both_ways_is_refused(kind: str, name: str):
    config = {"model_type": kind, "use_bidirectional_attention": True} | checks.SIZES
    with pytest.raises(ModelError, match="use_bidirectional_attention=True is not supported"):
        build(config, architecture=f"{name}Model")
