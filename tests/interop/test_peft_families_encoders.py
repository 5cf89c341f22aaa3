"""LoRA on the encoders and encoder-decoders: PEFT's folders give PEFT's logits here, and those of here do in PEFT."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import transformers

import jpeft
from jpeft_interop import load_peft, params_from_torch, save_peft
from jpeft_interop.models import pure
from peft_twins import adapted, base, load, save
from torch_twins import difference, module_of, run_torch

TOLERANCE = 1e-4
WIDE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SIDES = dict(layers=1, attention_heads=4, ffn_dim=48)


def ids_of(key: str = "input_ids", time: int = 9) -> dict[str, np.ndarray]:
    return {key: np.random.default_rng(0).integers(5, 50, (2, time))}


def pixels_of() -> dict[str, np.ndarray]:
    return {"pixel_values": np.random.default_rng(1).normal(size=(2, 3, 12, 12)).astype(np.float32)}


def roberta() -> Any:
    config = transformers.RobertaConfig(**WIDE, vocab_size=50, max_position_embeddings=16, num_labels=3)
    return transformers.RobertaForSequenceClassification(config)


def distilbert() -> Any:
    config = transformers.DistilBertConfig(vocab_size=50, dim=32, hidden_dim=48, n_layers=2, n_heads=4)
    return transformers.DistilBertForMaskedLM(config)


def vit() -> Any:
    config = transformers.ViTConfig(**WIDE, image_size=12, patch_size=4, num_labels=3)
    return transformers.ViTForImageClassification(config)


def clip() -> Any:
    tower = WIDE | dict(num_hidden_layers=1)
    text = tower | dict(vocab_size=50, max_position_embeddings=12, eos_token_id=2)
    vision = tower | dict(image_size=12, patch_size=4)
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def t5() -> Any:
    config = transformers.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    return transformers.T5ForConditionalGeneration(config)


def flan_t5() -> Any:
    config = transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return transformers.T5ForConditionalGeneration(config)


def whisper() -> Any:
    sides = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in SIDES.items()}
    config = transformers.WhisperConfig(
        **sides, vocab_size=50, d_model=32, num_mel_bins=6, max_source_positions=7, max_target_positions=12,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


@dataclass(frozen=True)
class Row:
    """A family, what people adapt in it, and what it reads."""

    make: Callable[[], Any]
    targets: tuple[str, ...]
    inputs: dict[str, np.ndarray]
    task: str | None = None
    saved: tuple[str, ...] = ()


SPEECH = {"input_features": np.random.default_rng(2).normal(size=(2, 6, 14)).astype(np.float32)}
BOTH = ids_of() | ids_of("decoder_input_ids", 6)
ROWS = {
    "roberta": Row(roberta, ("query", "value"), ids_of(), "SEQ_CLS", ("classifier",)),
    "distilbert": Row(distilbert, ("q_lin", "v_lin"), ids_of()),
    "vit": Row(vit, ("q_proj", "v_proj"), pixels_of(), None, ("classifier",)),
    "clip": Row(clip, ("q_proj", "v_proj"), ids_of() | pixels_of()),
    "t5": Row(t5, ("q", "v"), BOTH, "SEQ_2_SEQ_LM"),
    "flan-t5": Row(flan_t5, ("q", "k", "v", "o", "wi_0", "wi_1", "wo"), BOTH, "SEQ_2_SEQ_LM"),
    "whisper": Row(whisper, ("q_proj", "v_proj"), SPEECH | ids_of("decoder_input_ids")),
}


def logits_of(output: Any) -> Any:
    return output.logits_per_image if getattr(output, "logits", None) is None else output.logits


@functools.cache
def forward_of(name: str) -> Callable[..., Any]:
    return jax.jit(pure(module_of(ROWS[name].make()))[0])


@pytest.mark.parametrize("targets", ["named", "all-linear"])
@pytest.mark.parametrize("name", ROWS)
def test_pefts_folders_give_its_logits(name: str, targets: str, tmp_path: Path):
    row = ROWS[name]
    module = base(row.make)
    params = params_from_torch(module)
    saved = {"modules_to_save": list(row.saved)} if row.saved else {}
    chosen = targets if targets == "all-linear" else list(row.targets)
    peft_model = adapted(module, r=4, lora_alpha=3, target_modules=chosen, task_type=row.task, **saved)
    adapter = load_peft(save(peft_model, tmp_path), params)
    theirs, plain = (logits_of(run_torch(model, **row.inputs)) for model in (peft_model, module))
    assert difference(plain, theirs) > 1e-2
    ours = forward_of(name)(jpeft.apply(params, adapter), **row.inputs)
    assert difference(logits_of(ours), theirs) < TOLERANCE


@pytest.mark.parametrize("name", ROWS)
def test_folders_of_here_give_the_same_logits_in_peft(name: str, tmp_path: Path, key: Any):
    row = ROWS[name]
    module = base(row.make)
    params = params_from_torch(module)
    spec = jpeft.LoRA(rank=3, alpha=5, targets=list(row.targets), modules_to_save=list(row.saved))
    adapter = jpeft.init(key, spec, params)
    leaves, tree = jax.tree.flatten(adapter.trained)
    keys = jax.random.split(key, len(leaves))
    noisy = [leaf + 0.1 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
    adapter = adapter.replace(trained=jax.tree.unflatten(tree, noisy))
    save_peft(tmp_path, adapter, params=params, task_type=row.task)
    loaded, warned = load(module, tmp_path)
    assert not [text for text in warned if "missing" in text.lower()]
    theirs = logits_of(run_torch(loaded, **row.inputs))
    assert difference(logits_of(run_torch(module, **row.inputs)), theirs) > 1e-2
    ours = forward_of(name)(jpeft.apply(params, adapter), **row.inputs)
    assert difference(logits_of(ours), theirs) < TOLERANCE


# A target that is one use of a tied weight, or a convolution, or a table.
LESS_USUAL = [
    ("distilbert", "vocab_projector"),
    ("distilbert", "word_embeddings"),
    ("t5", "lm_head"),
    ("t5", "relative_attention_bias"),
    ("whisper", "proj_out"),
    ("whisper", "embed_tokens"),
    ("vit", "projection"),
    ("clip", "patch_embedding"),
]


@pytest.mark.parametrize(("name", "target"), LESS_USUAL)
def test_less_usual_targets(name: str, target: str, tmp_path: Path):
    row = ROWS[name]
    module = base(row.make)
    peft_model = adapted(module, r=4, target_modules=[target])
    params = params_from_torch(module)
    adapter = load_peft(save(peft_model, tmp_path), params)
    theirs, plain = (logits_of(run_torch(model, **row.inputs)) for model in (peft_model, module))
    assert difference(plain, theirs) > 1e-2
    ours = jax.jit(jpeft.lift(pure(module_of(module))[0]))(jpeft.attach(params, adapter), **row.inputs)
    assert difference(logits_of(ours), theirs) < TOLERANCE


@pytest.mark.parametrize("target", ["shared", "embed_tokens", "encoder.embed_tokens"])
def test_one_of_t5s_lookups_is_refused(target: str, tmp_path: Path):
    """One table, looked up under two names of three: PEFT adapts each for itself, and `shared`, which none reads."""
    module = base(t5)
    folder = save(adapted(module, r=4, target_modules=[target]), tmp_path)
    with pytest.raises(jpeft.AdapterError, match=r"'shared/embedding' is looked up under 3 names, 'shared.weight'"):
        load_peft(folder, params_from_torch(module))


@pytest.mark.parametrize("saved", ["shared", "lm_head"])
def test_one_of_t5s_embeddings_trained_whole_is_refused(saved: str, tmp_path: Path):
    module = base(t5)
    folder = save(adapted(module, r=4, target_modules=["q"], modules_to_save=[saved]), tmp_path)
    with pytest.raises(jpeft.AdapterError, match=f"'base_model.model.{saved}.weight' replaces one use of"):
        load_peft(folder, params_from_torch(module))
