"""What `save_peft` writes means the same to PEFT and to `load_peft`, or it is refused before anything is there.

The judge is what PEFT computes: logits of its live model, and of the folder loaded again under another seed.
"""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForTokenClassification,
    BloomConfig,
    BloomForCausalLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import jpeft
from jpeft_interop import infer_layout, load_peft, params_from_torch, params_to_torch, save_peft
from jpeft_interop.save_peft import peft_files
from peft_twins import IDS, SIZES, adapted, base, bert, gpt2, llama, load, logits, save

TOKENS = np.random.default_rng(0).integers(0, 50, (2, 7))


def distilbert(**options):
    sizes = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 50, "max_position_embeddings": 32}
    return DistilBertForSequenceClassification(DistilBertConfig(**sizes, **options))


def mixtral(**options):
    return MixtralForCausalLM(MixtralConfig(**SIZES, **IDS, num_key_value_heads=2, num_local_experts=4, **options))


def noisy(adapter, seed=0):
    draw = np.random.default_rng(seed)
    return adapter.replace(
        trained={
            path: {name: leaf + 0.1 * draw.standard_normal(leaf.shape).astype(leaf.dtype) for name, leaf in own.items()}
            for path, own in adapter.trained.items()
        }
    )


def made(key, module, spec):
    params = params_from_torch(module)
    return params, noisy(jpeft.init(key, spec, params))


def assert_reads_as_saved(module, params, adapter, folder, expected, **options):
    """PEFT's logits are those expected, it warns of nothing missing, and our loader gives the same arrays."""
    save_peft(folder, adapter, params=params, **options)
    loaded, warned = load(module, folder)
    assert not [text for text in warned if "missing" in text.lower() or "unexpected" in text.lower()], warned
    assert (logits(loaded, TOKENS) - expected).abs().max() <= 1e-5
    again = load_peft(folder, params)
    assert again.trained.keys() == adapter.trained.keys()
    for path, leaves in adapter.trained.items():
        for name, leaf in leaves.items():
            np.testing.assert_array_equal(np.asarray(again.trained[path][name]), np.asarray(leaf))


def merged(module, params, adapter):
    """The logits of the torch module with the merged weights."""
    other = copy.deepcopy(module)
    other.load_state_dict(params_to_torch(jpeft.merge(params, adapter), module))
    return logits(other.eval(), TOKENS)


def replaced(module, values):
    """The logits of a copy whose parameters of these names have other values; tied ones change together."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        for name, value in values.items():
            dict(other.named_parameters(remove_duplicate=False))[name].copy_(torch.tensor(np.asarray(value)))
    return logits(other.eval(), TOKENS)


def test_a_file_that_misstates_the_scaling_is_not_written(key, tmp_path, monkeypatch):
    module = base(llama)
    params, adapter = made(key, module, jpeft.LoRA(rank=4, alpha=3, targets=["q_proj"], rank_stabilized=True))
    from jpeft_interop import save_peft as module_of_save

    write = module_of_save.__globals__["write_config"]
    monkeypatch.setitem(module_of_save.__globals__, "write_config", lambda c: write(c) | {"use_rslora": False})
    with pytest.raises(jpeft.AdapterError, match=r"q_proj'.* scaled by 0\.75 and is scaled by 1\.5"):
        save_peft(tmp_path / "a", adapter, params=params)
    assert not (tmp_path / "a").exists()


def test_leaves_that_would_change_are_not_written(key, monkeypatch):
    module = base(llama)
    params, adapter = made(key, module, jpeft.LoRA(rank=4, targets=["q_proj"], modules_to_save=["lm_head"]))
    from jpeft_interop import save_peft as module_of_save

    factors = module_of_save.__globals__["_factors"]
    halved = lambda *args: ((name, tensor / 2) for name, tensor in factors(*args))
    monkeypatch.setitem(module_of_save.__globals__, "_factors", halved)
    with pytest.raises(jpeft.AdapterError, match="'a' of .*q_proj' would not be the same"):
        peft_files(adapter, params=params)


PATTERNS = [
    {"layers.1.mlp.down_proj": 32, "down_proj": 8},
    {"down_proj": 8, "layers.1.mlp.down_proj": 32},
    {"zz|layers.0.mlp.down_proj": 2, ".*down_proj": 9, "up_proj": 4},
]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("field", ["alpha_pattern", "rank_pattern"])
def test_overlapping_patterns_mean_what_they_mean_in_pefts_live_model(pattern, field, tmp_path):
    module = base(llama)
    targets = {"target_modules": ["down_proj", "up_proj"], "r": 4, "lora_alpha": 5}
    live = adapted(module, **targets, **{field: pattern})
    params = params_from_torch(module)
    spec = jpeft.LoRA(rank=4, alpha=5, targets=["down_proj", "up_proj"], **{field: pattern})
    adapter = jpeft.init(jax_key(), spec, params)
    state = live.state_dict()
    leaf = lambda path, name: state[f"base_model.model.{path.replace('/', '.')}.lora_{name}.default.weight"].T.numpy()
    paths = {path: path.removesuffix("/kernel") for path in adapter.trained}
    adapter = adapter.replace(trained={p: {"a": leaf(m, "A"), "b": leaf(m, "B")} for p, m in paths.items()})
    expected = logits(live, TOKENS)
    assert (expected - logits(module, TOKENS)).abs().max() > 1e-3
    assert_reads_as_saved(module, params, adapter, tmp_path, expected)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len([name for name in config[field] if "down_proj" in name]) == 2 or "down_proj" not in config[field]


def jax_key():
    import jax

    return jax.random.key(0)


def test_patterns_that_match_nothing_that_is_written_are_left_out(key, tmp_path):
    module = base(llama)
    spec = jpeft.LoRA(rank=2, targets=["q_proj", "v_proj"], rank_pattern={"v_proj": 0}, alpha_pattern={"v_proj": 3})
    params, adapter = made(key, module, spec)
    save_peft(tmp_path, adapter, params=params)
    _, warned = load(module, tmp_path)
    assert not [text for text in warned if "did not match" in text]


@pytest.mark.parametrize(
    ("make", "saved", "path"),
    [
        (llama, ["norm"], "model/norm/scale"),
        (distilbert, ["classifier"], "classifier/kernel"),
        (llama, ["model/layers/0/mlp"], "model/layers/0/mlp/up_proj/kernel"),
        (llama, ["layers"], "model/layers/1/mlp/up_proj/kernel"),
        (bert, ["LayerNorm"], "bert/embeddings/LayerNorm/scale"),
        (mixtral, ["gate_up_proj"], "model/layers/0/mlp/experts/gate_up_proj"),
    ],
)
def test_modules_trained_whole_are_just_those_in_peft(make, saved, path, key, tmp_path):
    module = base(make)
    spec = jpeft.LoRA(rank=2, targets=["lm_head"] if saved == ["layers"] else ATTENTION[make], modules_to_save=saved)
    params, adapter = made(key, module, spec)
    assert {p.replace("weight", "scale") for p in adapter.trained} & {path, path.replace("scale", "weight")}
    assert_reads_as_saved(module, params, adapter, tmp_path, merged(module, params, adapter))


ATTENTION = {llama: ["q_proj"], distilbert: ["q_lin"], bert: ["query"], mixtral: ["q_proj"]}


@pytest.mark.parametrize("method", [jpeft.LoRA, jpeft.IA3])
@pytest.mark.parametrize(
    ("make", "embedding"), [(llama, "model.embed_tokens.weight"), (gpt2, "transformer.wte.weight")]
)
def test_a_tied_embedding_trained_whole_stays_tied(make, embedding, method, key, tmp_path):
    module = base(make, tie_word_embeddings=True)
    options = {"rank": 2} if method is jpeft.LoRA else {"feedforward": []}
    spec = method(**options, targets=ATTENTION.get(make, ["c_attn"]), modules_to_save=[embedding.rpartition(".")[0]])
    params, adapter = made(key, module, spec)
    path = next(site.path for site in adapter.sites if site.method == "replacement")
    others = adapter.replace(trained={p: v for p, v in adapter.trained.items() if p != path})
    others = others.replace(
        meta=dataclasses.replace(others.meta, sites=tuple(s for s in others.sites if s.path != path))
    )
    state = params_to_torch(jpeft.merge(params, others), module)
    moved = copy.deepcopy(module)
    moved.load_state_dict(state)
    expected = replaced(moved, {embedding: adapter.trained[path]["value"]})
    assert_reads_as_saved(module, params, adapter, tmp_path, expected)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert {f"base_model.model.{embedding}", "base_model.model.lm_head.weight"} <= names


def test_pefts_own_tied_and_saved_embedding_loads(tmp_path):
    module = base(llama, tie_word_embeddings=True)
    config = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True, "r": 2}
    live = adapted(module, **config)
    params = params_from_torch(module)
    adapter = load_peft(save(live, tmp_path / "theirs"), params)
    assert_reads_as_saved(module, params, adapter, tmp_path / "ours", logits(live, TOKENS))


class Block(nn.Module):
    """Linears called by numbers, activations among them."""

    def __init__(self):
        super().__init__()
        self.to_out = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.0))
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x):
        return x + self.mlp(self.to_out(x))


class Numbered(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.shortcut = nn.ModuleList([nn.Linear(8, 8), nn.Identity()])

    def forward(self, x):
        for layer, shortcut in zip(self.layers, self.shortcut, strict=True):
            x = layer(x) + shortcut(x)
        return x


@pytest.mark.parametrize(
    "targets",
    [["to_out.0"], ["mlp.0", "mlp.2"], ["0"], r".*\.(mlp|to_out)\..*", r".*", ["shortcut.0"], "all-linear"],
    ids=str,
)
def test_targets_called_by_a_number(targets, key, tmp_path):
    torch.manual_seed(0)
    module = Numbered().eval()
    params, adapter = made(key, module, jpeft.LoRA(rank=2, targets=targets))
    save_peft(tmp_path, adapter, params=params)
    loaded, warned = load(module, tmp_path)
    assert not [text for text in warned if "missing" in text.lower()]
    x = torch.randn(2, 8)
    other = copy.deepcopy(module)
    other.load_state_dict(params_to_torch(jpeft.merge(params, adapter), module))
    with torch.no_grad():
        assert (other(x) - module(x)).abs().max() > 1e-3
        assert (loaded(x) - other(x)).abs().max() <= 1e-5


@pytest.mark.parametrize("make", [bert, distilbert])
def test_a_classifiers_task_without_a_trained_head_keeps_the_bases_head(make, key, tmp_path):
    module = base(make)
    params, adapter = made(key, module, jpeft.LoRA(rank=2, targets=ATTENTION[make]))
    assert_reads_as_saved(module, params, adapter, tmp_path, merged(module, params, adapter), task_type="SEQ_CLS")
    assert "base_model.model.classifier.weight" in load_file(tmp_path / "adapter_model.safetensors")


def test_a_head_with_factors_can_not_be_a_classifiers(key, tmp_path):
    module = base(bert)
    params, adapter = made(key, module, jpeft.LoRA(rank=2, targets=["query", "classifier"]))
    with pytest.raises(jpeft.AdapterError, match="'classifier' has factors.*task_type"):
        save_peft(tmp_path / "a", adapter, params=params, task_type="SEQ_CLS")
    assert_reads_as_saved(module, params, adapter, tmp_path / "b", merged(module, params, adapter))


def taken_away(folder, *keys):
    """The folder without some of its tensors."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    assert set(keys) <= set(tensors)
    save_file({key: tensor for key, tensor in tensors.items() if key not in keys}, file)
    return folder


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (bert, {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
        (bert, {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
        (distilbert, {"target_modules": ["q_lin"], "modules_to_save": ["classifier"]}),
    ],
)
def test_a_saved_module_that_the_file_lacks_is_refused_as_in_peft(make, config, tmp_path):
    module = base(make)
    key = "base_model.model.pre_classifier.bias" if make is distilbert else "base_model.model.classifier.weight"
    folder = taken_away(save(adapted(module, **config), tmp_path), key)
    with pytest.raises(KeyError):
        load(module, folder)
    with pytest.raises(jpeft.AdapterError, match=f"{key!r} is missing.*trains its module whole"):
        load_peft(folder, params_from_torch(module))


def test_a_missing_alpha_is_eight_and_told(tmp_path):
    module = base(llama)
    live = adapted(module, r=4, lora_alpha=8, target_modules=["q_proj"])
    folder, params = save(live, tmp_path), params_from_torch(module)
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["lora_alpha"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="'lora_alpha' is missing, which PEFT takes for 8"):
        adapter = load_peft(folder, params)
    assert (merged(module, params, adapter) - logits(load(module, folder)[0], TOKENS)).abs().max() <= 1e-5


def changed(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"target_modules": ["q_proj", "query_key_value"]}, "of the targets 'query_key_value' match no module"),
        ({"alpha_pattern": {"o_proj": 3}}, "of the patterns 'o_proj' match no target"),
        ({"task_type": "SEQ_CLS"}, "'task_type' is 'SEQ_CLS', and this base has no module 'classifier' or 'score'"),
    ],
)
def test_what_a_config_says_without_effect_is_told(fields, told, tmp_path):
    module = base(llama)
    folder = changed(save(adapted(module, r=2, target_modules=["q_proj"]), tmp_path), **fields)
    with pytest.warns(UserWarning, match=told):
        load_peft(folder, params_from_torch(module))


def test_a_language_models_task_on_a_classifier_is_told(tmp_path):
    module = base(bert)
    folder = changed(save(adapted(module, r=2, target_modules=["query"]), tmp_path), task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match="this base ends in 'classifier'"):
        load_peft(folder, params_from_torch(module))


def test_a_task_that_peft_does_not_have_is_refused(key, tmp_path):
    module = base(llama)
    params, adapter = made(key, module, jpeft.LoRA(rank=2, targets=["q_proj"]))
    with pytest.raises(jpeft.AdapterError, match="nearest are 'CAUSAL_LM'"):
        save_peft(tmp_path / "a", adapter, params=params, task_type="CASUAL_LM")


def test_a_task_that_peft_refuses_to_read_is_refused(tmp_path):
    module = base(llama)
    folder = changed(save(adapted(module, r=2, target_modules=["q_proj"]), tmp_path), task_type="__import__('os')")
    with pytest.raises(ValueError, match="Invalid task type"):
        load(module, folder)
    with pytest.raises(jpeft.AdapterError, match="'task_type' must be one of CAUSAL_LM"):
        load_peft(folder, params_from_torch(module))


def test_token_classifiers_and_scores(key, tmp_path):
    module = base(lambda: BertForTokenClassification(BertConfig(**SIZES, max_position_embeddings=32)))
    params, adapter = made(key, module, jpeft.LoRA(rank=2, targets=["query"], modules_to_save=["classifier"]))
    assert_reads_as_saved(
        module, params, adapter, tmp_path / "a", merged(module, params, adapter), task_type="TOKEN_CLS"
    )


def tied(config_class, model_class, **sizes):
    return model_class(config_class(**IDS, **sizes))


UNKNOWN_TIES = {
    "opt": lambda: tied(
        OPTConfig,
        OPTForCausalLM,
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        vocab_size=50,
        max_position_embeddings=32,
    ),
    "bloom": lambda: tied(BloomConfig, BloomForCausalLM, hidden_size=32, n_layer=2, n_head=4, vocab_size=50),
}


@pytest.mark.parametrize("name", UNKNOWN_TIES)
def test_a_tie_that_nobody_told_is_asked_for(name, key, tmp_path):
    module = base(UNKNOWN_TIES[name])
    embedding = {"opt": "embed_tokens", "bloom": "word_embeddings"}[name]
    params, adapter = made(key, module, jpeft.LoRA(rank=2, targets=[embedding]))
    with pytest.raises(jpeft.AdapterError, match="infer_layout"):
        save_peft(tmp_path / "a", adapter, params=params)
    with pytest.raises(jpeft.AdapterError, match="infer_layout"):
        load_peft(save(adapted(module, r=2, target_modules=[embedding]), tmp_path / "theirs"), params)
    save_peft(tmp_path / "b", adapter, params=params, layout=infer_layout(params, module))
    loaded, _ = load(module, tmp_path / "b")
    assert (logits(loaded, TOKENS) - merged(module, params, adapter)).abs().max() <= 1e-5


class Deep(nn.Module):
    """Many layers, and names that are regexes for one another."""

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(22)])
        self.out = nn.Sequential(nn.Linear(8, 8))
        self.out_0 = nn.Linear(8, 8)

    def forward(self, x):
        for layer in self.model.layers:
            x = x + torch.tanh(layer(x))
        return self.out_0(torch.tanh(self.out(x)))


def same_in_peft(module, params, adapter, folder):
    save_peft(folder, adapter, params=params)
    x = torch.randn(2, 8)
    other = copy.deepcopy(module)
    other.load_state_dict(params_to_torch(jpeft.merge(params, adapter), module))
    with torch.no_grad():
        assert (other(x) - module(x)).abs().max() > 1e-3
        assert (load(module, folder)[0](x) - other(x)).abs().max() <= 1e-5


@pytest.mark.parametrize("count", [19, 20, 22])
def test_many_modules_named_whole_are_meant_whatever_their_layer(count, key, tmp_path):
    torch.manual_seed(0)
    module = Deep().eval()
    targets = [f"model.layers.{n}" for n in range(count)]
    params, adapter = made(key, module, jpeft.LoRA(rank=2, targets=targets, layers_to_transform=[0]))
    same_in_peft(module, params, adapter, tmp_path / "a")


def test_a_saved_name_that_is_a_regex_for_a_target_is_refused(key, tmp_path):
    module = Deep().eval()
    params, adapter = made(key, module, jpeft.LoRA(rank=2, targets=["out_0"], modules_to_save=["out.0"]))
    with pytest.raises(jpeft.AdapterError, match="'out_0' has factors, and PEFT, which takes 'out.0' for a regex"):
        save_peft(tmp_path / "a", adapter, params=params)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        return self.out(self.attention(x, x, x)[0])


def test_an_adapter_that_pefts_module_never_calls_is_refused(key, tmp_path):
    module = Attending().eval()
    params, adapter = made(key, module, jpeft.LoRA(rank=2, targets=["out_proj", "out"]))
    with pytest.raises(jpeft.AdapterError, match="MultiheadAttention"):
        save_peft(tmp_path / "a", adapter, params=params)


def test_a_trained_magnitude_of_rank_zero_is_refused(key, tmp_path):
    module = base(llama)
    spec = jpeft.DoRA(rank=2, targets=["q_proj", "k_proj"], rank_pattern={"k_proj": 0})
    params, adapter = made(key, module, spec)
    with pytest.raises(jpeft.AdapterError, match="has rank 0.* magnitude"):
        save_peft(tmp_path / "a", adapter, params=params)
    untrained = jpeft.init(key, spec, params)
    save_peft(tmp_path / "b", untrained, params=params)
    assert not [name for name in load_file(tmp_path / "b" / "adapter_model.safetensors") if "k_proj" in name]


def test_a_value_without_axes_in_a_saved_module(key, tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.gate = nn.Linear(8, 8), nn.Module()
            self.gate.value = nn.Parameter(torch.tensor(1.0))

        def forward(self, x):
            return self.fc(x) * self.gate.value

    module = Scaled().eval()
    params, adapter = made(key, module, jpeft.LoRA(rank=2, targets=["fc"], modules_to_save=["gate"]))
    save_peft(tmp_path, adapter, params=params)
    again = load_peft(tmp_path, params)
    assert float(again.trained["gate/value"]["value"]) == float(adapter.trained["gate/value"]["value"]) != 1.0
