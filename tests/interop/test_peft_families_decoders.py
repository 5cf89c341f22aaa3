"""LoRA on the decoders: PEFT's folders give PEFT's logits here, and those of here do in PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import transformers

import jpeft
from jpeft_interop import load_peft, params_from_torch, save_peft
from jpeft_interop.models import pure
from peft_twins import IDS, SIZES, adapted, base, load, save
from torch_twins import difference, module_of, run_torch

TOLERANCE = 1e-4
APART = ("q_proj", "k_proj", "v_proj", "o_proj")
DENSE = (*APART, "gate_proj", "up_proj", "down_proj")
QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [0]}
# torch's class and config, what else its config says, and what is adapted
ROWS: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...]]] = {
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 12}, DENSE),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {"head_dim": 12}, DENSE),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {"head_dim": 12, "sliding_window": 3}, DENSE),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {"head_dim": 12, "sliding_window": 3}, DENSE),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {}, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 4}, APART),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", QWEN_EXPERTS, APART),
}
MIXTURES = ("mixtral", "qwen3_moe")
TOKENS = {"input_ids": np.random.default_rng(0).integers(3, 50, (2, 9))}


def base_of(name: str) -> Any:
    model, config, options, _ = ROWS[name]
    sizes = SIZES | IDS | {"num_key_value_heads": 2, "pad_token_id": 0}
    return base(lambda: getattr(transformers, model)(getattr(transformers, config)(**sizes, **options)))


def ours_of(module: Any, params: Any, adapter: Any) -> Any:
    forward, _ = pure(module_of(module))
    return jax.jit(jpeft.lift(forward))(jpeft.attach(params, adapter), **TOKENS).logits


@pytest.mark.parametrize("name", ROWS)
def test_pefts_folders_give_its_logits(name: str, tmp_path: Path):
    module = base_of(name)
    # "all-linear" would adapt routers and stacked experts, too
    targets = list(APART) if module.config.model_type in MIXTURES else "all-linear"
    peft_model = adapted(module, r=4, lora_alpha=3, target_modules=targets, task_type="CAUSAL_LM")
    params = params_from_torch(module)
    adapter = load_peft(save(peft_model, tmp_path), params)
    theirs, plain = (run_torch(model, **TOKENS).logits for model in (peft_model, module))
    assert difference(plain, theirs) > 1e-2
    assert difference(ours_of(module, params, adapter), theirs) < TOLERANCE


@pytest.mark.parametrize("name", ROWS)
def test_folders_of_here_give_the_same_logits_in_peft(name: str, tmp_path: Path, key: Any):
    module = base_of(name)
    params = params_from_torch(module)
    adapter = jpeft.init(key, jpeft.LoRA(rank=3, alpha=5, targets=list(ROWS[name][3])), params)
    leaves, tree = jax.tree.flatten(adapter.trained)
    keys = jax.random.split(key, len(leaves))
    noisy = [leaf + 0.1 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
    adapter = adapter.replace(trained=jax.tree.unflatten(tree, noisy))
    save_peft(tmp_path, adapter, params=params, task_type="CAUSAL_LM")
    loaded, warned = load(module, tmp_path)
    assert not [text for text in warned if "missing" in text.lower()]
    theirs = run_torch(loaded, **TOKENS).logits
    assert difference(run_torch(module, **TOKENS).logits, theirs) > 1e-2
    assert difference(ours_of(module, params, adapter), theirs) < TOLERANCE
