"""A method that is new to the border: what is not stated of it is refused, never taken for what holds of LoRA.

The method is made up: a LoRA by another name, with keys of its own, so that PEFT's own LoRA says what is right.
"""

import json
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft.methods import METHODS
from jpeft_interop import Layout, Place, load_peft
from jpeft_interop.peft_keys import KEYS, Keys
from jpeft_interop.peft_types import LORA, TYPES, PeftType
from jpeft_interop.provenance import adapted_keys, provenance, stating
from jpeft_interop.serving import plain_lora
from jpeft_interop.split import matrices
from peft_twins import adapted_by, save

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ENDS = {"a": ".made_up_A", "b": ".made_up_B"}
SIZES = {"q": 4, "k": 6, "layers.0": 4, "layers.1": 4}


@dataclass(frozen=True, repr=False)
class MadeUp(jpeft.LoRA):
    method = "made-up"


def _read(config):
    spec = LORA.read(config)
    return MadeUp(rank=spec.rank, alpha=spec.alpha, targets=spec.targets)


@pytest.fixture(autouse=True)
def made_up(monkeypatch):
    row = KEYS["lora"]
    keys = Keys(ENDS, {}, row.shapes, row.to_file, row.from_file, row.why_not, scaling=row.scaling)
    kind = PeftType("MADE_UP", LORA.defaults, LORA.fields, LORA.refused, LORA.history, _read, LORA.write)
    monkeypatch.setitem(METHODS, "made-up", METHODS["lora"])
    monkeypatch.setitem(KEYS, "made-up", keys)
    monkeypatch.setitem(TYPES, "MADE_UP", kind)


@pytest.fixture
def module():
    torch.manual_seed(0)
    linear = lambda out: torch.nn.Linear(5, out, bias=False)
    layers = torch.nn.ModuleList([linear(SIZES["layers.0"]), linear(SIZES["layers.1"])])
    return torch.nn.ModuleDict({"q": linear(SIZES["q"]), "k": linear(SIZES["k"]), "layers": layers})


def folder_of(module, path, targets):
    """A folder of PEFT's with the method's names in it, and the weights that PEFT's merge gives."""
    theirs = adapted_by(module, LoraConfig(r=2, lora_alpha=6, target_modules=targets))
    save(theirs, path)
    rename = lambda key: key.replace(".lora_A.weight", ENDS["a"]).replace(".lora_B.weight", ENDS["b"])
    tensors = {rename(key): tensor for key, tensor in load_file(path / WEIGHTS).items()}
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    config = json.loads((path / CONFIG).read_text()) | {"peft_type": "MADE_UP"}
    (path / CONFIG).write_text(json.dumps(config))
    return {key: tensor.numpy() for key, tensor in theirs.merge_and_unload().state_dict().items()}


def based(module, places):
    state = {key: tensor.numpy() for key, tensor in module.state_dict().items()}
    sizes = {"d": 5, "q": 4, "k": 6, "l": 2, "two": 2, "half": 2}
    fitted = {}
    for path, place in places.items():
        named = tuple(sorted((name, size) for name, size in sizes.items() if name in place.axes))
        fitted[path] = Place(place.axes, place.torch, named, place.scale)
    layout = Layout({path: place.fit(place.shape, path) for path, place in fitted.items()})
    return layout.from_torch({key: state[key] for key in layout.by_key}), layout


Q, K = {"q": Place.of("d q", {"q.weight": "q d"})}, {"k": Place.of("d k", {"k.weight": "k d"})}
ALIKE = {
    "alone": (Q, ["q"]),
    "stored transposed": ({"q": Place.of("q d", {"q.weight": "q d"})}, ["q"]),
    "in heads": ({"q": Place.of("d two half", {"q.weight": "(two half) d"})}, ["q"]),
    "beside another": (Q | K, ["q", "k"]),
}
PARTS = {
    "fused": ({"qk": Place.of("d (q + k)", {"q.weight": "q d", "k.weight": "k d"})}, ["q", "k"], "holds 2 of"),
    "fused, one adapted": ({"qk": Place.of("d (q + k)", {"q.weight": "q d", "k.weight": "k d"})}, ["q"], "holds 2 of"),
    "stacked": ({"w": Place.of("l d q", {"layers.{l}.weight": "q d"})}, ["0", "1"], "holds 2 of"),
    "reordered": ({"q": Place.of("d (half two)", {"q.weight": "(two half) d"})}, ["q"], "not as torch has it"),
    "scaled": ({"q": Place.of("d q", {"q.weight": "q d"}, scale=0.5)}, ["q"], "not as torch has it"),
    "padded": ({"q": Place.of("d (q + 2)", {"q.weight": "q d"})}, ["q"], "not as torch has it"),
    "a part of torch's": (
        {
            "one": Place.of("d two", {"q.weight": "(two + 2) d"}),
            "other": Place.of("d half", {"q.weight": "(2 + half) d"}),
        },
        ["q"],
        "not as torch has it",
    ),
}


@pytest.mark.parametrize("form", ALIKE)
def test_whole_matrices_are_read(form, module, tmp_path):
    places, targets = ALIKE[form]
    expected = folder_of(module, tmp_path, targets)
    params, layout = based(module, places)
    adapter = load_peft(tmp_path, params, layout=layout)
    for key, found in layout.arrays(jpeft.merge(params, adapter)).items():
        np.testing.assert_allclose(found, expected[key], atol=1e-6)


@pytest.mark.parametrize("form", PARTS)
def test_parts_of_a_weight_are_refused(form, module, tmp_path):
    """LoRA's blocks, and its leaves' order, are LoRA's: of another method nobody has said that they are right."""
    places, targets, why = PARTS[form]
    folder_of(module, tmp_path, targets)
    params, layout = based(module, places)
    with pytest.raises(
        jpeft.AdapterError, match=rf"{why}.*'made-up' adapters.*is not known: use params that have a le"
    ):
        load_peft(tmp_path, params, layout=layout)


def test_a_leaf_whose_axes_are_not_known_is_refused(module, tmp_path, monkeypatch):
    row = KEYS["made-up"]
    turned = lambda spec, leaves, spot: {"core": leaves["a"], "b": leaves["b"].T}
    monkeypatch.setitem(KEYS, "made-up", row._replace(from_file=turned))
    folder_of(module, tmp_path, ["q"])
    params, layout = based(module, Q)
    with pytest.raises(jpeft.AdapterError, match="the axes of a leaf 'core' are not known"):
        load_peft(tmp_path, params, layout=layout)


def stated(path, module, places, base):
    """The folder as a save of ours would leave it: with what it states of itself."""
    tensors, config = load_file(path / WEIGHTS), json.loads((path / CONFIG).read_text())
    save_file(tensors, path / WEIGHTS, stating(tensors, config, {"format": "pt"}, base))


def test_the_keys_of_every_method_say_what_is_adapted(module, tmp_path):
    folder_of(module, tmp_path, ["q", "k"])
    _, layout = based(module, Q | K)
    assert adapted_keys(load_file(tmp_path / WEIGHTS), layout) == {"q.weight", "k.weight"}


def test_another_base_of_a_new_method_is_found(module, tmp_path):
    folder_of(module, tmp_path, ["q"])
    params, layout = based(module, Q)
    stated(tmp_path, module, Q, "0" * 32)
    with pytest.raises(jpeft.AdapterError, match="for another base"):
        load_peft(tmp_path, params, layout=layout)
    with pytest.raises(jpeft.AdapterError, match="for another base"):
        provenance(tmp_path, params, layout=layout)


@pytest.mark.parametrize("method", KEYS)
def test_each_table_of_keys_is_known(method):
    layout = Layout.of({"q": np.zeros((5, 4), np.float32)}, Q)
    for suffix in (*KEYS[method].suffixes.values(), *KEYS[method].embedding.values()):
        assert adapted_keys([f"base_model.model.q{suffix}"], layout) == {"q.weight"}


def test_keys_of_no_method_are_no_mere_unverified(module, tmp_path):
    layout = Layout.of({"q": jnp.zeros((5, 4))}, Q)
    with pytest.raises(jpeft.AdapterError, match=r"none of the keys is an adapter's.*\.lora_A\.weight"):
        adapted_keys(["base_model.model.q.other_A", "base_model.model.q.weight"], layout)
    with pytest.raises(jpeft.AdapterError, match=r"adapts 'qq', and the layout has no such weight.*'q\.weight'"):
        adapted_keys(["base_model.model.qq.lora_A.weight"], layout)


def test_vllm_gets_no_method_that_only_borrows_loras_fields(module):
    params, layout = based(module, Q)
    adapter = jpeft.init(jax.random.key(0), MadeUp(rank=2, targets=["q"]), params, layout=layout)
    with pytest.raises(jpeft.AdapterError, match="vLLM serves LoRA alone, and this is 'made-up'"):
        plain_lora(adapter)


@pytest.mark.parametrize("form", PARTS)
def test_parts_of_a_weight_are_not_written(form, module):
    params, layout = based(module, PARTS[form][0])
    adapter = jpeft.init(jax.random.key(0), MadeUp(rank=2, targets=".*"), params, layout=layout)
    with pytest.raises(jpeft.AdapterError, match="has no place in a PEFT file.*'made-up' adapters.*is not known"):
        matrices(adapter, layout)


@pytest.mark.parametrize("form", ALIKE)
def test_whole_matrices_are_written(form, module):
    params, layout = based(module, ALIKE[form][0])
    adapter = jpeft.init(jax.random.key(0), MadeUp(rank=2, targets=".*"), params, layout=layout)
    assert {one.spot.module for one in matrices(adapter, layout)} == {
        key.removesuffix(".weight") for key in layout.by_key
    }
