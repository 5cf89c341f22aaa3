"""IA³ folders against the installed PEFT: effective weights and biases, logits, tensors, warnings, both ways."""

import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import IA3Config
from safetensors.numpy import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

import jpeft
from jpeft_interop import load_peft, params_from_torch, save_peft
from jpeft_interop.layout import Layout, Place
from peft_round_trip import WEIGHTS, assert_both_ways, assert_logits, equal_files, largest_difference, logits_of
from peft_twins import FAMILIES, SIZES, adapted_by, base, bert, gpt2, llama, load, qwen2, save

LINEAR = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"),
    "qwen2": ("q_proj", "k_proj", "v_proj", "o_proj", "mlp.up_proj", "down_proj"),
    "gpt2": ("c_attn", "attn.c_proj", "mlp.c_proj", "c_fc"),
    "bert": ("query", "key", "value", "output.dense", "intermediate.dense"),
}


def random_ia3(number):
    draw = random.Random(number)
    family = list(FAMILIES)[number % len(FAMILIES)]
    names, (_, _, saved, task) = LINEAR[family], FAMILIES[family]
    maybe = lambda value, otherwise: value if draw.random() < 0.5 else otherwise
    listed = draw.sample(names, draw.randint(1, 4))
    both = "|".join(name.replace(".", r"\.") for name in names[:3])
    targets = draw.choice([listed, listed, "all-linear", rf".*\.1\..*({both})"])
    feedforward = draw.sample(listed, draw.randint(0, len(listed))) if targets is listed else rf".*{names[1]}"
    config = {
        "target_modules": targets,
        "feedforward_modules": feedforward,
        "init_ia3_weights": maybe(True, False),
        "task_type": maybe(task, None),
    }
    if targets is listed:
        config["exclude_modules"] = maybe([f"0.mlp.{listed[0]}", f"1.self_attn.{listed[0]}"], None)
        config["modules_to_save"] = maybe([draw.choice(saved)], None) if "lm_head" not in listed else None
    return family, config


@pytest.mark.parametrize("number", range(12))
def test_configurations_of_peft_there_and_back(number, tmp_path):
    family, config = random_ia3(number)
    options = {"tie_word_embeddings": False} if family != "bert" else {}
    module = base(FAMILIES[family][0], seed=number, **options)
    peft_model = adapted_by(module, IA3Config(**config), seed=number)
    # PEFT's own merge of an IA³ raises where a saved module has no weight of its own: there the logits speak alone.
    mergeable = "pooler" not in (config.get("modules_to_save") or ())
    adapter = assert_both_ways(module, peft_model, tmp_path, config["task_type"], mergeable=mergeable)
    assert isinstance(adapter.spec, jpeft.IA3)


@pytest.mark.parametrize("make", [llama, qwen2, gpt2, bert])
def test_the_defaults_of_known_architectures(make, tmp_path):
    module = base(make)
    adapter = assert_both_ways(module, adapted_by(module, IA3Config()), tmp_path)
    assert {tuple(leaves) for leaves in adapter.trained.values()} == {("l",), ("l_in",)}
    theirs, ours = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("theirs", "ours"))
    theirs, ours = ({k: sorted(v) if isinstance(v, list) else v for k, v in one.items()} for one in (theirs, ours))
    assert {k: v for k, v in theirs.items() if k != "auto_mapping"} == {
        k: v for k, v in ours.items() if k != "auto_mapping"
    }


def noisy(adapter):
    scaled = lambda leaf: leaf * jnp.linspace(0.5, 1.6, leaf.size).reshape(leaf.shape)
    return adapter.replace(trained=jax.tree.map(scaled, adapter.trained))


def test_what_was_made_here_runs_there(tmp_path, key):
    module = base(gpt2, tie_word_embeddings=False)
    params = params_from_torch(module)
    spec = jpeft.IA3(exclude=["lm_head", "0.attn.c_proj"], feedforward=["mlp/c_proj", "1.attn.c_proj"])
    adapter = noisy(jpeft.init(key, spec, params))
    save_peft(tmp_path / "a", adapter, params=params, task_type="CAUSAL_LM")
    loaded, warned = load(module, tmp_path / "a")
    assert not [text for text in warned if "fan_in_fan_out" in text or "missing" in text.lower()]
    tokens = np.random.default_rng(0).integers(0, 50, (2, 7))
    assert_logits(logits_of(module, params, adapter, tokens), loaded, module, tokens)
    assert largest_difference(jpeft.merge(params, adapter), params_from_torch(loaded.merge_and_unload())) <= 1e-5
    again = load_peft(tmp_path / "a", params)
    assert largest_difference(again.trained, adapter.trained) == 0


def test_layer_numbers_are_spelt_out(tmp_path, key):
    module = base(llama)
    params = params_from_torch(module)
    spec = jpeft.IA3(targets=["q_proj", "down_proj"], feedforward=["down_proj"], layers_to_transform=[1])
    adapter = noisy(jpeft.init(key, spec, params))
    save_peft(tmp_path / "a", adapter, params=params)
    loaded, _ = load(module, tmp_path / "a")
    assert largest_difference(jpeft.merge(params, adapter), params_from_torch(loaded.merge_and_unload())) <= 1e-5
    assert largest_difference(load_peft(tmp_path / "a", params).trained, adapter.trained) == 0


def test_peft_matches_the_letters_of_a_feedforward_name(tmp_path):
    module = base(llama)
    config = IA3Config(target_modules=r".*(k_proj|o_proj|down_proj)", feedforward_modules=["o_proj", "n_proj"])
    adapter = assert_both_ways(module, adapted_by(module, config), tmp_path)
    assert list(adapter.trained["model/layers/0/mlp/down_proj/kernel"]) == ["l_in"]
    assert list(adapter.trained["model/layers/0/self_attn/k_proj/kernel"]) == ["l"]


def test_names_that_end_alike_are_told_apart(tmp_path, key):
    torch.manual_seed(0)
    module = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(12)])
    params = params_from_torch(module)
    adapter = noisy(jpeft.init(key, jpeft.IA3(targets=["0", "1", "10"], feedforward=["0"]), params))
    save_peft(tmp_path / "a", adapter, params=params)
    loaded, _ = load(module, tmp_path / "a")
    assert largest_difference(jpeft.merge(params, adapter), params_from_torch(loaded.merge_and_unload())) <= 1e-5
    assert largest_difference(load_peft(tmp_path / "a", params).trained, adapter.trained) == 0


@pytest.mark.parametrize("feedforward", [[], ["lm_head"]])
def test_a_tied_head(feedforward, tmp_path):
    module = base(llama, tie_word_embeddings=True)
    config = IA3Config(target_modules=["k_proj", "lm_head"], feedforward_modules=feedforward)
    adapter = assert_both_ways(module, adapted_by(module, config), tmp_path, mergeable=False)
    assert [site.use for site in adapter.sites if "embed" in site.path] == ["product"]


def test_a_tied_head_with_a_bias_is_refused(tmp_path):
    module = base(lambda: BertForMaskedLM(BertConfig(**SIZES, max_position_embeddings=32)))
    config = IA3Config(target_modules=["key", "decoder"], feedforward_modules=[])
    theirs = save(adapted_by(module, config), tmp_path / "theirs")
    with pytest.raises(jpeft.AdapterError, match="bias"):
        load_peft(theirs, params_from_torch(module))


def test_convolutions_with_biases(tmp_path):
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 5, 2), torch.nn.Conv3d(4, 8, 3), torch.nn.Conv2d(8, 6, 3, groups=2)
    )
    params = params_from_torch(module)
    config = IA3Config(target_modules=["0", "1", "2", "3"], feedforward_modules=["1", "2"])
    peft_model = adapted_by(module, config)
    theirs = save(peft_model, tmp_path / "theirs")
    adapter = load_peft(theirs, params)
    merged = params_from_torch(peft_model.merge_and_unload())
    assert largest_difference(params, merged) > 1e-2
    assert largest_difference(jpeft.merge(params, adapter), merged) <= 1e-5
    save_peft(tmp_path / "ours", adapter, params=params)
    assert equal_files(theirs, tmp_path / "ours")
    assert load_file(theirs / WEIGHTS)["base_model.model.1.ia3_l"].shape == (1, 8, 1, 1)


def test_stacked_layers_are_unstacked(tmp_path, key):
    stack = jpeft.Kernel((3, 6, 5), (1,), (2,), (0,))
    values = np.random.default_rng(0).standard_normal(stack.shape, np.float32)
    params = {"layers": {"q": {"kernel": values}, "o": {"kernel": values}}}
    kernels = jpeft.Kernels((("layers/q/kernel", stack), ("layers/o/kernel", stack)))
    places = {f"layers/{n}/kernel": Place.of("l i o", {f"model.layers.{{l}}.{n}.weight": "o i"}) for n in "qo"}
    layout = Layout.of(params, places)
    spec = jpeft.IA3(targets=["q", "o"], feedforward=["o"], layers_to_transform=[0, 2])
    adapter = noisy(jpeft.init(key, spec, params, kernels=kernels))
    save_peft(tmp_path / "a", adapter, params=params, layout=layout)
    again = load_peft(tmp_path / "a", params, layout=layout)
    assert largest_difference(jpeft.merge(params, adapter), jpeft.merge(params, again)) == 0
    assert len(load_file(tmp_path / "a" / WEIGHTS)) == 4


def test_what_peft_has_no_place_for_is_refused(tmp_path, key):
    params = params_from_torch(base(llama, attention_bias=True))
    refused = lambda spec, word: _refused(jpeft.init(key, spec, params), params, tmp_path, word)
    refused(jpeft.IA3(targets=["embed_tokens"]), "embeddings")
    refused(jpeft.IA3(targets=["q_proj"], bias="lora_only"), "modules_to_save")
    conv = params_from_torch(torch.nn.Sequential(torch.nn.Conv1d(4, 8, 3)))
    kernels = jpeft.Kernels((("0/kernel", jpeft.Kernel((3, 4, 8), (0, 1), (2,), kind="conv")),))
    _refused(jpeft.init(key, jpeft.IA3(targets=["0"]), conv, kernels=kernels), conv, tmp_path, "one axis")


def _refused(adapter, params, tmp_path, word):
    with pytest.raises(jpeft.AdapterError, match=word):
        save_peft(tmp_path / "refused", adapter, params=params)
    assert not (tmp_path / "refused").exists()


def test_broken_files(tmp_path):
    module = base(llama)
    params = params_from_torch(module)
    theirs = save(adapted_by(module, IA3Config()), tmp_path / "theirs")
    tensors, config = load_file(theirs / WEIGHTS), json.loads((theirs / "adapter_config.json").read_text())
    name = "base_model.model.model.layers.0.mlp.down_proj.ia3_l"
    for broken, word in (
        ({k: v for k, v in tensors.items() if k != name}, "missing"),
        (tensors | {name: tensors[name].T.copy()}, r"\(1, 48\)"),
        (tensors | {name.replace("ia3_l", "ia3_k"): tensors[name]}, "ia3_k"),
    ):
        save_file(broken, theirs / WEIGHTS)
        with pytest.raises(jpeft.AdapterError, match=word):
            load_peft(theirs, params)
    save_file(tensors, theirs / WEIGHTS)
    for fields, word in (
        ({"feedforward_modules": None}, "feedforward_modules"),
        ({"feedforward_modules": ["k_proj"]}, "expected shape"),
        ({"r": 8}, "unknown field 'r'"),
    ):
        (theirs / "adapter_config.json").write_text(json.dumps(config | fields))
        with pytest.raises(jpeft.AdapterError, match=word):
            load_peft(theirs, params)
