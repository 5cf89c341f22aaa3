"""Ready layouts: the trees of other packages, and adapters between them and PEFT on the torch model.

The trees were recorded from the packages themselves (benchmarks/layouts), where the layouts are proven on them too.
"""

import json
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers

import jpeft
from jpeft.tree import flatten
from jpeft_interop import load_peft, save_peft
from jpeft_interop.ready import ready_layout, ready_names
from peft_twins import adapted, base, load, save

FAMILIES = json.loads((Path(__file__).parent / "data" / "ready_layouts.json").read_text())
READY = {
    "gemma/gemma1": "gemma/gemma", "gemma/gemma1_fused": "gemma/gemma", "gemma/gemma2_transposed": "gemma/gemma2",
    "tunix/gemma_fused": "tunix/gemma", "tunix/llama3_tied": "tunix/llama3", "tunix/qwen2_tied": "tunix/qwen2",
    "tunix/qwen3_tied": "tunix/qwen3", "transformers4/bert_mlm": "transformers4/bert",
    "transformers4/roberta_mlm": "transformers4/roberta", "transformers4/t5_gated": "transformers4/t5",
    "maxtext/llama31": "maxtext/llama3.1",
}  # fmt: skip
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bert": ["query", "key", "value", "dense"],
    "roberta": ["query", "key", "value", "dense"],
    "vit": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "projection"],
    "t5": ["q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"],
}
PATTERNS = {
    "gpt2": {"0.attn.c_attn": 4},
    "bert": {"query": 1, "0.intermediate.dense": 4},
    "roberta": {"value": 1},
    "vit": {"k_proj": 1},
    "t5": {"0.layer.0.SelfAttention.q": 4},
}


def shapes_of(family: str) -> dict[str, jax.ShapeDtypeStruct]:
    """The recorded tree, flat: a row with `x5` is of five layers."""
    made = {}
    for path, row in FAMILIES[family]["shapes"].items():
        count = int(row[-1][1:]) if isinstance(row[-1], str) else None
        shape = jax.ShapeDtypeStruct(tuple(row[: count and -1]), np.float32)
        made |= {path.replace("{i}", str(i)): shape for i in range(count or 1)}
    return made


def ready(family: str) -> str:
    scanned = family.removesuffix("_unscanned")
    return READY.get(scanned, scanned)


@cache
def module_of(class_name: str, config: str, is_untied: bool):
    module_class = getattr(transformers, class_name)
    module = base(lambda: module_class(module_class.config_class(**json.loads(config), attn_implementation="eager")))
    if is_untied and module.lm_head.weight is module.shared.weight:  # transformers 5 ties every T5's on its own
        module.lm_head.weight = torch.nn.Parameter(1.5 * module.lm_head.weight.detach())
        module.config.tie_word_embeddings = False
    return module


def torch_model(family: str):
    recorded = FAMILIES[family]
    is_untied = recorded["class"].startswith("T5") and "lm_head/kernel" in recorded["shapes"]
    return module_of(recorded["class"], json.dumps(recorded["config"]), is_untied)


def layout_of(family: str):
    return ready_layout(ready(family), shapes_of(family), FAMILIES[family]["config"])


def arrays_of(module) -> dict[str, np.ndarray]:
    return {key: tensor.detach().numpy() for key, tensor in module.state_dict().items()}


def largest(ours: dict, theirs: dict) -> float:
    assert set(ours) == set(theirs)
    return max(float(np.abs(ours[key] - theirs[key]).max()) for key in ours)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tree_holds_torchs_weights_and_gives_them_back(family):
    state = arrays_of(torch_model(family))
    layout = layout_of(family)
    params = layout.from_torch(torch_model(family).state_dict())
    assert {path: leaf.shape for path, leaf in flatten(params).items()} == {
        path: leaf.shape for path, leaf in shapes_of(family).items()
    }
    back = layout.arrays(params)
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        np.testing.assert_allclose(back[key], tensor, rtol=0, atol=1e-6 if family.startswith("maxtext") else 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_the_same_in_peft(family, tmp_path):
    module, layout = torch_model(family), layout_of(family)
    params = layout.from_torch(module.state_dict())
    kind = FAMILIES[family]["config"]["model_type"]
    options = {"target_modules": TARGETS.get(kind, LLAMA)}
    if kind == "qwen3_moe":
        names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        options = {"target_modules": LLAMA[:4], "target_parameters": names}
    pattern = PATTERNS.get(kind, {"0.self_attn.q_proj": 4, "v_proj": 1})
    theirs = adapted(module, r=2, lora_alpha=3, rank_pattern=pattern, **options)
    adapter = load_peft(save(theirs, tmp_path / "theirs"), params, layout=layout)
    expected = arrays_of(theirs.merge_and_unload())
    assert largest(expected, arrays_of(module)) > 1e-3
    assert largest(layout.arrays(jpeft.merge(params, adapter)), expected) < 1e-5
    drawn = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=2, alpha=3), params, layout=layout)
    noise = lambda leaf: leaf + 0.1 * np.random.default_rng(leaf.size).standard_normal(leaf.shape).astype(leaf.dtype)
    drawn = drawn.replace(trained=jax.tree.map(noise, drawn.trained))
    save_peft(tmp_path / "ours", drawn, params=params, layout=layout)
    loaded, warned = load(module, tmp_path / "ours")
    assert not [message for message in warned if "missing" in message.lower() or "unexpected" in message.lower()]
    merged = arrays_of(loaded.merge_and_unload())
    assert largest(merged, arrays_of(module)) > 1e-3
    assert largest(layout.arrays(jpeft.merge(params, drawn)), merged) < 1e-5


def test_every_name_has_a_recorded_tree():
    assert {ready(family) for family in FAMILIES} | {"transformers4/vit_files"} == set(ready_names())
