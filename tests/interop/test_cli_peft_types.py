"""`jpeft merge` and `jpeft inspect` on folders of DoRA, AdaLoRA and IA³."""

from importlib import import_module

import jax
import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import jpeft
from cli_folders import run
from jpeft_interop.adapter_summary import summarise
from jpeft_interop.load_peft import load_peft
from jpeft_interop.torch_params import params_from_torch
from peft_twins import adapted_by, base, bert, gpt2, llama, qwen2, save

IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8]])
ADALORA = {"init_r": 3, "target_r": 1, "total_step": 10, "lora_alpha": 5}

CASES = {
    "dora": (llama, LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=["q_proj", "down_proj"])),
    "dora-gpt2": (gpt2, LoraConfig(r=3, use_dora=True, target_modules=["c_attn", "wpe"], bias="lora_only")),
    "adalora": (llama, AdaLoraConfig(**ADALORA, target_modules=["q_proj", "gate_proj"])),
    "adalora-gpt2": (gpt2, AdaLoraConfig(**ADALORA, target_modules=["c_attn", "c_fc"], modules_to_save=["ln_f"])),
    "ia3": (qwen2, IA3Config()),
    "ia3-gpt2": (gpt2, IA3Config(target_modules=["c_attn", "c_fc", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])),
    "ia3-bert": (bert, IA3Config(task_type="SEQ_CLS")),
}


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits.float().numpy()


@pytest.mark.parametrize("block", [None, 100])
@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_what_was_merged(case, block, tmp_path, monkeypatch):
    if block is not None:
        monkeypatch.setattr(import_module("jpeft_interop.merge_folder"), "BLOCK", block)
    make, config = CASES[case]
    module = base(make)
    module.save_pretrained(tmp_path / "base")
    peft_model = adapted_by(module, config)
    save(peft_model, tmp_path / "adapter")
    result = run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert result.exit_code == 0, result.exception
    auto = AutoModelForSequenceClassification if make is bert else AutoModelForCausalLM
    expected = logits(peft_model)
    assert np.abs(logits(module) - expected).max() > 1e-3
    np.testing.assert_allclose(logits(auto.from_pretrained(tmp_path / "out")), expected, atol=1e-5)


def test_a_tied_head_that_ia3_scales(tmp_path):
    module = base(llama, tie_word_embeddings=True)
    module.save_pretrained(tmp_path / "base")
    peft_model = adapted_by(module, IA3Config(target_modules=["k_proj", "lm_head"], feedforward_modules=[]))
    save(peft_model, tmp_path / "adapter")
    refused = run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert refused.exit_code == 1 and "--untie" in str(refused.exception)
    result = run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "--untie")
    assert result.exit_code == 0, result.exception
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    np.testing.assert_allclose(logits(merged), logits(peft_model), atol=1e-5)


@pytest.mark.parametrize("case", ["dora-gpt2", "adalora-gpt2", "ia3-gpt2"])
def test_a_folder_and_a_file_say_the_same(case, tmp_path):
    make, config = CASES[case]
    module = base(make)
    save(adapted_by(module, config), tmp_path / "folder")
    jpeft.save(tmp_path / "native.safetensors", load_peft(tmp_path / "folder", params_from_torch(module)))
    one, other = summarise(tmp_path / "folder"), summarise(tmp_path / "native.safetensors")
    assert one.size == other.size > 0
    for x, y in zip(one.factors, other.factors, strict=True):
        assert (x.module, x.rank, x.alpha, x.scaling) == (y.module, y.rank, y.alpha, pytest.approx(y.scaling))
        np.testing.assert_allclose([x.norm_a, x.norm_b, x.norm], [y.norm_a, y.norm_b, y.norm], rtol=1e-6)
    found = {x.name: (x.size, pytest.approx(x.norm)) for x in other.plain}
    assert {x.name: (x.size, x.norm) for x in one.plain} == found
    for place in ("folder", "native.safetensors"):
        result = run("inspect", tmp_path / place)
        assert result.exit_code == 0, result.exception
        assert {"dora": "DoRA", "adalora": "AdaLoRA", "ia3": "IA3"}[case.split("-")[0]] in result.stdout


def test_norms_are_those_of_pefts_change(tmp_path):
    peft_model = adapted_by(base(llama), CASES["adalora"][1])
    summary = summarise(save(peft_model, tmp_path))
    modules = dict(peft_model.get_base_model().named_modules())
    assert len(summary.factors) == 4
    for one in summary.factors:
        change = modules[one.module].get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(one.norm, np.linalg.norm(change), rtol=1e-5)


def test_inspect_at_rank_0(tmp_path, key):
    params = params_from_torch(base(llama))
    spec = jpeft.AdaLoRA(rank=3, target_rank=1, total_steps=9, targets=["q_proj"])
    adapter = jpeft.prune(jpeft.init(key, spec, params))  # E starts at zero
    jpeft.save(tmp_path / "a.safetensors", adapter)
    from jpeft_interop import save_peft

    save_peft(tmp_path / "a", adapter, params=params)
    for place in ("a", "a.safetensors"):
        assert [(one.rank, one.norm) for one in summarise(tmp_path / place).factors] == [(0, 0.0)] * 2
    assert jax.tree.leaves(adapter.trained)[0].size == 0
