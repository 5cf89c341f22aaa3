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
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft.errors import WeightsError
from jpeft.tree import flatten
from jpeft_interop import export_model, infer_layout, load_peft, save_peft
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
        exact = all((link.scale, link.offset) == (1, 0) for link in layout.by_key[key])
        np.testing.assert_allclose(back[key], tensor, rtol=0, atol=0 if exact else 1e-6, err_msg=key)


# Whose rows others have too, or whose many shapes take XLA long; benchmarks/layouts/prove.py has every family.
ELSEWHERE = {
    "transformers4/mistral",
    "transformers4/gemma",
    "tunix/llama3_tied",
    "tunix/qwen3_tied",
    "tunix/qwen2_tied",
}
ELSEWHERE |= {"tunix/gemma", "tunix/gemma_fused", "gemma/gemma1", "gemma/gemma2_transposed"}
ELSEWHERE |= {f"maxtext/{name}" for name in ("mistral", "llama2", "qwen3", "gemma", "gemma2", "gemma3")}
ELSEWHERE |= {name for name in FAMILIES if name.endswith("_unscanned")} - {"maxtext/llama31_unscanned"}


# One list of targets for all of a kind: gated and plain T5 have other names, which is told.
@pytest.mark.filterwarnings("ignore:.*of the targets .* match no module:UserWarning")
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ELSEWHERE])
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


def in_layer(state: dict, number: int, name: str) -> np.ndarray:
    return state[f"model.layers.{number}.{name}.weight"]


def by_heads(weight: np.ndarray) -> np.ndarray:
    """(heads, d, 10)."""
    return weight.reshape(-1, 10, 24).swapaxes(1, 2)


# What a leaf is, written out: a wrong row would be its own inverse.
LEAVES = {
    ("tunix/llama3", "layers/1/attn/q_proj/w"): lambda s: in_layer(s, 1, "self_attn.q_proj").T.reshape(24, 6, 10),
    ("tunix/qwen3_moe", "layers/1/mlp/up_proj"):
        lambda s: s["model.layers.1.mlp.experts.gate_up_proj"][:, 44:].swapaxes(1, 2),
    ("gemma/gemma2", "layer_1/attn/kv_einsum/w"):
        lambda s: np.stack([by_heads(in_layer(s, 1, f"self_attn.{n}_proj")) for n in "kv"]),
    ("gemma/gemma1_fused", "layer_1/attn/qkv_einsum/w"):
        lambda s: np.stack([by_heads(in_layer(s, 1, f"self_attn.{n}_proj")) for n in "qkv"]),
    ("gemma/gemma2", "layer_1/mlp/gating_einsum"):
        lambda s: np.stack([in_layer(s, 1, f"mlp.{n}_proj").T for n in ("gate", "up")]),
    ("maxtext/llama31", "params/decoder/layers/self_attention/query/kernel"):
        lambda s: np.stack(
            [
                in_layer(s, i, "self_attn.q_proj").T.reshape(24, 6, 2, 5).swapaxes(2, 3).reshape(24, 6, 10) / 10**0.5
                for i in range(5)
            ],
            axis=1,
        ),
    ("maxtext/llama2", "params/decoder/layers/self_attention/out/kernel"):
        lambda s: np.stack([in_layer(s, i, "self_attn.o_proj").T.reshape(6, 10, 24) for i in range(5)], axis=1),
    ("maxtext/qwen3_unscanned", "params/decoder/layers_1/self_attention/query/kernel"):
        lambda s: in_layer(s, 1, "self_attn.q_proj").T.reshape(24, 6, 10),
    ("maxtext/gemma2", "params/decoder/layers/mlp_global/wi_0/kernel"):
        lambda s: np.stack([in_layer(s, i, "mlp.gate_proj").T for i in (1, 3, 5, 7)], axis=1),
    ("maxtext/gemma2_unscanned", "params/decoder/layers_1/mlp_local/wi_1/kernel"):
        lambda s: in_layer(s, 2, "mlp.up_proj").T,
    ("maxtext/gemma3", "params/decoder/layers/layers_2/pre_self_attention_norm/scale"):
        lambda s: 1 + np.stack([in_layer(s, i, "input_layernorm") for i in (2, 8)], axis=1),
    ("maxtext/gemma3", "params/decoder/layers_remainder/layers_0/mlp/wo/kernel"):
        lambda s: in_layer(s, 12, "mlp.down_proj").T,
    ("maxtext/gemma", "params/token_embedder/embedding"): lambda s: s["model.embed_tokens.weight"] * 24**0.5,
    ("maxtext/gemma", "params/decoder/decoder_norm/scale"): lambda s: 1 + s["model.norm.weight"],
    ("transformers4/gpt2", "transformer/h/1/attn/c_attn/kernel"): lambda s: s["transformer.h.1.attn.c_attn.weight"].T,
}  # fmt: skip


@pytest.mark.parametrize(("family", "path"), LEAVES)
def test_what_a_leaf_is(family, path):
    state = arrays_of(torch_model(family))
    leaf = layout_of(family).leaf(path, state)
    np.testing.assert_allclose(leaf, LEAVES[family, path](state), rtol=3e-7)


KERNELS = {
    ("tunix/llama3", "layers/0/attn/o_proj/w"): ("product", (), (0, 1), (2,)),
    ("tunix/qwen3_moe", "layers/0/mlp/down_proj"): ("product", (0,), (1,), (2,)),
    ("gemma/gemma2", "layer_0/attn/q_einsum/w"): ("product", (), (1,), (0, 2)),
    ("gemma/gemma2", "layer_0/attn/kv_einsum/w"): ("product", (), (2,), (0, 1, 3)),
    ("maxtext/llama31", "params/decoder/layers/self_attention/query/kernel"): ("product", (1,), (0,), (2, 3)),
    ("maxtext/gemma2", "params/decoder/layers/self_attention_local/out/kernel"): ("product", (1,), (0, 2), (3,)),
    ("transformers4/gpt2", "transformer/h/0/attn/c_attn/kernel"): ("product", (), (1,), (0,)),
    ("transformers4/vit", "vit/embeddings/patch_embeddings/projection/kernel"): ("conv", (), (0, 1, 2), (3,)),
    ("transformers4/bert", "bert/embeddings/token_type_embeddings/embedding"): ("embedding", (), (0,), (1,)),
}  # fmt: skip


@pytest.mark.parametrize(("family", "path"), KERNELS)
def test_the_geometry(family, path):
    kernel = layout_of(family).kernels[path]
    assert (kernel.kind, kernel.batch, kernel.contracted, kernel.output) == KERNELS[family, path]


@pytest.mark.parametrize("family", ["tunix/llama3", "gemma/gemma2", "maxtext/llama2", "maxtext/llama31"])
@pytest.mark.parametrize("size", ["num_attention_heads", "head_dim", "hidden_size", "intermediate_size"])
def test_another_models_config_is_refused(family, size):
    config = FAMILIES[family]["config"] | {size: 12}
    with pytest.raises(WeightsError, match=rf"{ready(family)}: .*its shape is .*expected"):
        ready_layout(ready(family), shapes_of(family), config)


def test_leaves_that_contradict_each_other_are_refused():
    shapes = shapes_of("tunix/llama3")
    shapes["layers/1/attn/o_proj/w"] = jax.ShapeDtypeStruct((10, 6, 24), np.float32)
    with pytest.raises(
        WeightsError, match=r"'layers/1/attn/o_proj/w': its shape is \(10, 6, 24\); expected \(6, 10, 24\)"
    ):
        ready_layout("tunix/llama3", shapes)


def test_what_has_no_row_and_what_has_no_leaf_is_named():
    shapes = shapes_of("tunix/llama3")
    with pytest.raises(WeightsError, match="no leaf 'layers/0/attn/q_bias'; the nearest that it has are"):
        ready_layout("tunix/llama3", shapes | {"layers/0/attn/q_bias": jax.ShapeDtypeStruct((60,), np.float32)})
    without = {path: leaf for path, leaf in shapes.items() if path != "layers/3/mlp/up_proj/kernel"}
    with pytest.raises(WeightsError, match="the params have no leaf 'layers/3/mlp/up_proj/kernel'; the nearest"):
        ready_layout("tunix/llama3", without)
    scanned = shapes_of("maxtext/llama2")
    del scanned["params/decoder/layers/mlp/wo/kernel"]
    with pytest.raises(WeightsError, match="no leaf 'params/decoder/layers/mlp/wo/kernel'"):
        ready_layout("maxtext/llama2", scanned)
    with pytest.raises(WeightsError, match="tunix/llama3: "):
        ready_layout("tunix/llama3", {})


def test_another_family_is_refused():
    with pytest.raises(WeightsError, match="gemma/gemma: it has no leaf 'layer_0/attn/_key_norm/scale'"):
        ready_layout("gemma/gemma", shapes_of("gemma/gemma3"))
    with pytest.raises(WeightsError, match="no ready layout 'tunix/lama3'; the nearest are 'tunix/llama3'"):
        ready_layout("tunix/lama3", {})


def test_what_no_shape_tells_is_asked_for():
    shapes = shapes_of("maxtext/gemma2")
    with pytest.raises(WeightsError, match="pass config=, for its 'query_pre_attn_scalar'"):
        ready_layout("maxtext/gemma2", shapes)
    config = FAMILIES["maxtext/gemma2"]["config"] | {"query_pre_attn_scalar": 144}
    layout = ready_layout("maxtext/gemma2", shapes, config)
    assert layout["params/decoder/layers/self_attention_local/query/kernel"].scale == 1 / 12


def test_which_of_two_forms_is_never_guessed():
    shapes = {path: jax.ShapeDtypeStruct(tuple(24 if n == 44 else n for n in leaf.shape), np.float32)
              for path, leaf in shapes_of("gemma/gemma2").items()}  # fmt: skip
    with pytest.raises(WeightsError, match="several forms of it alike"):
        ready_layout("gemma/gemma2", shapes)


def test_the_config_in_any_form(tmp_path):
    config = torch_model("tunix/gemma3").config
    (tmp_path / "config.json").write_text(config.to_json_string())
    shapes = shapes_of("tunix/gemma3")
    expected = ready_layout("tunix/gemma3", shapes)
    for form in (config, config.to_dict(), {"text_config": config.to_dict()}, tmp_path, str(tmp_path / "config.json")):
        assert ready_layout("tunix/gemma3", shapes, form) == expected
    with pytest.raises(WeightsError, match="expected a transformers config"):
        ready_layout("tunix/gemma3", shapes, 3)


def test_a_padded_vocabulary():
    shapes = shapes_of("maxtext/gemma")
    shapes["params/token_embedder/embedding"] = jax.ShapeDtypeStruct((64, 24), np.float32)
    layout = ready_layout("maxtext/gemma", shapes, FAMILIES["maxtext/gemma"]["config"])
    params = layout.from_torch(torch_model("maxtext/gemma").state_dict())
    embedding = params["params"]["token_embedder"]["embedding"]
    assert embedding.shape == (64, 24) and not np.asarray(embedding[61:]).any()
    assert layout.arrays(params)["lm_head.weight"].shape == (61, 24)


@pytest.mark.parametrize(("family", "prefix"), [("gemma/gemma2", "transformer/"), ("maxtext/qwen3", "params/")])
def test_what_stands_before_all_paths(family, prefix):
    shapes = shapes_of(family)
    layout = ready_layout(ready(family), {prefix + path: leaf for path, leaf in shapes.items()})
    plain = ready_layout(ready(family), shapes)
    assert layout.places == {prefix + path: place for path, place in plain.items()}


def test_a_checkpoints_tree_of_google_gemma():
    ends = ("mlp/linear", "mlp/gating_einsum")
    shapes = {f"{path}/w" if path.endswith(ends) else path: leaf for path, leaf in shapes_of("gemma/gemma3").items()}
    layout = ready_layout("gemma/gemma3", shapes)
    assert layout["layer_0/mlp/linear/w"] == layout_of("gemma/gemma3")["layer_0/mlp/linear"]


def test_no_layers_left_over():
    """A number of layers that six divides leaves none unscanned."""
    shapes = {path: leaf for path, leaf in shapes_of("maxtext/gemma3").items() if "remainder" not in path}
    assert len(ready_layout("maxtext/gemma3", shapes).by_key) == 172 - 13


def test_the_names_in_files_of_vit():
    layout = ready_layout("transformers4/vit_files", shapes_of("transformers4/vit"))
    assert layout.by_key.keys() >= {"vit.encoder.layer.4.attention.attention.query.weight", "vit.layernorm.bias"}


def same_files(one: Path, other: Path) -> bool:
    left, right = (load_file(folder / "model.safetensors") for folder in (one, other))
    return left.keys() == right.keys() and all(np.array_equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name.startswith("transformers4/")])
def test_what_transformers_saved_is_written_back(family, tmp_path):
    """By the ready layout, and by the one found in the folder: the files may have other names than the modules."""
    module = torch_model(family)
    module.save_pretrained(tmp_path / "base")
    ready_one = layout_of(family)
    params = ready_one.from_torch(module.state_dict())
    found = infer_layout(params, tmp_path / "base")
    assert found.by_key.keys() <= ready_one.by_key.keys()
    assert {key: links[0].kind for key, links in found.by_key.items()} == {
        key: links[0].kind for key, links in ready_one.by_key.items() if key in found.by_key
    }
    for name, layout in {"ready": ready_one, "found": found}.items():
        export_model(tmp_path / name, params, layout=layout, base=tmp_path / "base")
        assert same_files(tmp_path / name, tmp_path / "base")


@pytest.mark.parametrize("base_has", ["files", "modules"])
@pytest.mark.parametrize("layout_has", ["files", "modules", "vit", "vit_files"])
def test_either_names_of_vit_are_taken_and_the_folders_are_written(base_has, layout_has, tmp_path):
    module = torch_model("transformers4/vit")
    module.save_pretrained(tmp_path / "base")
    if base_has == "modules":
        save_file(arrays_of(module), tmp_path / "base" / "model.safetensors", {"format": "pt"})
    params = layout_of("transformers4/vit").from_torch(module.state_dict())
    if layout_has.startswith("vit"):
        layout = ready_layout(f"transformers4/{layout_has}", params)
    else:
        layout = infer_layout(params, tmp_path / "base", names=layout_has)
        assert ("vit.encoder.layer.0.output.dense.bias" in layout.by_key) is (layout_has == base_has == "files")
    export_model(tmp_path / "new", params, layout=layout, base=tmp_path / "base")
    assert same_files(tmp_path / "new", tmp_path / "base")
    again, info = type(module).from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(info.values())
    assert all(np.array_equal(tensor, arrays_of(module)[key]) for key, tensor in arrays_of(again).items())


def test_an_adapter_by_vits_folder_is_pefts_too(tmp_path):
    """PEFT looks for modules, which transformers 5 calls otherwise than the files do."""
    module = torch_model("transformers4/vit")
    module.save_pretrained(tmp_path / "base")
    params = layout_of("transformers4/vit").from_torch(module.state_dict())
    layout = infer_layout(params, tmp_path / "base")
    spec = jpeft.LoRA(rank=2, targets=["query", "classifier"])
    adapter = jpeft.init(jax.random.key(0), spec, params, layout=layout)
    adapter = adapter.replace(trained=jax.tree.map(lambda leaf: leaf + 0.05, adapter.trained))
    save_peft(tmp_path / "adapter", adapter, params=params, layout=layout)
    merged = arrays_of(load(module, tmp_path / "adapter")[0].merge_and_unload())
    expected = layout.arrays(jpeft.merge(params, adapter))
    assert largest(merged, expected) < 1e-6
    key = "vit.layers.4.attention.q_proj.weight"
    assert np.abs(merged[key] - arrays_of(module)[key]).max() > 1e-3


@pytest.mark.parametrize(
    ("family", "base"),
    [("llama", "model"), ("gpt2", "transformer"), ("bert", "bert"), ("roberta_mlm", "roberta"), ("vit", "vit")],
)
def test_a_model_without_a_head(family, base):
    whole = shapes_of(f"transformers4/{family}")
    shapes = {path.removeprefix(f"{base}/"): leaf for path, leaf in whole.items() if path.startswith(f"{base}/")}
    layout = ready_layout(ready(f"transformers4/{family}"), shapes)
    module = torch_model(f"transformers4/{family}").base_model
    back = layout.arrays(layout.from_torch(module.state_dict()))
    assert back.keys() == module.state_dict().keys()
    assert all(np.array_equal(back[key], tensor) for key, tensor in arrays_of(module).items())
