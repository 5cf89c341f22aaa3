from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import jpeft
from jpeft_interop.cli.app import app
from jpeft_interop.load_model import load_model
from jpeft_interop.merge_folder import merge_folder
from jpeft_interop.safetensors_file import read_safetensors
from peft_twins import SIZES, adapted, base, bert, gpt2, llama, load, save

streaming = import_module("jpeft_interop.merge_folder")
IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8]])
LAYERS = ["q_proj", "v_proj", "down_proj"]


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(IDS).logits.float().numpy()


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def folders(tmp_path: Path, module: Any, **config: Any) -> tuple[Path, Path, Any]:
    """A base's folder, its adapter's, and the PEFT model as PEFT itself loads it from there."""
    module.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    save(adapted(module, **config), tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", load(module, tmp_path / "adapter")[0]


CASES = {
    "llama-tied": (llama, {"tie_word_embeddings": True}, {"target_modules": "all-linear", "use_rslora": True}),
    "llama-biases": (llama, {"attention_bias": True}, {"target_modules": ["q_proj"], "lora_bias": True, "bias": "all"}),
    "llama-saved": (llama, {}, {"target_modules": ["k_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "llama-head": (llama, {}, {"target_modules": ["lm_head", "embed_tokens"]}),
    "gpt2": (gpt2, {}, {"target_modules": ["c_attn", "c_fc", "mlp.c_proj"], "bias": "lora_only"}),
}


@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_what_peft_merges(case: str, tmp_path: Path) -> None:
    make, options, config = CASES[case]
    module = base(make, **options)
    model, adapter, peft_model = folders(tmp_path, module, r=3, lora_alpha=5, **config)
    result = run("merge", model, adapter, tmp_path / "out")
    assert result.exit_code == 0, result.output
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert np.abs(logits(module) - logits(peft_model)).max() > 1e-2
    np.testing.assert_allclose(logits(merged), logits(peft_model.merge_and_unload()), atol=1e-5)
    assert (tmp_path / "out" / "tokenizer_config.json").exists()
    assert merged.config.tie_word_embeddings == module.config.tie_word_embeddings


def test_a_classifier_merges(tmp_path: Path) -> None:
    module = base(bert)
    config = {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS", "modules_to_save": ["pooler"]}
    model, adapter, peft_model = folders(tmp_path, module, r=2, **config)
    merge_folder(model, adapter, tmp_path / "out")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    np.testing.assert_allclose(logits(merged), logits(peft_model), atol=1e-5)


def test_an_adapter_brings_the_head_that_its_base_lacks(tmp_path: Path) -> None:
    classifier = base(bert, num_labels=3)
    config = {"task_type": "SEQ_CLS", "target_modules": ["query"], "modules_to_save": ["classifier"]}
    _, adapter, peft_model = folders(tmp_path, classifier, **config)
    classifier.bert.save_pretrained(tmp_path / "headless")
    merge_folder(tmp_path / "headless", adapter, tmp_path / "out")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert logits(merged).shape == (1, 3)
    np.testing.assert_allclose(logits(merged), logits(peft_model), atol=1e-5)


@pytest.mark.parametrize(("make", "side"), [(llama, "embedding"), (llama, "head"), (gpt2, "head")])
def test_one_side_of_a_tie(make: Any, side: str, tmp_path: Path) -> None:
    # PEFT's merge writes into the shared weight, and so changes the other side, too: its unmerged logits are right.
    module = base(make, tie_word_embeddings=True)
    embedding = "wte" if make is gpt2 else "embed_tokens"
    model, adapter, peft_model = folders(
        tmp_path, module, r=3, target_modules=[embedding if side == "embedding" else "lm_head"]
    )
    refused = run("merge", model, adapter, tmp_path / "out")
    assert refused.exit_code == 1 and isinstance(refused.exception, jpeft.MergeError)
    assert "--untie" in str(refused.exception) and f"the {'output ' * (side == 'head')}{side} alone" in str(
        refused.exception
    )
    assert not (tmp_path / "out").exists()
    assert run("merge", model, adapter, tmp_path / "out", "--untie").exit_code == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.config.tie_word_embeddings is False
    np.testing.assert_allclose(logits(merged), logits(peft_model), atol=1e-5)
    forward, params = load_model(tmp_path / "out")
    np.testing.assert_allclose(forward(params, IDS.numpy()).logits, logits(peft_model), atol=1e-4)


def test_untie_leaves_alone_what_need_not_be_untied(tmp_path: Path) -> None:
    model, adapter, _ = folders(tmp_path, base(llama, tie_word_embeddings=True), target_modules=LAYERS)
    merge_folder(model, adapter, tmp_path / "out", untie=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def test_bf16_stays_bf16(tmp_path: Path) -> None:
    module = base(llama).to(torch.bfloat16)
    model, adapter, _ = folders(tmp_path, module, target_modules=LAYERS, r=3)
    merge_folder(model, adapter, tmp_path / "out")
    tensors, _ = read_safetensors(tmp_path / "out" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"bfloat16"}
    wide = load(base(llama).to(torch.bfloat16).to(torch.float32), adapter)[0].merge_and_unload().state_dict()
    for key, tensor in tensors.items():  # fp32 maths, rounded once
        np.testing.assert_array_equal(tensor.astype(np.float32), wide[key].bfloat16().float().numpy(), key)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_block_of_columns_at_a_time_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"target_modules": [*LAYERS, "embed_tokens"], "lora_bias": False, "r": 3}
    model, adapter, _ = folders(tmp_path, base(llama), **config)
    merge_folder(model, adapter, tmp_path / "whole")
    monkeypatch.setattr(streaming, "BLOCK", 32 * 5)
    merge_folder(model, adapter, tmp_path / "blocks")
    whole, blocks = (read_safetensors(tmp_path / name / "model.safetensors")[0] for name in ("whole", "blocks"))
    for key in whole:
        np.testing.assert_allclose(blocks[key], whole[key], atol=1e-6)


def test_blocks_of_a_kernel_with_a_bias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BLOCK", 32 * 5)
    module = base(llama, attention_bias=True)
    config = {"target_modules": ["q_proj"], "lora_bias": True, "bias": "all"}
    model, adapter, peft_model = folders(tmp_path, module, r=3, **config)
    merge_folder(model, adapter, tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    np.testing.assert_allclose(logits(merged), logits(peft_model.merge_and_unload()), atol=1e-5)


def test_shards_and_a_native_file(tmp_path: Path) -> None:
    base(llama).save_pretrained(tmp_path / "base")
    forward, params = load_model(tmp_path / "base")
    adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=2, targets=LAYERS), params)
    adapter = adapter.replace(trained=jax.tree.map(lambda leaf: leaf + 0.1, adapter.trained))
    jpeft.save(tmp_path / "adapter.safetensors", adapter)
    result = run(
        "merge", tmp_path / "base", tmp_path / "adapter.safetensors", tmp_path / "out", "--max-shard-gb", 0.001
    )
    assert result.exit_code == 0 and "6 weights changed" in result.stdout
    _, merged = load_model(tmp_path / "out")
    expected = jpeft.merge(params, adapter)
    jax.tree.map(lambda found, wanted: np.testing.assert_allclose(found, wanted, atol=1e-6), merged, expected)


def test_what_overflows_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    module = base(llama).to(torch.float16)
    model, adapter, _ = folders(tmp_path, module, target_modules=LAYERS, r=3, lora_alpha=1e8)
    with pytest.raises(jpeft.MergeError, match="not finite after merging"):
        merge_folder(model, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_input(tmp_path: Path) -> None:
    model, adapter, _ = folders(tmp_path, base(llama), target_modules=LAYERS, r=3)
    (tmp_path / "empty").mkdir()
    wider = SIZES | {"intermediate_size": 64}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**wider, num_key_value_heads=2)).save_pretrained(tmp_path / "wider")
    for arguments, words in {
        (tmp_path / "nowhere", adapter): "no such folder",
        (tmp_path / "empty", adapter): "config.json",
        (tmp_path / "wider", adapter): "down_proj.*expected shape",
        (model, tmp_path / "nowhere"): "no such folder",
        (model, tmp_path / "empty"): "adapter_config.json",
        (adapter, adapter): "no config.json there; it is an adapter's folder",
        (model / "config.json", adapter): "is not a folder",
    }.items():
        result = run("merge", *arguments, tmp_path / "out")
        assert result.exit_code == 1 and isinstance(result.exception, jpeft.JpeftError)
        assert re.search(words, str(result.exception)), str(result.exception)
        assert not (tmp_path / "out").exists()
    with pytest.raises(jpeft.MergeError, match="choose another folder"):
        merge_folder(model, adapter, model)
