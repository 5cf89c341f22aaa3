"""Folders for vLLM: plain LoRA of one rank and one scaling, which PEFT reads to the same weights."""

import json

import jax
import numpy as np
import pytest
from peft import AdaLoraConfig
from safetensors.numpy import load_file

import jpeft
from jpeft_interop import load_peft, params_from_torch, save_peft
from peft_round_trip import largest_difference
from peft_twins import adapted, adapted_by, base, llama, load, save

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PATTERNS = {"rank_pattern": {"0.self_attn.q_proj": 5}, "alpha_pattern": {"v_proj": 9}}
CONFIGS = {
    "as it is": dict(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"]),
    "rank-stabilised": dict(r=3, lora_alpha=3, target_modules=["q_proj"], use_rslora=True),
    "patterns": dict(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj", "up_proj"], **PATTERNS),
    "an embedding": dict(r=2, lora_alpha=3, target_modules=["embed_tokens", "o_proj"]),
}


def as_vllm_reads(folder) -> dict[str, np.ndarray]:
    """ΔW by module, from nothing but the fields and the keys that vLLM's loader looks at."""
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    assert not config["modules_to_save"] and not config["use_dora"] and config["bias"] == "none" and config["r"] > 0
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in tensors.items():
        assert key.startswith("base_model.model.")
        parts = key.removeprefix("base_model.model.").split(".")
        side = parts.pop() if parts[-1] != "weight" else parts.pop() and parts.pop()
        assert side in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"), key
        assert config["r"] in tensor.shape
        found.setdefault(".".join(parts), {})[side[-1]] = tensor
    return {module: scaling * (pair["B"] @ pair["A"]) for module, pair in found.items()}


@pytest.mark.parametrize("row", CONFIGS)
def test_vllm_reads_what_peft_does(row, tmp_path):
    module = base(llama)
    theirs = adapted(module, **CONFIGS[row])
    params = params_from_torch(module)
    adapter = load_peft(save(theirs, tmp_path / "theirs"), params)
    save_peft(tmp_path / "ours", adapter, params=params, target="vllm")
    merged = theirs.merge_and_unload().state_dict()
    found, state = as_vllm_reads(tmp_path / "ours"), module.state_dict()
    changed = {key.removesuffix(".weight") for key in merged if not np.array_equal(merged[key], state[key])}
    assert set(found) == changed
    for name, delta in found.items():
        delta = delta.T if name.endswith("embed_tokens") else delta
        np.testing.assert_allclose(delta, (merged[f"{name}.weight"] - state[f"{name}.weight"]).numpy(), atol=1e-5)
    again, _ = load(module, tmp_path / "ours")
    assert largest_difference(params_from_torch(again.merge_and_unload()), jpeft.merge(params, adapter)) < 1e-5


def test_an_adalora_is_one(tmp_path):
    module = base(llama)
    config = AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=["q_proj", "up_proj"], lora_alpha=5)
    theirs = adapted_by(module, config)
    params = params_from_torch(module)
    adapter = load_peft(save(theirs, tmp_path / "theirs"), params)
    save_peft(tmp_path / "ours", adapter, params=params, target="vllm")
    assert len(as_vllm_reads(tmp_path / "ours")) == 4
    again, _ = load(module, tmp_path / "ours")
    assert largest_difference(params_from_torch(again.merge_and_unload()), jpeft.merge(params, adapter)) < 1e-5


REFUSED = {
    "DoRA": (jpeft.DoRA(rank=2, targets=["q_proj"]), "serves LoRA alone, and this is 'dora'.*jpeft merge.*to_lora"),
    "IA³": (jpeft.IA3(targets=["q_proj"]), "serves LoRA alone, and this is 'ia3'"),
    "saved": (jpeft.LoRA(rank=2, targets=["q_proj"], modules_to_save=["norm"]), "trained whole .'model/norm/weight'"),
    "bias of B": (jpeft.LoRA(rank=2, targets=["q_proj"], factor_bias=True), "no bias of B"),
}


@pytest.mark.parametrize("row", REFUSED)
def test_what_vllm_refuses_is_refused_here_with_the_way_out(row, tmp_path):
    spec, message = REFUSED[row]
    params = params_from_torch(base(llama))
    adapter = jpeft.init(jax.random.key(0), spec, params)
    with pytest.raises(jpeft.AdapterError, match=message):
        save_peft(tmp_path / "a", adapter, params=params, target="vllm")
    assert not (tmp_path / "a").exists()
