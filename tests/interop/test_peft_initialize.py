"""The LoRA initialisers against the installed PEFT: changed base, start and effective weights, from the same inputs."""

import copy
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import jpeft
from jpeft.initialize import olora, on_original_base, orthogonal, pissa
from jpeft.tree import flatten
from jpeft_interop import load_peft, params_from_torch, save_model, save_peft
from jpeft_interop.models import build, pure
from nearness import assert_as_near_as
from peft_twins import base, gpt2, llama, load, perturb

SHAPES = [(16, 24), (24, 16), (20, 20), (9, 40)]
CONFIGS = [
    {"r": 4, "lora_alpha": 4},
    {"r": 3, "lora_alpha": 16},
    {"r": 8, "lora_alpha": 5, "use_rslora": True},
    {"r": 1, "lora_alpha": 2},
]
# Each shape with two of the configurations, each configuration with two of the shapes.
CASES = [(SHAPES[i], CONFIGS[(i + k) % 4]) for i, k in itertools.product(range(4), range(2))]


class Two(torch.nn.Module):
    """Two linear layers of a given shape, one of them with a bias."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.one = torch.nn.Linear(n_in, n_out)
        self.two = torch.nn.Linear(n_out, n_in, bias=False)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


def two(shape, seed):
    torch.manual_seed(seed)
    return Two(*shape)


def started(module, **config):
    """PEFT's model after its initialiser."""
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(copy.deepcopy(module), LoraConfig(**config))


def layers(peft_model):
    """PEFT's LoRA layers by the path of their kernel."""
    found = {}
    for name, layer in peft_model.base_model.model.named_modules():
        if hasattr(layer, "lora_A") and "default" in layer.lora_A:
            found[name.replace(".", "/") + "/kernel"] = layer
    return found


def in_out(layer, tensor):
    """A torch weight as (in, out)."""
    array = tensor.detach().float().numpy()
    return array if getattr(layer, "fan_in_fan_out", False) else array.T


def spec_of(config, **more):
    names = {"r": "rank", "lora_alpha": "alpha", "use_rslora": "rank_stabilized", "target_modules": "targets"}
    return jpeft.LoRA(**{names[k]: v for k, v in config.items()}, **more)


def new_adapter(module, config, key=0):
    params = params_from_torch(module)
    return jpeft.init(jax.random.key(key), spec_of(config), params), params


def assert_as_peft(adapter, params, peft_model, original, change_of, atol=1e-5):
    """Base, s A B and their sum, layer by layer; that the start is there and the model unchanged, too.

    `change_of(path, weight, rank, scaling)` is s A B in float64.
    """
    found, flat, before = layers(peft_model), flatten(params), flatten(original)
    assert found.keys() == {site.path for site in adapter.sites}
    changes = flatten(jpeft.apply(jax.tree.map(jnp.zeros_like, params), adapter))
    adapted = flatten(jpeft.apply(params, adapter))
    for path, layer in found.items():
        theirs, delta = in_out(layer, layer.base_layer.weight), in_out(layer, layer.get_delta_weight("default"))
        assert np.abs(delta).max() > 1e-2
        weight = np.asarray(before[path], np.float64)
        change = change_of(path, weight, layer.r["default"], layer.scaling["default"])
        assert_as_near_as(flat[path], theirs, weight - change, atol, path)
        assert_as_near_as(changes[path], delta, change, atol, path)
        assert_as_near_as(adapted[path], theirs + delta, weight, atol, path)
    untouched = flat.keys() - found.keys()
    assert all(np.array_equal(flat[path], before[path]) for path in untouched)


def principal_part(path, weight, rank, scaling):
    """PiSSA's s A B: U_r S_r V_rᵀ."""
    u, s, vh = np.linalg.svd(weight, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


def first_columns(path, weight, rank, scaling):
    """OLoRA's s A B: s (Q_r R_r)ᵀ of the torch weight."""
    q, r = np.linalg.qr(weight.T)
    return scaling * (q[:, :rank] @ r[:rank]).T


CHANGES = {"pissa": principal_part, "olora": first_columns}


@pytest.mark.parametrize("number", range(len(CASES)))
@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_base_and_start_as_peft_has_them(name, number):
    shape, config = CASES[number]
    config = config | {"target_modules": ["one", "two"]}
    module = two(shape, number)
    adapter, params = new_adapter(module, config)
    new, residual = {"pissa": pissa, "olora": olora}[name](adapter, params)
    assert_as_peft(new, residual, started(module, init_lora_weights=name, **config), params, CHANGES[name])


def test_pissa_on_the_transposed_weights_of_gpt2():
    module = base(gpt2)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "mlp.c_proj"]}
    adapter, params = new_adapter(module, config)
    new, residual = pissa(adapter, params)
    peft_model = started(module, init_lora_weights="pissa", fan_in_fan_out=True, **config)
    assert_as_peft(new, residual, peft_model, params, principal_part)


def test_orthogonal_factors_have_the_size_of_peft_s():
    """Random in both: no product, and entries of the same spread."""
    config = {"r": 8, "lora_alpha": 8, "target_modules": ["one", "two"]}
    module = two((300, 200), 0)
    adapter, params = new_adapter(module, config)
    new = orthogonal(jax.random.key(1), adapter)
    for path, layer in layers(started(module, init_lora_weights="orthogonal", **config)).items():
        leaves = new.trained[path]
        for name, theirs in (("a", layer.lora_A), ("b", layer.lora_B)):
            spread = float(theirs["default"].weight.detach().std())
            assert abs(float(leaves[name].std()) - spread) < 0.1 * spread
        assert np.abs(leaves["a"] @ leaves["b"]).max() < 1e-6


def trained(adapter, seed=0):
    """The adapter after some steps, as it were."""
    rng = np.random.default_rng(seed)
    noisy = lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32)
    return adapter.replace(trained=jax.tree.map(noisy, adapter.trained))


def logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_peft_runs_the_export_on_the_original_base(name, rslora, tmp_path):
    module = base(llama)
    config = {"r": 3, "lora_alpha": 8, "use_rslora": rslora, "target_modules": ["q_proj", "down_proj"]}
    adapter, params = new_adapter(module, config)
    initial, residual = {"pissa": pissa, "olora": olora}[name](adapter, params)
    after = trained(initial)
    save_peft(tmp_path, on_original_base(after, initial), params=params)
    tokens = np.random.default_rng(0).integers(0, 50, (2, 9))
    theirs = logits(load(module, tmp_path)[0], tokens)
    ours = ours_logits(module, residual, after, tokens)
    assert np.abs(theirs - logits(module, tokens)).max() > 1e-2
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_peft_runs_the_adapter_on_the_changed_base(tmp_path):
    """The other way to hand it on: a model folder and an ordinary adapter folder."""
    module = base(llama)
    adapter, params = new_adapter(module, {"r": 3, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]})
    initial, residual = pissa(adapter, params)
    after = trained(initial)
    save_model(tmp_path / "base", residual, module.config, architecture="LlamaForCausalLM")
    save_peft(tmp_path / "adapter", after, params=residual)
    changed = type(module).from_pretrained(tmp_path / "base").eval()
    tokens = np.random.default_rng(0).integers(0, 50, (2, 9))
    theirs = logits(load(changed, tmp_path / "adapter")[0], tokens)
    assert np.abs(theirs - logits(load(module, tmp_path / "adapter")[0], tokens)).max() > 1e-2
    np.testing.assert_allclose(theirs, ours_logits(module, residual, after, tokens), atol=1e-5)


def ours_logits(module, params, adapter, tokens):
    forward, _ = pure(build(module.config.to_dict(), architecture=type(module).__name__))
    lifted = jax.jit(lambda params, tokens: jpeft.lift(forward)(params, tokens).logits)
    return np.asarray(lifted(jpeft.attach(params, adapter), tokens))


def test_the_export_has_the_tensors_of_peft_s_own_conversion(tmp_path):
    """`path_initial_model_for_weight_conversion` on the same start and the same training."""
    module = base(llama)
    params = params_from_torch(module)
    config = {"r": 3, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    peft_model = started(module, init_lora_weights="pissa", **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model.peft_config["default"].init_lora_weights = True
        peft_model.save_pretrained(tmp_path / "start")
        peft_model.peft_config["default"].init_lora_weights = "pissa"
        initial = load_peft(tmp_path / "start", params)
        perturb(peft_model, 3, only_trained=True)
        peft_model.peft_config["default"].init_lora_weights = True
        peft_model.save_pretrained(tmp_path / "end")
        after = load_peft(tmp_path / "end", params)
        peft_model.peft_config["default"].init_lora_weights = "pissa"
        peft_model.save_pretrained(
            tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "start")
        )
    save_peft(tmp_path / "ours", on_original_base(after, initial), params=params)
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
