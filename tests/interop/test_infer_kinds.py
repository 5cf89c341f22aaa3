"""infer_layout tells an embedding from a linear map by evidence; PEFT is the judge: the same logits, a real effect."""

import copy
import json

import jax
import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

import jpeft
from jpeft.errors import WeightsError
from jpeft.tree import flatten
from jpeft_interop import export_model, infer_layout, load_peft, params_from_torch, save_peft
from jpeft_interop.layout import Layout, default_layout
from jpeft_interop.torch_table import nest
from peft_twins import IDS, adapted, base, load, save

WIDTHS = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=50)
NEO = dict(hidden_size=16, num_layers=1, num_heads=2, attention_types=[[["global"], 1]], vocab_size=50)
MODELS = {
    "albert": (hf.AlbertForSequenceClassification, WIDTHS | {"embedding_size": 12}),
    "electra": (hf.ElectraForSequenceClassification, WIDTHS | {"embedding_size": 12}),
    "neox": (hf.GPTNeoXForCausalLM, WIDTHS | IDS),
    "neox tied": (hf.GPTNeoXForCausalLM, WIDTHS | IDS | {"tie_word_embeddings": True}),
    "neo": (hf.GPTNeoForCausalLM, NEO | IDS),
    "bigcode": (hf.GPTBigCodeForCausalLM, dict(n_embd=16, n_layer=1, n_head=2, vocab_size=50, multi_query=False) | IDS),
    "gpt2": (hf.GPT2LMHeadModel, dict(n_embd=16, n_layer=1, n_head=2, vocab_size=50) | IDS),
}
# model, the torch module that is adapted, and by which kind
ADAPTED = {
    ("albert", "albert.encoder.embedding_hidden_mapping_in"): "linear",
    ("albert", "albert.embeddings.word_embeddings"): "embedding",
    ("electra", "electra.embeddings_project"): "linear",
    ("neox", "lm_head"): "linear",
    ("neox", "gpt_neox.embed_in"): "embedding",
    ("neo", "transformer.h.0.mlp.c_fc"): "linear",
    ("bigcode", "transformer.h.0.attn.c_proj"): "linear",
    ("gpt2", "transformer.h.0.attn.c_proj"): "conv1d",
}
BUFFERS = ("*.attn.bias", "*.attention.bias", "*.masked_bias")


def model(name: str):
    model_class, config = MODELS[name]
    return base(lambda: model_class(model_class.config_class(**config)))


def tree(module, form: str) -> dict:
    """The weights in somebody's own names: Flax's leaves, or `w` in torch's order or the other one."""
    flat = {}
    for path, leaf in flatten(params_from_torch(module)).items():
        name = "/".join(["net", *path.split("/")])
        if form != "flax" and path.endswith(("/kernel", "/embedding")):
            name, leaf = name.rpartition("/")[0] + "/w", np.asarray(leaf)
            if path.endswith("/kernel") and form == "torch's order":
                leaf = leaf.T
        flat[name] = leaf
    return nest(flat)


def logits(module, params: dict | None = None, layout: Layout | None = None) -> np.ndarray:
    """What torch computes with its own weights, or with the params in their place."""
    if params is not None and layout is not None:
        module = copy.deepcopy(module)
        done = module.load_state_dict(layout.to_torch(params), strict=False)
        assert not done.unexpected_keys
    with torch.no_grad():
        return module(torch.arange(12).reshape(2, 6)).logits.numpy()


def state_of(module, given: str, folder):
    if given == "folder":
        module.save_pretrained(folder)
        return folder
    return module if given == "module" else dict(module.state_dict())


def adapt(layout: Layout, params: dict, name: str):
    target = next(path for path, links in layout.links.items() if any(link.key == f"{name}.weight" for link in links))
    adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=2, alpha=4, targets=[target]), params, layout=layout)
    assert len(adapter.sites) == 1
    noise = lambda leaf: leaf + 0.3 * np.random.default_rng(leaf.size).standard_normal(leaf.shape).astype(leaf.dtype)
    return adapter.replace(trained=jax.tree.map(noise, adapter.trained))


@pytest.mark.parametrize(("given", "form"), [("folder", "flax"), ("module", "torch's order")])
@pytest.mark.parametrize(("name", "adapted"), ADAPTED)
def test_peft_computes_what_the_merged_weights_do(name, adapted, given, form, tmp_path):
    module = model(name)
    params = tree(module, form)
    layout = infer_layout(params, state_of(module, given, tmp_path / "base"), ignore=BUFFERS)
    assert {link.kind for link in layout.by_key[f"{adapted}.weight"]} == {ADAPTED[name, adapted]}
    adapter = adapt(layout, params, adapted)
    save_peft(tmp_path / "adapter", adapter, params=params, layout=layout)
    theirs, warned = load(module, tmp_path / "adapter")
    assert not [message for message in warned if "missing" in message.lower()]
    expected = logits(theirs)
    assert np.abs(expected - logits(module)).max() > 1e-2
    assert np.abs(logits(module, jpeft.merge(params, adapter), layout) - expected).max() < 1e-5


@pytest.mark.parametrize(("given", "form"), [("folder", "torch's order"), ("module", "turned")])
def test_every_kind_is_the_modules_own(given, form, tmp_path):
    for name in MODELS:
        module = model(name)
        layout = infer_layout(tree(module, form), state_of(module, given, tmp_path / name), ignore=BUFFERS)
        assert wrong_kinds(layout, module) == {}


def test_the_folders_name_of_a_head_is_written_back(tmp_path):
    """GPT-NeoX's head is `embed_out` in files, `lm_head` in transformers 5's module."""
    module = model("neox")
    module.save_pretrained(tmp_path / "base")
    params = tree(module, "torch's order")
    layout = infer_layout(params, tmp_path / "base")
    assert "lm_head.weight" in layout.by_key and "embed_out.weight" not in layout.by_key
    export_model(tmp_path / "new", params, layout=layout, base=tmp_path / "base")
    there, here = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "new"))
    assert here.keys() == there.keys() and all(torch.equal(here[key], there[key]) for key in there)


def wrong_kinds(layout: Layout, module) -> dict:
    """The modules that the layout takes for others than they are."""
    kinds = {"Linear": "linear", "Embedding": "embedding", "Conv1D": "conv1d"}
    classes = {name: kinds.get(type(child).__name__) for name, child in module.named_modules()}
    found = {key.removesuffix(".weight"): links[0].kind for key, links in layout.by_key.items() if links}
    return {name: kind for name, kind in found.items() if classes.get(name) and kind != classes[name]}


@pytest.mark.parametrize("name", [name for name in MODELS if name != "neox tied"])
def test_a_state_dict_tells_by_leaves_and_biases(name):
    module = model(name)
    layout = infer_layout(tree(module, "flax"), module.state_dict(), ignore=BUFFERS)
    assert wrong_kinds(layout, module) == {}


@pytest.mark.parametrize("form", ["torch's order", "turned"])
@pytest.mark.parametrize("name", ["electra", "neox"])
def test_what_a_state_dict_does_not_tell_is_asked_for(name, form):
    module = model(name)
    with pytest.raises(WeightsError, match=r"(word_embeddings|embed_in).*a name alone decides nothing.*kernels="):
        infer_layout(tree(module, form), module.state_dict(), ignore=BUFFERS)


def test_the_geometry_tells_a_lookup_from_a_product():
    table, head, up = (np.random.default_rng(i).standard_normal((9, 4)).astype(np.float32) for i in range(3))
    params = {"a": table, "b": head, "c": up[:4].T}
    state = {"embed_in.weight": table, "embed_out.weight": head, "tok_emb.weight": up[:4]}

    def forward(params, tokens):
        return params["a"][tokens] @ params["c"] @ params["b"].T

    with pytest.raises(WeightsError, match="'embed_in.weight' in 'a', 'embed_out.weight' in 'b', 'tok_emb.weight'"):
        infer_layout(params, state)
    geometry = jpeft.kernels(forward, params, np.arange(3))
    layout = infer_layout(params, state, kernels=geometry)
    kinds = {key: links[0].kind for key, links in layout.by_key.items()}
    assert kinds == {"embed_in.weight": "embedding", "embed_out.weight": "linear", "tok_emb.weight": "linear"}


def test_of_two_names_of_one_leaf_one_is_looked_up():
    table = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
    kinds = lambda state: {
        key: links[0].kind for key, links in infer_layout({"e": {"embedding": table}}, state).by_key.items()
    }
    assert kinds({"embed_in.weight": table, "head.weight": table}) == {
        "embed_in.weight": "embedding",
        "head.weight": "linear",
    }
    names = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
    t5 = kinds({f"{name}.weight": table for name in (*names, "lm_head")})
    assert t5 == {f"{name}.weight": "embedding" for name in names} | {"lm_head.weight": "linear"}
    with pytest.raises(WeightsError, match="a name alone decides nothing"):
        kinds({"embed_in.weight": table, "embed_out.weight": table})


@pytest.mark.parametrize("config", [{"model_type": "llama", "num_attention_heads": 0}, {"model_type": ["x"]}, {}])
def test_a_config_that_no_model_is_built_of_tells_nothing(config, tmp_path):
    module = model("electra")
    module.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    layout = infer_layout(tree(module, "flax"), tmp_path)
    assert wrong_kinds(layout, module) == {}
    with pytest.raises(WeightsError, match="a name alone decides nothing"):
        infer_layout(tree(module, "turned"), tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "neo", "bigcode"])
def test_the_layout_of_torchs_own_names_keeps_the_order_of_axes(name):
    """GPT-Neo's blocks are called as GPT-2's are, and hold Linear where GPT-2 holds Conv1D."""
    if name == "bigcode":
        made = hf.GPTBigCodeConfig(**MODELS[name][1] | {"multi_query": True})
        module = base(lambda: hf.GPTBigCodeForCausalLM(made))
    else:
        module = model(name)
    params = params_from_torch(module)
    layout = default_layout(flatten(params))
    assert wrong_kinds(layout, module) == {}
    state = layout.to_torch(params)
    assert all(torch.equal(state[name], parameter) for name, parameter in module.named_parameters())


def test_experts_that_torch_keeps_inputs_first(tmp_path):
    """GPT-OSS's stacked kernels are (experts, in, out), under the names of others' (experts, out, in)."""
    sizes = dict(hidden_size=16, intermediate_size=12, num_hidden_layers=1, num_local_experts=3, vocab_size=50)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=8)
    module = base(lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**sizes, **heads)))
    params = params_from_torch(module)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    theirs = adapted(module, r=2, lora_alpha=3, target_modules=["q_proj"], target_parameters=names)
    save(theirs, tmp_path / "theirs")
    expected = theirs.merge_and_unload().state_dict()
    own = default_layout(flatten(params))
    for layout in (own, infer_layout(params, module), infer_layout(params, dict(module.state_dict()))):
        kinds = {layout.by_key[f"model.layers.0.{name}"][0].kind for name in names}
        assert kinds == {"experts_io"}
        merged = jpeft.merge(params, load_peft(tmp_path / "theirs", params, layout=layout))
        for key, tensor in layout.arrays(merged).items():
            np.testing.assert_allclose(tensor, expected[key].numpy(), atol=1e-6, err_msg=key)


@pytest.mark.parametrize(
    ("up", "down", "kind"),
    [
        ((3, 48, 16), (3, 16, 24), "experts"),
        ((3, 16, 48), (3, 24, 16), "experts_io"),
        ((3, 16, 16), (3, 16, 8), "experts"),
    ],
)
def test_experts_without_biases_are_told_by_the_kernel_beside(up, down, kind):
    shapes = {"experts/gate_up_proj": np.zeros(up), "experts/down_proj": np.zeros(down)}
    assert {links[0].kind for links in default_layout(shapes).links.values()} == {kind}
