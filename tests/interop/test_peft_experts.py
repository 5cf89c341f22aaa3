"""Adapters of experts' stacked kernels (PEFT's target_parameters), both ways, on Mixtral and Qwen3-MoE."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import jpeft
from jpeft.tree import flatten
from jpeft_interop import Layout, Place, load_peft, params_from_torch, save_peft
from jpeft_interop.layout import default_layout
from jpeft_interop.target_parameters import stored_names
from peft_round_trip import assert_logits, largest_difference, logits_of
from peft_twins import IDS, adapted, base, load, save

WEIGHTS = "adapter_model.safetensors"
SIZES = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, **IDS)


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=3))


def qwen3_moe():
    config = Qwen3MoeConfig(
        **SIZES, intermediate_size=20, moe_intermediate_size=24, num_experts=3, num_experts_per_tok=2, head_dim=8,
        mlp_only_layers=[1],
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def there_and_back(theirs, params, layout, folder) -> jpeft.Adapter:
    """PEFT's adapter read by a layout: the same merged tensors, and the same file when it is written again."""
    adapter = load_peft(save(theirs, folder / "theirs"), params, layout=layout)
    expected = theirs.merge_and_unload().state_dict()
    for name, tensor in layout.arrays(jpeft.merge(params, adapter)).items():
        np.testing.assert_allclose(tensor, expected[name].numpy(), atol=1e-5)
    save_peft(folder / "ours", adapter, params=params, layout=layout)
    first, second = load_file(folder / "theirs" / WEIGHTS), load_file(folder / "ours" / WEIGHTS)
    assert first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)
    return adapter


CONFIGS = {
    "one": dict(r=2, lora_alpha=5, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"]),
    "nested": dict(
        r=3, lora_alpha=4, target_modules=["v_proj"], use_rslora=True,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    ),
    "parameters alone": dict(r=2, target_modules=[], target_parameters=["experts.down_proj"]),
    "one layer": dict(r=2, target_modules=["o_proj"], target_parameters=["0.mlp.experts.down_proj"]),
    "a router": dict(r=2, target_modules=[], target_parameters=["mlp.gate.weight", "experts.down_proj"]),
    "all-linear": dict(r=2, target_modules="all-linear"),
}  # fmt: skip


@pytest.mark.parametrize("make", [mixtral, qwen3_moe])
@pytest.mark.parametrize("row", CONFIGS)
def test_experts_adapters_both_ways(make, row, tmp_path):
    module = base(make)
    theirs = adapted(module, **CONFIGS[row])
    params = params_from_torch(module)
    adapter = load_peft(save(theirs, tmp_path / "theirs"), params)
    tokens = np.random.default_rng(0).integers(0, 50, (2, 7))
    assert_logits(logits_of(module, params, adapter, tokens), theirs, module, tokens)
    merged = params_from_torch(theirs.merge_and_unload())
    assert largest_difference(params, merged) > 1e-3
    assert largest_difference(jpeft.merge(params, adapter), merged) < 1e-5
    save_peft(tmp_path / "ours", adapter, params=params)
    first, second = load_file(tmp_path / "theirs" / WEIGHTS), load_file(tmp_path / "ours" / WEIGHTS)
    assert first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)
    again, warned = load(module, tmp_path / "ours")
    assert not [text for text in warned if "missing" in text.lower() or "unexpected" in text.lower()]
    assert largest_difference(params_from_torch(again.merge_and_unload()), merged) < 1e-6


@pytest.mark.parametrize("make", [mixtral, qwen3_moe])
def test_an_adapter_made_here_is_the_same_in_peft(make, tmp_path):
    module = base(make)
    params = params_from_torch(module)
    layout = default_layout(flatten(params))
    spec = jpeft.LoRA(rank=2, alpha=3, targets=["experts.gate_up_proj", "experts.down_proj", "k_proj"])
    adapter = jpeft.init(jax.random.key(0), spec, params, layout=layout)
    noise = lambda leaf: leaf + 0.1 * np.random.default_rng(leaf.size).standard_normal(leaf.shape).astype(leaf.dtype)
    adapter = adapter.replace(trained=jax.tree.map(noise, adapter.trained))
    save_peft(tmp_path / "ours", adapter, params=params)
    loaded, _ = load(module, tmp_path / "ours")
    assert largest_difference(jpeft.merge(params, adapter), params_from_torch(loaded.merge_and_unload())) < 1e-5


def test_dense_layers_beside_experts_are_modules_in_peft_too(tmp_path):
    """PEFT takes `gate_proj` for the experts' of this family; layer 1 here has none, and is named as a parameter."""
    module = base(qwen3_moe)
    params = params_from_torch(module)
    spec = jpeft.LoRA(rank=2, targets=["mlp.gate_proj", "mlp.down_proj", "q_proj"], rank_pattern={"mlp.down_proj": 3})
    adapter = jpeft.init(jax.random.key(0), spec, params)
    noise = lambda leaf: leaf + 0.1 * np.random.default_rng(leaf.size).standard_normal(leaf.shape).astype(leaf.dtype)
    adapter = adapter.replace(trained=jax.tree.map(noise, adapter.trained))
    save_peft(tmp_path / "ours", adapter, params=params)
    loaded, warned = load(module, tmp_path / "ours")
    assert not [text for text in warned if "missing" in text.lower() or "unexpected" in text.lower()]
    assert largest_difference(jpeft.merge(params, adapter), params_from_torch(loaded.merge_and_unload())) < 1e-5
    back = load_peft(tmp_path / "ours", params)
    assert jax.tree.all(jax.tree.map(np.array_equal, back.trained, adapter.trained))


def test_experts_apart_here_and_stacked_in_torch(tmp_path):
    """gate and up as two leaves of (layers, experts, in, out): one parameter in torch, whose adapter holds both."""
    module = base(mixtral)
    state = {key: tensor.numpy() for key, tensor in module.state_dict().items() if "experts" in key}
    key = "model.layers.{l}.mlp.experts."
    places = {
        "gate": Place.of("l e d f", {key + "gate_up_proj": ("e (f + 24) d", "experts")}),
        "up": Place.of("l e d f", {key + "gate_up_proj": ("e (24 + f) d", "experts")}),
        "down": Place.of("l e f d", {key + "down_proj": ("e d f", "experts")}),
    }
    shapes = {"gate": (2, 3, 16, 24), "up": (2, 3, 16, 24), "down": (2, 3, 24, 16)}
    layout = Layout.of({name: np.empty(shape) for name, shape in shapes.items()}, places)
    params = layout.from_torch(state)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    theirs = adapted(module, r=2, target_modules=[], target_parameters=names)
    there_and_back(theirs, params, layout, tmp_path)


def test_experts_outside_the_layers(tmp_path):
    """(experts, layers, …): the layers that the file has are found on their own axis."""
    module = base(mixtral)
    state = {key: tensor.numpy() for key, tensor in module.state_dict().items() if "down_proj" in key}
    key = "model.layers.{l}.mlp.experts.down_proj"
    shape = {"down": np.empty((3, 2, 24, 16))}
    layout = Layout.of(shape, {"down": Place.of("e l f d", {key: ("e d f", "experts")})})
    params = layout.from_torch(state)
    theirs = adapted(module, r=2, target_modules=[], target_parameters=["1.mlp.experts.down_proj"])
    adapter = there_and_back(theirs, params, layout, tmp_path)
    assert adapter.sites[0].layers == (1,) and adapter.sites[0].kernel.experts == (0,)


def test_one_a_for_all_experts_is_repeated_in_the_file(tmp_path):
    module = base(mixtral)
    params = params_from_torch(module)
    spec = jpeft.LoRA(rank=2, alpha=3, targets=["experts.down_proj"], share_a=True)
    adapter = jpeft.init(jax.random.key(0), spec, params, layout=default_layout(flatten(params)))
    noise = lambda leaf: leaf + 0.1 * np.random.default_rng(leaf.size).standard_normal(leaf.shape).astype(leaf.dtype)
    adapter = adapter.replace(trained=jax.tree.map(noise, adapter.trained))
    assert adapter.trained["model/layers/0/mlp/experts/down_proj"]["a"].shape == (1, 24, 2)
    save_peft(tmp_path / "ours", adapter, params=params)
    loaded, _ = load(module, tmp_path / "ours")
    assert largest_difference(jpeft.merge(params, adapter), params_from_torch(loaded.merge_and_unload())) < 1e-5


def test_what_peft_has_not_for_parameters_is_refused(tmp_path):
    params = params_from_torch(base(mixtral))
    layout = default_layout(flatten(params))
    spec = jpeft.LoRA(rank=2, targets=["experts.down_proj"], dropout=0.1)
    with pytest.raises(jpeft.AdapterError, match="no dropout=0.1"):
        save_peft(tmp_path / "a", jpeft.init(jax.random.key(0), spec, params, layout=layout), params=params)
    dora = jpeft.init(jax.random.key(0), jpeft.DoRA(rank=2, targets=["experts.down_proj"]), params, layout=layout)
    with pytest.raises(jpeft.AdapterError, match="target_parameters are for LoRA alone"):
        save_peft(tmp_path / "a", dora, params=params)
    with pytest.raises(jpeft.AdapterError, match="the order|whose order"):
        stored_names(["experts.bank", "experts.down_proj"])
    assert not (tmp_path / "a").exists()


def test_a_parameter_without_its_factors_is_missed(tmp_path):
    module = base(mixtral)
    folder = save(adapted(module, r=2, target_modules=["q_proj"]), tmp_path / "a")
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"target_parameters": ["experts.down_proj"]}))
    with pytest.raises(jpeft.AdapterError, match="is in 'target_parameters'.*missing"):
        load_peft(folder, params_from_torch(module))
