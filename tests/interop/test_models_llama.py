"""The Llama family against torch: random weights, logits and hidden states, fp32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from jpeft_interop.models import ModelError, build, family, init_cache, pure
from torch_twins import difference, params_of, randomise, run_torch, twin

SIZES = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
TOLERANCE = 1e-5


def model_of(name: str, **options) -> torch.nn.Module:
    kind = next(kind for kind in ("Llama", "Mistral", "Qwen2") if name.startswith(kind))
    config = getattr(transformers, f"{kind}Config")(**(SIZES | {"num_key_value_heads": 2} | options))
    torch.manual_seed(0)
    return randomise(getattr(transformers, name)(config))


def ids_of(batch: int = 2, time: int = 9) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 61, (batch, time))


MODELS = {
    "tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "untied, every bias": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "no grouping": ("LlamaForCausalLM", {"num_key_value_heads": 4}),
    "head_dim": ("LlamaForCausalLM", {"head_dim": 12}),
    "other numbers": ("LlamaForCausalLM", {"rms_norm_eps": 1e-2, "hidden_act": "gelu"}),
    "base": ("LlamaModel", {}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None, "head_dim": 16}),
    "mistral window": ("MistralForCausalLM", {"sliding_window": 3}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2 windows": ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
}


@pytest.mark.parametrize("row", MODELS)
def test_hidden_states_and_logits_equal_torch(row):
    name, options = MODELS[row]
    model = model_of(name, **options)
    forward, params = twin(model)
    ours = jax.jit(lambda p, i: forward(p, i, output_hidden_states=True))(params, ids_of())
    theirs = run_torch(model, input_ids=ids_of(), output_hidden_states=True)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 3
    for mine, torchs in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert difference(mine, torchs) < TOLERANCE
    if name != "LlamaModel":
        assert difference(ours.logits, theirs.logits) < TOLERANCE
    assert difference(ours.last_hidden_state, theirs.hidden_states[-1]) < TOLERANCE
