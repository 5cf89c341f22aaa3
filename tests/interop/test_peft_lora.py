"""LoRA folders against the installed PEFT: effective weights, tensors, warnings, both ways."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import jpeft
from jpeft.tree import flatten
from jpeft_interop import load_peft, params_from_torch, save_peft
from peft_twins import FAMILIES, adapted, base, gpt2, llama, load, loaded_here, logits, random_config, save

WEIGHTS = "adapter_model.safetensors"


def largest_difference(one, other):
    one, other = flatten(one), flatten(other)
    assert one.keys() == other.keys()
    return max(float(np.abs(np.asarray(one[path]) - np.asarray(other[path])).max()) for path in one)


def equal_files(one, other):
    one, other = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert one.keys() == other.keys()
    return all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("number", range(40))
def test_forty_configurations_of_peft_load_with_its_weights_and_return_to_it(number, tmp_path):
    family, config = random_config(number)
    options = {"tie_word_embeddings": False} if family != "bert" else {}
    module = base(FAMILIES[family][0], seed=number, **options)
    params = params_from_torch(module)
    peft_model = adapted(module, seed=number, **config)
    theirs, ours = save(peft_model, tmp_path / "theirs"), tmp_path / "ours"

    tokens = np.random.default_rng(number).integers(0, 50, (2, 7))
    live = logits(peft_model, tokens)
    before, warnings_before = load(module, theirs)
    adapter = loaded_here(theirs, params, warnings_before)
    merged = params_from_torch(peft_model.merge_and_unload())
    assert largest_difference(params, merged) > 1e-3
    assert largest_difference(jpeft.merge(params, adapter), merged) <= 1e-5

    save_peft(ours, adapter, params=params, task_type=config["task_type"])
    assert equal_files(theirs, ours)
    after, warnings_after = load(module, ours, seed=5)
    state = after.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in before.state_dict().items())
    assert torch.equal(logits(after, tokens), logits(before, tokens))
    assert (logits(after, tokens) - live).abs().max() <= 1e-5
    assert set(warnings_after) <= set(warnings_before)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_on_one_side_of_a_tied_weight_acts_there_alone(target, tmp_path):
    from jpeft_interop.models import build, pure

    module = base(llama, tie_word_embeddings=True)
    params = params_from_torch(module)
    peft_model = adapted(module, r=4, target_modules=["q_proj", target])
    adapter = load_peft(save(peft_model, tmp_path / "theirs"), params)
    forward, _ = pure(build(module.config.to_dict(), architecture="LlamaForCausalLM"))
    tokens = np.random.default_rng(0).integers(0, 50, (2, 7))
    with torch.no_grad():
        expected = peft_model(torch.tensor(tokens)).logits.numpy()
        plain = module(torch.tensor(tokens)).logits.numpy()
    found = jpeft.lift(forward)(jpeft.attach(params, adapter), tokens).logits
    assert np.abs(expected - plain).max() > 1e-2
    np.testing.assert_allclose(found, expected, atol=1e-4)
    with pytest.raises(jpeft.MergeError, match="lift"):
        jpeft.apply(params, adapter)
    save_peft(tmp_path / "ours", adapter, params=params)
    assert equal_files(tmp_path / "theirs", tmp_path / "ours")


def test_an_adapter_on_all_uses_of_a_tied_weight_returns_as_one(tmp_path, key):
    module = base(llama, tie_word_embeddings=True)
    params = params_from_torch(module)
    adapter = jpeft.init(key, jpeft.LoRA(rank=3, targets=["embed_tokens"]), params)
    noisy = {path: {n: leaf + 0.1 for n, leaf in leaves.items()} for path, leaves in adapter.trained.items()}
    save_peft(tmp_path / "a", adapter.replace(trained=noisy), params=params)
    again = load_peft(tmp_path / "a", params)
    assert [site.use for site in again.sites] == [None]
    assert largest_difference(jpeft.merge(params, adapter.replace(trained=noisy)), jpeft.merge(params, again)) == 0


def test_peft_reads_what_was_initialised_here(tmp_path, key):
    module = base(gpt2, tie_word_embeddings=False)
    params = params_from_torch(module)
    adapter = jpeft.init(key, jpeft.LoRA(rank=3, alpha=5, exclude=["lm_head"]), params)
    noisy = {path: {n: leaf + 0.05 for n, leaf in leaves.items()} for path, leaves in adapter.trained.items()}
    adapter = adapter.replace(trained=noisy)
    save_peft(tmp_path / "a", adapter, params=params, base_model="gpt2", task_type="CAUSAL_LM")
    loaded, warned = load(module, tmp_path / "a")
    assert not [text for text in warned if "fan_in_fan_out" in text or "missing" in text.lower()]
    assert largest_difference(jpeft.merge(params, adapter), params_from_torch(loaded.merge_and_unload())) <= 1e-5
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == ("gpt2", "CAUSAL_LM")


def test_kernels_of_rank_zero_leave_the_targets(tmp_path, key):
    module = base(llama)
    params = params_from_torch(module)
    spec = jpeft.LoRA(rank=2, targets=["q_proj", "v_proj"], rank_pattern={"0.self_attn.q_proj": 0})
    adapter = jpeft.init(key, spec, params)
    save_peft(tmp_path / "a", adapter, params=params)
    loaded, warned = load(module, tmp_path / "a")
    assert not [text for text in warned if "missing" in text.lower()]
    names = {name for name, _ in loaded.named_parameters() if "lora_A" in name}
    assert len(names) == 3 and not any("0.self_attn.q_proj" in name for name in names)


def test_folders_of_a_convolution(tmp_path):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv1d(4, 8, 3), torch.nn.Linear(3, 3))
    params = params_from_torch(module)
    peft_model = adapted(module, r=2, target_modules=["0", "1"], lora_bias=True)
    adapter = load_peft(save(peft_model, tmp_path / "theirs"), params)
    merged = params_from_torch(peft_model.merge_and_unload())
    assert largest_difference(jpeft.merge(params, adapter), merged) <= 1e-5
    save_peft(tmp_path / "ours", adapter, params=params)
    assert equal_files(tmp_path / "theirs", tmp_path / "ours")


def test_native_file_keeps_everything(tmp_path):
    module = base(llama, attention_bias=True)
    params = params_from_torch(module)
    config = {"r": 4, "target_modules": ["q_proj", "embed_tokens"], "bias": "all", "modules_to_save": ["norm"]}
    adapter = load_peft(save(adapted(module, **config), tmp_path / "theirs"), params)
    jpeft.save(tmp_path / "one.safetensors", adapter)
    again = jpeft.load(tmp_path / "one.safetensors")
    assert again.meta == adapter.meta
    assert largest_difference(again.trained, adapter.trained) == 0
    assert largest_difference(again.constant, adapter.constant) == 0
