"""AdaLoRA folders against the installed PEFT: its own trained and pruned checkpoints, ours, rank 0 in either."""

import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft_interop import load_peft, params_from_torch, save_peft
from jpeft_interop.layout import Layout, Place
from peft_round_trip import WEIGHTS, assert_both_ways, assert_logits, equal_files, largest_difference, logits_of
from peft_twins import FAMILIES, adapted_by, base, bert, gpt2, llama, load, save

LINEAR = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"),
    "qwen2": ("q_proj", "k_proj", "v_proj", "o_proj", "mlp.up_proj", "down_proj"),
    "gpt2": ("c_attn", "attn.c_proj", "mlp.c_proj", "c_fc"),
    "bert": ("query", "key", "value", "dense"),
}
EVERYTHING = list(LINEAR["llama"][:-1])


def random_adalora(number):
    draw = random.Random(number)
    family = list(FAMILIES)[number % len(FAMILIES)]
    names, (_, _, saved, task) = LINEAR[family], FAMILIES[family]
    maybe = lambda value, otherwise: value if draw.random() < 0.5 else otherwise
    targets = draw.choice([draw.sample(names, draw.randint(1, 3)), "all-linear", rf".*\.1\..*({names[0]}|{names[1]})"])
    config = {
        "init_r": draw.randint(1, 6),
        "target_r": 1,
        "lora_alpha": draw.choice([1, 3, 16.5]),
        "total_step": draw.randint(10, 20),
        "tinit": draw.randint(0, 4),
        "tfinal": draw.randint(0, 4),
        "deltaT": draw.randint(1, 3),
        "beta1": draw.choice([0.5, 0.85]),
        "orth_reg_weight": draw.choice([0, 0.1]),
        "lora_dropout": draw.choice([0.0, 0.25]),
        "target_modules": targets,
        "bias": draw.choice(["none", "all", "lora_only"]),
        "task_type": maybe(task, None),
        "init_lora_weights": draw.choice([True, False]),
    }
    if isinstance(targets, list):
        config["layers_to_transform"] = maybe([1], None) if "lm_head" not in targets else None
        config["modules_to_save"] = maybe([draw.choice(saved)], None) if "lm_head" not in targets else None
    return family, config


@pytest.mark.parametrize("number", range(12))
def test_configurations_of_peft_there_and_back(number, tmp_path):
    family, config = random_adalora(number)
    options = {"tie_word_embeddings": False} if family != "bert" else {}
    module = base(FAMILIES[family][0], seed=number, **options)
    peft_model = adapted_by(module, AdaLoraConfig(**config), seed=number)
    adapter = assert_both_ways(module, peft_model, tmp_path, config["task_type"])
    theirs, ours = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("theirs", "ours"))
    for field in ("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"):
        assert theirs[field] == ours[field]
    assert adapter.spec.rank == config["init_r"] and ours["rank_pattern"] is None


def trained(module, seed, steps=10, **config):
    """A PEFT model after its own training, with its own budget."""
    config = {"init_r": 4, "lora_alpha": 7, "tinit": 1, "tfinal": 3, "deltaT": 2, "total_step": steps} | config
    peft_model = adapted_by(module, AdaLoraConfig(**config, task_type="CAUSAL_LM"), seed).train()
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2)
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        tokens = torch.randint(0, 50, (4, 9), generator=generator)
        peft_model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        peft_model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return peft_model.eval()


@pytest.mark.parametrize("target", [0, 1, 3])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_what_peft_pruned_to_rank_0_in_whole_layers(make, target, tmp_path):
    """What the reporter of peft #1539 did, who could not load what was saved."""
    module = base(make, tie_word_embeddings=False)
    names = EVERYTHING if make is llama else ["c_attn", "mlp.c_proj", "c_fc"]
    peft_model = trained(module, 1, target_r=target, target_modules=names)
    kept = peft_model.peft_config["default"].rank_pattern
    ranks = {name.removesuffix(".lora_E.default"): sum(one) for name, one in kept.items()}
    assert sum(ranks.values()) == target * len(ranks)
    assert target == 3 or min(ranks.values()) == 0
    if target == 0:  # nothing is left: PEFT's model is the base again, and its file holds tensors without entries
        adapter = _assert_nothing_left(module, peft_model, tmp_path)
    else:
        adapter = assert_both_ways(module, peft_model, tmp_path)
    found = {site.path.removesuffix("/kernel").replace("/", "."): site.rank for site in adapter.sites}
    assert found == ranks
    tensors = load_file(tmp_path / "ours" / WEIGHTS)
    for name, rank in ranks.items():
        assert tensors[f"base_model.model.{name}.lora_E"].shape == (rank, 1)
    pattern = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["rank_pattern"]
    assert {name.removesuffix(".lora_E"): sum(one) for name, one in pattern.items()} == ranks


def _assert_nothing_left(module, peft_model, tmp_path):
    params, theirs = params_from_torch(module), save(peft_model, tmp_path / "theirs")
    adapter = load_peft(theirs, params)
    assert largest_difference(jpeft.merge(params, adapter), params) == 0
    save_peft(tmp_path / "ours", adapter, params=params)
    assert equal_files(theirs, tmp_path / "ours")
    loaded, _ = load(module, tmp_path / "ours")
    assert largest_difference(params_from_torch(loaded.merge_and_unload()), params) == 0
    return adapter


def pruned(key, params, **options):
    """An adapter with random factors, of which some directions are zero, in one module all.

    Its changes are as large as the base's weights: much larger ones, and fp32 itself differs from float64 by 1e-5.
    """
    spec = jpeft.AdaLoRA(rank=5, target_rank=2, alpha=7, total_steps=10, **options)
    adapter = jpeft.init(key, spec, params)
    new = {}
    for number, (path, leaves) in enumerate(adapter.trained.items()):
        e = np.random.default_rng(number).standard_normal(leaves["e"].shape).astype(np.float32)
        e[..., np.arange(5) % 3 == number % 3] = 0
        new[path] = {"a": leaves["a"] * 8, "b": leaves["b"] * 8, "e": jnp.asarray(e * (number != 1))}
    return adapter.replace(trained=new)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("prune", [True, False])
def test_what_was_pruned_here_runs_there(make, prune, tmp_path, key):
    module = base(make, tie_word_embeddings=False)
    params = params_from_torch(module)
    adapter = pruned(key, params, exclude=["lm_head"])
    exported = jpeft.prune(adapter) if prune else adapter
    assert min(site.rank for site in exported.sites) == (0 if prune else 5)
    save_peft(tmp_path / "a", exported, params=params, task_type="CAUSAL_LM")
    loaded, warned = load(module, tmp_path / "a")
    assert not [text for text in warned if "missing" in text.lower() or "fan_in_fan_out" in text]
    tokens = np.random.default_rng(0).integers(0, 50, (2, 7))
    assert_logits(logits_of(module, params, exported, tokens), loaded, module, tokens)
    assert largest_difference(jpeft.merge(params, adapter), params_from_torch(loaded.merge_and_unload())) <= 1e-5
    again = load_peft(tmp_path / "a", params)
    assert [site.rank for site in again.sites] == [site.rank for site in exported.sites]
    assert largest_difference(again.trained, exported.trained) == 0
    save_peft(tmp_path / "b", again, params=params, task_type="CAUSAL_LM")
    assert equal_files(tmp_path / "a", tmp_path / "b")


def test_the_scaling_is_by_the_rank_at_the_start(tmp_path, key):
    module = base(llama)
    params = params_from_torch(module)
    save_peft(tmp_path / "a", jpeft.prune(pruned(key, params, targets=["q_proj"])), params=params)
    loaded, _ = load(module, tmp_path / "a")
    layer = loaded.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.r["default"] < 5 and float(layer.ranknum["default"]) == 5
    adapter = load_peft(tmp_path / "a", params)
    np.testing.assert_allclose(adapter.constant["model/layers/0/self_attn/q_proj/kernel"]["scaling"], 7 / 5.00001)


def test_a_tied_head(tmp_path):
    module = base(llama, tie_word_embeddings=True)
    config = AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["q_proj", "lm_head"])
    adapter = assert_both_ways(module, adapted_by(module, config), tmp_path, mergeable=False)
    assert [site.use for site in adapter.sites if "embed" in site.path] == ["product"]


@pytest.mark.parametrize("make", [LoraConfig, lambda **more: AdaLoraConfig(init_r=3, target_r=1, total_step=9, **more)])
def test_a_saved_module_of_layers_with_its_biases(make, tmp_path):
    # PEFT writes these biases under three names, one of them with the adapter's name in it.
    module, config = base(bert), make(target_modules=["query"], bias="all", modules_to_save=["pooler", "classifier"])
    assert_both_ways(module, adapted_by(module, config), tmp_path)
    names = [name for name in load_file(tmp_path / "ours" / WEIGHTS) if "pooler" in name and "bias" in name]
    assert len(names) == 3 and any("default" in name for name in names)


def test_convolutions(tmp_path):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, (3, 2)), torch.nn.Linear(3, 3))
    params = params_from_torch(module)
    peft_model = adapted_by(module, AdaLoraConfig(init_r=2, target_r=1, total_step=9, target_modules=["0", "1"]))
    theirs = save(peft_model, tmp_path / "theirs")
    adapter, merged = load_peft(theirs, params), params_from_torch(peft_model.merge_and_unload())
    assert largest_difference(params, merged) > 1e-3
    assert largest_difference(jpeft.merge(params, adapter), merged) <= 1e-5
    save_peft(tmp_path / "ours", adapter, params=params)
    assert equal_files(theirs, tmp_path / "ours")


def test_layers_of_different_ranks_are_stacked(tmp_path, key):
    stack = jpeft.Kernel((3, 6, 4), (1,), (2,), (0,))
    values = np.random.default_rng(0).standard_normal(stack.shape, np.float32)
    flat = {"layers": {str(i): {"q": {"kernel": jnp.asarray(values[i])}} for i in range(3)}}
    adapter = jpeft.prune(pruned(key, flat))
    assert len({site.rank for site in adapter.sites}) > 1
    save_peft(tmp_path / "a", adapter, params=flat)
    stacked = {"layers": {"q": {"kernel": values}}}
    layout = Layout.of(stacked, {"layers/q/kernel": Place.of("l i o", {"layers.{l}.q.weight": "o i"})})
    again = load_peft(tmp_path / "a", stacked, layout=layout)
    expected, found = jpeft.merge(flat, adapter), jpeft.merge(stacked, again)["layers"]["q"]["kernel"]
    for i in range(3):
        np.testing.assert_allclose(found[i], expected["layers"][str(i)]["q"]["kernel"], atol=1e-6)
    save_peft(tmp_path / "b", again, params=stacked, layout=layout)
    back = load_peft(tmp_path / "b", flat)
    assert largest_difference(jpeft.merge(flat, back), expected) <= 1e-6


def test_what_peft_has_no_place_for_is_refused(tmp_path, key):
    params = params_from_torch(base(llama))
    adapter = pruned(key, params, targets=["q_proj"])

    def refused(adapter, word):
        with pytest.raises(jpeft.AdapterError, match=word):
            save_peft(tmp_path / "refused", adapter, params=params)
        assert not (tmp_path / "refused").exists()

    refused(pruned(key, params, targets=["embed_tokens"]), "embeddings")
    refused(jpeft.init(key, jpeft.AdaLoRA(targets=["q_proj"]), params), "total_steps")
    doubled = adapter.replace(constant=jax.tree.map(lambda leaf: 2 * leaf, adapter.constant))
    refused(doubled, "one scaling")


def test_broken_files(tmp_path, key):
    params = params_from_torch(base(llama))
    folder, name = tmp_path / "a", "base_model.model.model.layers.0.self_attn.q_proj.lora_E"
    save_peft(folder, jpeft.prune(pruned(key, params, targets=["q_proj"])), params=params)
    tensors, config = load_file(folder / WEIGHTS), json.loads((folder / "adapter_config.json").read_text())
    for broken, word in (
        ({k: v for k, v in tensors.items() if k != name}, "missing"),
        (tensors | {name: tensors[name][:-1]}, "expected shape"),
        (tensors | {name + ".weight": tensors[name]}, "lora_E.weight"),
    ):
        save_file(broken, folder / WEIGHTS)
        with pytest.raises(jpeft.AdapterError, match=word):
            load_peft(folder, params)
    save_file(tensors, folder / WEIGHTS)
    pattern = config["rank_pattern"]
    for fields, word in (
        ({"rank_pattern": {one: kept[:-1] for one, kept in pattern.items()}}, "init_r"),
        ({"rank_pattern": {one: [True] * 5 for one in pattern}}, "expected shape"),
        ({"rank_pattern": {"q_proj": [True] * 5}}, "lora_E"),
        ({"rank_pattern": {"q_proj": 3}}, "lists of true and false"),
        ({"total_step": None}, "total_step"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"tinit": 20}, "initial_steps"),
        ({"use_dora": True}, "use_dora"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(config | fields))
        with pytest.raises(jpeft.AdapterError, match=word):
            load_peft(folder, params)
