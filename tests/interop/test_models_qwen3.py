"""Qwen3 against torch: random weights, hidden states and logits, fp32."""

from typing import Any

import numpy as np
import pytest
from flax import nnx

import decoder_checks as checks
from jpeft_interop.models import build, pure
from torch_twins import difference, run_torch, twin

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("Qwen3ForCausalLM", {"head_dim": 8, "tie_word_embeddings": True}),
    "head_dim": ("Qwen3ForCausalLM", {"head_dim": 12, "rms_norm_eps": 1e-2}),
    "biases, no grouping": ("Qwen3ForCausalLM", {"head_dim": 8, "attention_bias": True, "num_key_value_heads": 4}),
    "windows": (
        "Qwen3ForCausalLM",
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ),
    "base": ("Qwen3Model", {"head_dim": 8}),
}


def model_of(row: str) -> Any:
    name, options = MODELS[row]
    return checks.model_of(name, "Qwen3Config", **options)


@pytest.mark.parametrize("row", MODELS)
def test_hidden_states_and_logits_equal_torch(row: str):
    checks.assert_torchs(model_of(row))


@pytest.mark.parametrize("row", ["tied", "windows"])
def test_cached_forward_equals_the_whole_one(row: str):
    checks.assert_same_with_a_cache(model_of(row))


def test_generation_equals_transformers():
    checks.assert_generates(model_of("windows"))


def test_classification():
    checks.assert_classifies(checks.model_of("Qwen3ForSequenceClassification", "Qwen3Config", head_dim=8, num_labels=3))


@pytest.mark.parametrize("row", ["tied", "biases, no grouping"])
def test_folders_there_and_back(row: str, tmp_path: Any):
    checks.assert_there_and_back(model_of(row), tmp_path)


def test_each_norm_of_queries_and_keys_counts():
    model = model_of("head_dim")
    forward, params = twin(model)
    before = forward(params, checks.ids_of()).logits
    for name in ("q_norm", "k_norm"):
        weight = getattr(model.model.layers[0].self_attn, name).weight
        params["model"]["layers"]["0"]["self_attn"][name]["weight"] = 3 * np.arange(12, dtype=np.float32)
        weight.data[:] = 3 * weight.new_tensor(range(12))
        after = forward(params, checks.ids_of()).logits
        assert difference(after, before) > 1e-3
        assert difference(after, run_torch(model, input_ids=checks.ids_of()).logits) < checks.TOLERANCE


def test_a_config_that_is_silent_is_read_as_transformers_reads_it():
    sizes = {key: checks.SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    config = sizes | {"model_type": "qwen3", "num_attention_heads": 64}
    _, shapes = pure(nnx.eval_shape(lambda: build(config, architecture="Qwen3Model")))
    attention = shapes["layers"]["0"]["self_attn"]
    assert attention["q_proj"]["kernel"].shape == (32, 64 * 128)
    assert attention["k_proj"]["kernel"].shape == (32, 32 * 128)
