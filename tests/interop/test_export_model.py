"""Params of other forms written as Hugging Face folders, with an adapter folded in: transformers reads them."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

import jpeft
from jpeft_interop import export_model
from jpeft_interop.layout import Layout
from llama_layouts import LAYOUTS, base_here
from peft_twins import base, llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    module = base(llama)
    module.generation_config.temperature = 0.3
    module.generation_config.do_sample = True
    module.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text('{"kept": true}')
    return folder


@pytest.mark.parametrize("form", LAYOUTS)
def test_transformers_reads_the_merged_model(form, folder, tmp_path):
    module = base(llama)
    params, layout = base_here(module, form)
    adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=2, alpha=3), params, layout=layout)
    adapter = adapter.replace(trained=jax.tree.map(lambda leaf: leaf + 0.05, adapter.trained))
    export_model(tmp_path / "new", params, layout=layout, base=folder, adapter=adapter, max_shard_bytes=30_000)
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 2 and all((tmp_path / "new" / shard).stat().st_size < 40_000 for shard in shards)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    expected = layout.arrays(jpeft.merge(params, adapter))
    state = loaded.state_dict()
    assert all(np.array_equal(state[key].numpy(), tensor) for key, tensor in expected.items())
    tokens = torch.arange(7)[None]
    with torch.no_grad():
        assert (loaded(tokens).logits - module(tokens).logits).abs().max() > 1e-2
    assert loaded.generation_config.temperature == pytest.approx(0.3)
    assert (tmp_path / "new" / "tokenizer_config.json").read_text() == '{"kept": true}'


def test_without_an_adapter_it_is_the_base(folder, tmp_path):
    module = base(llama)
    params, layout = base_here(module, "scanned")
    half = jax.tree.map(lambda leaf: np.asarray(leaf).astype(ml_dtypes.bfloat16), params)
    export_model(tmp_path / "new", half, layout=layout, base=folder)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert loaded.dtype == torch.bfloat16
    state = module.state_dict()
    for key, tensor in loaded.state_dict().items():
        if "q_proj" not in key:  # whose scale makes it round once more
            assert torch.equal(tensor, state[key].to(torch.bfloat16)), key


def test_the_adapter_is_added_in_fp32_and_rounded_once(folder, tmp_path):
    params, layout = base_here(base(llama), "fused")
    half = jax.tree.map(lambda leaf: np.asarray(leaf).astype(ml_dtypes.bfloat16), params)
    adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=2, targets=["down"]), params, layout=layout)
    adapter = adapter.replace(trained=jax.tree.map(lambda leaf: leaf + 0.01, adapter.trained))
    export_model(tmp_path / "new", half, layout=layout, base=folder, adapter=adapter)
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float32), half)
    expected = layout.arrays(jpeft.merge(wide, adapter))["model.layers.1.mlp.down_proj.weight"]
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "new").state_dict()
    found = state["model.layers.1.mlp.down_proj.weight"].float().numpy()
    assert np.array_equal(found, expected.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_a_layout_of_another_model_writes_nothing(folder, tmp_path):
    module = base(llama)
    params, layout = base_here(module, "scanned")
    other = Layout({path: place for path, place in layout.items() if path != "norm"})
    with pytest.raises(jpeft.WeightsError, match="no place for 'norm'"):
        export_model(tmp_path / "new", params, layout=other, base=folder)
    less = {path: leaf for path, leaf in params.items() if path != "norm"}
    with pytest.raises(jpeft.WeightsError, match="the base has 'model.norm.weight', which lies in no leaf"):
        export_model(tmp_path / "new", less, layout=other, base=folder)
    bad = {**params, "up": np.full_like(params["up"], np.nan)}
    with pytest.raises(jpeft.WeightsError, match="not finite"):
        export_model(tmp_path / "new", bad, layout=layout, base=folder)
    assert not (tmp_path / "new").exists()


def test_experts_are_written_in_the_parts_that_files_hold(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    from jpeft.tree import flatten
    from jpeft_interop import params_from_torch
    from jpeft_interop.layout import default_layout

    sizes = dict(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_local_experts=3)
    module = base(lambda: MixtralForCausalLM(MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)))
    module.save_pretrained(tmp_path / "base")
    params = params_from_torch(module)
    layout = default_layout(flatten(params))
    export_model(tmp_path / "new", params, layout=layout, base=tmp_path / "base")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "new"))
    assert first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


def test_clips_scale_of_one_value_survives(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    from jpeft.tree import flatten
    from jpeft_interop import infer_layout, params_from_torch, params_to_torch
    from jpeft_interop.layout import default_layout

    tower = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, projection_dim=8)
    text, vision = tower | {"vocab_size": 31, "eos_token_id": 30}, tower | {"image_size": 8, "patch_size": 4}
    module = base(lambda: CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)))
    module.save_pretrained(tmp_path / "base")
    scale, params = module.logit_scale.item(), params_from_torch(module)
    assert scale != 0 and params["logit_scale"].item() == scale
    assert params_to_torch(params, module)["logit_scale"].item() == scale
    ignored = ["*position_ids"]
    for layout in (default_layout(flatten(params)), infer_layout(params, tmp_path / "base", ignore=ignored)):
        state = layout.to_torch(params)
        assert state["logit_scale"].item() == scale
        assert layout.from_torch(state)["logit_scale"].item() == scale
        export_model(tmp_path / "new", params, layout=layout, base=tmp_path / "base")
        assert CLIPModel.from_pretrained(tmp_path / "new").logit_scale.item() == scale


@pytest.mark.parametrize("names", ["modules", "files"])
def test_a_layout_by_either_names_of_experts(names, tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    from jpeft_interop import infer_layout, params_from_torch

    sizes = dict(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_local_experts=3)
    module = base(lambda: MixtralForCausalLM(MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)))
    module.save_pretrained(tmp_path / "base")
    params = params_from_torch(module)
    layout = infer_layout(params, tmp_path / "base", names=names)
    kinds = {key.rpartition("layers.0.")[2]: links[0].kind for key, links in layout.by_key.items()}
    if names == "modules":
        assert kinds["mlp.experts.gate_up_proj"] == "experts" and kinds["mlp.gate.weight"] == "matrix"
    else:
        assert kinds["block_sparse_moe.experts.2.w3.weight"] == "linear"
    export_model(tmp_path / "new", params, layout=layout, base=tmp_path / "base")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "new"))
    assert first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)
