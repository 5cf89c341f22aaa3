"""DoRA folders against the installed PEFT: effective weights, logits, tensors, warnings, both ways."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft_interop import load_peft, params_from_torch, save_peft
from jpeft_interop.layout import Layout, Place
from peft_round_trip import WEIGHTS, assert_both_ways, assert_logits, equal_files, largest_difference, logits_of
from peft_twins import FAMILIES, adapted, base, gpt2, llama, load, random_config, save


@pytest.mark.parametrize("number", range(12))
def test_configurations_of_peft_there_and_back(number, tmp_path):
    family, config = random_config(number)
    options = {"tie_word_embeddings": False} if family != "bert" else {}
    module = base(FAMILIES[family][0], seed=number, **options)
    peft_model = adapted(module, seed=number, **config, use_dora=True)
    adapter = assert_both_ways(module, peft_model, tmp_path, config["task_type"])
    assert isinstance(adapter.spec, jpeft.DoRA)


def test_what_was_made_here_runs_there(tmp_path, key):
    module = base(gpt2, tie_word_embeddings=False)
    params = params_from_torch(module)
    spec = jpeft.DoRA(rank=3, alpha=5, exclude=["lm_head"], rank_pattern={"0.mlp.c_fc": 2}, rank_stabilized=True)
    adapter = jpeft.init(key, spec, params)
    noisy = {
        path: {n: leaf * jnp.linspace(0.8, 1.3, leaf.size).reshape(leaf.shape) + 0.05 for n, leaf in leaves.items()}
        for path, leaves in adapter.trained.items()
    }
    adapter = adapter.replace(trained=noisy)
    save_peft(tmp_path / "a", adapter, params=params, task_type="CAUSAL_LM")
    loaded, warned = load(module, tmp_path / "a")
    assert not [text for text in warned if "fan_in_fan_out" in text or "missing" in text.lower()]
    tokens = np.random.default_rng(0).integers(0, 50, (2, 7))
    assert_logits(logits_of(module, params, adapter, tokens), loaded, module, tokens)
    assert largest_difference(jpeft.merge(params, adapter), params_from_torch(loaded.merge_and_unload())) <= 1e-5


def test_a_tied_embedding_is_adapted_where_it_is_looked_up(tmp_path):
    module = base(llama, tie_word_embeddings=True)
    peft_model = adapted(module, r=4, target_modules=["q_proj", "embed_tokens"], use_dora=True)
    adapter = assert_both_ways(module, peft_model, tmp_path, mergeable=False)
    assert {site.use for site in adapter.sites if "embed" in site.path} == {"lookup"}


def test_a_tied_head_is_refused(tmp_path, key):
    module = base(llama, tie_word_embeddings=True)
    params = params_from_torch(module)
    theirs = save(adapted(module, r=4, target_modules=["lm_head"], use_dora=True), tmp_path / "theirs")
    with pytest.raises(jpeft.AdapterError, match="tied output head"):
        load_peft(theirs, params)
    adapter = jpeft.init(key, jpeft.DoRA(rank=2, targets=["embed_tokens"]), params)
    with pytest.raises(jpeft.AdapterError, match="tied output head"):
        save_peft(tmp_path / "ours", adapter, params=params)
    assert not (tmp_path / "ours").exists()


def test_convolutions(tmp_path):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv1d(4, 8, 3), torch.nn.Conv3d(2, 5, 2))
    params = params_from_torch(module)
    peft_model = adapted(module, r=2, target_modules=["0", "1", "2"], use_dora=True)
    theirs = save(peft_model, tmp_path / "theirs")
    assert load_file(theirs / WEIGHTS)["base_model.model.0.lora_magnitude_vector"].shape == (1, 8, 1, 1)
    adapter = load_peft(theirs, params)
    assert largest_difference(jpeft.merge(params, adapter), params_from_torch(peft_model.merge_and_unload())) <= 1e-5
    save_peft(tmp_path / "ours", adapter, params=params)
    assert equal_files(theirs, tmp_path / "ours")


def test_the_order_of_magnitudes_and_the_flag_are_what_the_file_says(tmp_path):
    module = base(llama)
    params = params_from_torch(module)
    theirs = save(adapted(module, r=2, target_modules=["q_proj"], use_dora=True), tmp_path / "theirs")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    tensors = load_file(theirs / WEIGHTS)
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, theirs / WEIGHTS)
    with pytest.raises(jpeft.AdapterError, match=f"{key}' is missing"):
        load_peft(theirs, params)
    save_file(tensors | {key: tensors[key][None]}, theirs / WEIGHTS)
    with pytest.raises(jpeft.AdapterError, match="lora_magnitude_vector"):
        load_peft(theirs, params)
    config = theirs / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_dora": true', '"use_dora": false'))
    save_file(tensors, theirs / WEIGHTS)
    with pytest.raises(jpeft.AdapterError, match="lora_magnitude_vector"):
        load_peft(theirs, params)


def test_a_bias_of_b_is_refused_here_and_there(tmp_path):
    module = base(llama)
    with pytest.raises(ValueError, match="lora_bias=True is not supported for DoRA"):
        adapted(module, r=2, target_modules=["q_proj"], use_dora=True, lora_bias=True)
    theirs = save(adapted(module, r=2, target_modules=["q_proj"], use_dora=True), tmp_path / "theirs")
    config = theirs / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_bias": false', '"lora_bias": true'))
    with pytest.raises(jpeft.AdapterError, match="factor_bias"):
        load_peft(theirs, params_from_torch(module))


def test_stacked_layers_are_unstacked(tmp_path, key):
    stack = jpeft.Kernel((3, 6, 5), (1,), (2,), (0,))
    params = {"layers": {"q": {"kernel": np.random.default_rng(0).standard_normal(stack.shape, np.float32)}}}
    kernels = jpeft.Kernels((("layers/q/kernel", stack),))
    layout = Layout.of(params, {"layers/q/kernel": Place.of("l i o", {"model.layers.{l}.q.weight": "o i"})})
    spec = jpeft.DoRA(rank=2, targets=["q"], layers_to_transform=[0, 2])
    adapter = jpeft.init(key, spec, params, kernels=kernels)
    adapter = adapter.replace(
        trained={path: {n: x + 0.1 for n, x in one.items()} for path, one in adapter.trained.items()}
    )
    save_peft(tmp_path / "a", adapter, params=params, layout=layout)
    again = load_peft(tmp_path / "a", params, layout=layout)
    assert largest_difference(jpeft.merge(params, adapter), jpeft.merge(params, again)) == 0
    assert len(load_file(tmp_path / "a" / WEIGHTS)) == 6
