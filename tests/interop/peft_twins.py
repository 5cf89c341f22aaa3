"""PEFT models on tiny random bases, every adapter tensor random: what the parity tests compare with."""

from __future__ import annotations

import copy
import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from jpeft_interop import load_peft

IDS = {"bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}


def llama(**options: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **IDS, num_key_value_heads=2, **options))


def qwen2(**options: Any) -> Any:
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, **IDS, num_key_value_heads=2, **options))


def gpt2(**options: Any) -> Any:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=32, **IDS, **options))


def bert(**options: Any) -> Any:
    return BertForSequenceClassification(BertConfig(**SIZES, max_position_embeddings=32, **options))


def perturb(module: torch.nn.Module, seed: int, only_trained: bool = False) -> None:
    """Adds noise to the parameters, so that none is constant and no factor is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad or not only_trained:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def base(make: Callable[..., Any], seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    module = make(**options).eval()
    perturb(module, seed + 1)
    return module


def adapted(module: Any, seed: int = 0, **config: Any) -> Any:
    """A PEFT model over a copy of `module`."""
    return adapted_by(module, LoraConfig(**config), seed)


def adapted_by(module: Any, config: Any, seed: int = 0) -> Any:
    """The same with any of PEFT's configs."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(copy.deepcopy(module), config)
    perturb(peft_model, seed + 2, only_trained=True)
    return peft_model.eval()


def save(peft_model: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model.save_pretrained(folder)
    return folder


def load(module: Any, folder: Path, seed: int = 99) -> tuple[Any, list[str]]:
    """The folder loaded by PEFT on a copy of `module` under another seed, and what PEFT warned of."""
    torch.manual_seed(seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(copy.deepcopy(module), str(folder))
    return loaded.eval(), sorted({str(warning.message) for warning in caught})


UNMATCHED = "did not match any targeted module"  # what PEFT says of a pattern without effect


def logits(model: Any, tokens: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.as_tensor(tokens)).logits


def loaded_here(folder: Path, params: Any, peft_warned: list[str], **options: Any) -> Any:
    """What we load, which tells of a pattern without effect just where PEFT does.

    PEFT tells of all of an AdaLoRA's ranks, and of patterns for parameters, though it uses both.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapter = load_peft(folder, params, **options)
    told = [str(warning.message) for warning in caught]
    assert all("match no target" in text for text in told), told
    config = json.loads((folder / "adapter_config.json").read_text())
    uses_all = config["peft_type"] == "ADALORA" or config.get("target_parameters")
    assert not told if uses_all else bool(told) == any(UNMATCHED in text for text in peft_warned), told
    return adapter


FAMILIES: dict[str, tuple[Callable[..., Any], tuple[str, ...], tuple[str, ...], str]] = {
    "llama": (
        llama,
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"),
        ("lm_head", "norm"),
        "CAUSAL_LM",
    ),
    "qwen2": (qwen2, ("q_proj", "k_proj", "v_proj", "o_proj", "mlp.up_proj", "down_proj"), ("lm_head",), "CAUSAL_LM"),
    "gpt2": (gpt2, ("c_attn", "attn.c_proj", "mlp.c_proj", "c_fc", "wpe"), ("ln_f",), "CAUSAL_LM"),
    "bert": (bert, ("query", "key", "value", "dense", "word_embeddings"), ("pooler",), "SEQ_CLS"),
}


def random_config(number: int) -> tuple[str, dict[str, Any]]:
    """A family and a LoRA configuration, drawn from every option that changes a weight."""
    draw = random.Random(number)
    family = list(FAMILIES)[number % len(FAMILIES)]
    _, names, saved, task = FAMILIES[family]
    maybe = lambda value, otherwise: value if draw.random() < 0.4 else otherwise
    targets = draw.choice([draw.sample(names, draw.randint(1, 3)), "all-linear", rf".*\.1\..*({names[0]}|{names[1]})"])
    config: dict[str, Any] = {
        "r": draw.randint(1, 6),
        "lora_alpha": draw.choice([1, 3, 8, 16.5]),
        "use_rslora": maybe(True, False),
        "target_modules": targets,
        "rank_pattern": maybe({names[0]: draw.randint(1, 7), rf"1\..*{names[1]}": 2}, {}),
        "alpha_pattern": maybe({names[1]: draw.choice([2, 5.5])}, {}),
        "bias": draw.choice(["none", "all", "lora_only"]),
        "task_type": maybe(task, None),
        "init_lora_weights": draw.choice([True, False, "gaussian"]),
    }
    if isinstance(targets, list):
        config["layers_to_transform"] = (
            maybe([1], None) if names[-1] not in targets and "lm_head" not in targets else None
        )
        config["exclude_modules"] = maybe([f"0.attn.{targets[0]}", targets[-1]], None) if len(targets) > 1 else None
        config["modules_to_save"] = maybe([draw.choice(saved)], None) if "lm_head" not in targets else None
    return family, config
