"""X-LoRA folders of PEFT's, completed by hand where PEFT loses a part, against PEFT's own X-LoRA on torch."""

import copy
import json
import shutil
import warnings

import jax
import numpy as np
import pytest
import torch
from peft import XLoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import jpeft
import peft_twins
from jpeft import xlora
from jpeft_interop.load_peft import load_peft
from jpeft_interop.load_xlora import load_peft_xlora
from jpeft_interop.models import pure
from jpeft_interop.torch_params import params_from_torch
from torch_twins import difference, module_of

IDS = np.random.default_rng(0).integers(3, 50, (2, 7))
EXPERTS = [
    {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    {"r": 3, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj", "v_proj"], "use_rslora": True},
    {"r": 1, "lora_alpha": 3, "target_modules": ["embed_tokens", "1.mlp.up_proj", "down_proj"]},
]
CLASSIFIER = "internal_xlora_classifier"


@pytest.fixture(scope="module")
def base():
    module = peft_twins.base(peft_twins.llama)
    module.config.use_cache = False
    return module


@pytest.fixture(scope="module")
def params(base):
    return params_from_torch(base)


@pytest.fixture(scope="module")
def experts(base, tmp_path_factory):
    """Folders of ordinary LoRAs, as PEFT saves them."""
    folder = tmp_path_factory.mktemp("experts")
    for number, config in enumerate(EXPERTS):
        made = peft_twins.adapted(base, number, task_type="CAUSAL_LM", **config)
        peft_twins.save(made, folder / str(number))
    return [folder / str(number) for number in range(len(EXPERTS))]


def peft_xlora(base, experts, names=None, **config):
    """PEFT's X-LoRA, its classifier random."""
    names = [str(number) for number in range(len(experts))] if names is None else names
    adapters = {name: str(folder) for name, folder in zip(names, experts, strict=True)}
    options = {"hidden_size": 32, "xlora_size": 16, "task_type": "CAUSAL_LM", "adapters": adapters, **config}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = get_peft_model(copy.deepcopy(base), XLoraConfig(**options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in getattr(made.base_model, CLASSIFIER).parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return made.eval()


def whole_folder(made, experts, folder):
    """What PEFT meant to save."""
    peft_twins.save(made, folder)
    state = {key: value for key, value in made.state_dict().items() if CLASSIFIER in key}
    save_file(state, folder / "adapter_model.safetensors")
    for number, source in enumerate(experts):
        shutil.rmtree(folder / str(number), ignore_errors=True)
        shutil.copytree(source, folder / str(number))
    return folder


def run(base, params, mixture, ids=IDS):
    return jax.jit(xlora.lift(pure(module_of(base))[0]))(params, mixture, ids)


def torch_logits(made, ids=IDS):
    with torch.no_grad():
        return made(input_ids=torch.as_tensor(ids)).logits


CONFIGS = [
    {},
    {"xlora_depth": 2},
    {"xlora_depth": 3, "xlora_dropout_p": 0.0, "softmax_temperature": 2.5},
    {"top_k_lora": 2, "global_scaling_weight": 0.4},
    {"enable_softmax": False, "top_k_lora": 2, "enable_softmax_topk": True},
    {"enable_softmax": True, "top_k_lora": 1, "enable_softmax_topk": True},
    {"layerwise_scalings": True, "xlora_depth": 2},
    {"scaling_pass_value": 0.6, "global_scaling_weight": 0.5},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.filterwarnings("ignore:`enable_softmax_topk` and `enable_softmax` are both enabled:UserWarning")
def test_the_same_logits_as_peft(base, params, experts, tmp_path, config):
    made = peft_xlora(base, experts, **config)
    expected = torch_logits(made)
    folder = whole_folder(made, experts, tmp_path / "x")
    mixture = load_peft_xlora(folder, params, order=[name for name, _ in base.named_modules()])
    output, scalings = run(base, params, mixture)
    size = float(expected.abs().max())
    assert difference(output.logits, expected) <= 1e-5 * size
    assert difference(output.logits, torch_logits(base)) > 1e-2 * size
    assert scalings.shape == (2, 7, 10, 3)
    if "top_k_lora" not in config and not config.get("layerwise_scalings"):
        assert difference(scalings, made.base_model.internal_xlora_scalings) <= 1e-5


def test_it_goes_on_from_the_native_folder(base, params, experts, tmp_path):
    made = peft_xlora(base, experts, xlora_depth=2)
    mixture = load_peft_xlora(whole_folder(made, experts, tmp_path / "x"), params)
    xlora.save(tmp_path / "native", mixture)
    again = xlora.load(tmp_path / "native")
    np.testing.assert_array_equal(run(base, params, again)[0].logits, run(base, params, mixture)[0].logits)


@pytest.mark.parametrize(("depth", "lost"), [(1, r"layers\.0\.weight', .*layers\.0\.bias' are"), (2, r"layers\.0\.")])
def test_a_folder_straight_from_peft_is_refused(base, params, experts, tmp_path, depth, lost):
    folder = peft_twins.save(peft_xlora(base, experts, xlora_depth=depth), tmp_path / "x")
    with pytest.raises(jpeft.AdapterError, match=rf"the classifier is not whole: .*{lost}.*PEFT 0\.21\.2 loses them"):
        load_peft_xlora(folder, params)


def test_peft_writes_base_weights_where_experts_belong(base, params, experts, tmp_path):
    made = peft_xlora(base, experts)
    folder = peft_twins.save(made, tmp_path / "x")
    save_file({k: v for k, v in made.state_dict().items() if CLASSIFIER in k}, folder / "adapter_model.safetensors")
    with pytest.raises(jpeft.AdapterError, match=r"expert '0' does not load: .*parts of the base model.* came from"):
        load_peft_xlora(folder, params)
    given = load_peft_xlora(folder, params, experts={f"mine/{i}": path for i, path in enumerate(experts)})
    assert given.names == ("mine/0", "mine/1", "mine/2")
    assert difference(run(base, params, given)[0].logits, torch_logits(made)) <= 1e-4


# The historic bugs, with PEFT run beside


def test_experts_of_any_name_on_different_targets(base, params, experts, tmp_path):
    """Peft #2485, one expert on q and v, another on q, k and v: under these names PEFT 0.21.2 still fails."""
    names = ["z", "a", "self_attn"]
    made = peft_xlora(base, experts)
    with pytest.raises(KeyError):
        torch_logits(peft_xlora(base, experts, names))
    folder = whole_folder(made, experts, tmp_path / "x")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["adapters"] = dict.fromkeys(sorted(names), "elsewhere")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(jpeft.AdapterError, match=r"called 'a', 'self_attn', 'z', sorted, so that their order"):
        load_peft_xlora(folder, params)
    mixture = load_peft_xlora(folder, params, experts=dict(zip(names, experts, strict=True)))
    assert mixture.names == ("z", "a", "self_attn")
    assert difference(run(base, params, mixture)[0].logits, torch_logits(made)) <= 1e-4
    switched = xlora.select(mixture, ["self_attn", "z", "a"])
    np.testing.assert_allclose(
        run(base, params, switched)[0].logits, run(base, params, mixture)[0].logits, rtol=0, atol=1e-4
    )


def bare_llama(**options):
    return peft_twins.llama(**options).model


PREFIXES = {
    "model.": (peft_twins.llama, ["q_proj", "down_proj"], "base_model.model.model.layers.0.mlp.down_proj"),
    "transformer.h": (peft_twins.gpt2, ["c_attn", "mlp.c_proj"], "base_model.model.transformer.h.0.attn.c_attn"),
    "bert.": (peft_twins.bert, ["query", "value"], "base_model.model.bert.encoder.layer.0.attention.self.query"),
    "bare": (bare_llama, ["q_proj", "down_proj"], "base_model.model.layers.0.mlp.down_proj"),
}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_experts_of_any_prefix_load_by_their_exact_path(tmp_path, prefix):
    """Peft #2132: PEFT makes every key begin with `model.model.`; it fails on GPT-2 and on models without a head.

    One expert has the scaling 1 whatever the classifier says, so the mixture is that LoRA.
    """
    make, targets, begins = PREFIXES[prefix]
    module = peft_twins.base(make)
    module.config.use_cache = False
    made = peft_twins.adapted(module, 1, r=2, target_modules=targets)
    folder = peft_twins.save(made, tmp_path / "expert")
    assert any(key.startswith(begins) for key in load_file(folder / "adapter_model.safetensors"))
    if prefix != "model.":
        with pytest.raises(ValueError, match="Got unexpected keys"):
            peft_xlora(module, [folder], task_type=None)
    params = params_from_torch(module)
    spec = xlora.XLoRA(depth=2, hidden=8)
    mixture = xlora.init(jax.random.key(0), spec, {"lora": load_peft(folder, params)}, features=32)
    with torch.no_grad():
        expected = made(input_ids=torch.as_tensor(IDS))[0]
    output, scalings = run(module, params, mixture)
    assert np.ptp(scalings) == 0
    found = output.last_hidden_state if output.logits is None else output.logits
    assert difference(found, expected) <= 1e-5 * float(expected.abs().max())


def test_experts_of_another_prefix_are_refused(params, tmp_path):
    """A LoRA of the model without its head is not guessed into the model with it."""
    bare = peft_twins.base(bare_llama)
    folder = peft_twins.save(peft_twins.adapted(bare, 1, r=2, target_modules=["q_proj"]), tmp_path / "expert")
    with pytest.raises(jpeft.AdapterError, match=r"base_model\.model\.layers\.0.* fits no param"):
        load_peft(folder, params)


# Folders that are wrong


def edited(folder, **changes):
    file = folder / "adapter_config.json"
    config = {key: value for key, value in (json.loads(file.read_text()) | changes).items() if value is not ...}
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"peft_type": "LORA"}, r"expected 'XLORA', found 'LORA'; use jpeft_interop\.load_peft"),
        ({"peft_type": "y" * 900_000}, "expected 'XLORA', found 'yyy"),
        ({"mixing": 1}, "options that are not known here: mixing"),
        ({"xlora_depth": "2"}, "'xlora_depth': expected int, found '2'"),
        ({"xlora_depth": 0}, "depth must be an integer >= 1"),
        ({"enable_softmax_topk": True}, "top_k is None"),
        ({"softmax_temperature": 10**400}, "temperature must be greater than 0; found 1000"),
        ({"softmax_temperature": 1e-60}, "temperature must be greater than 0; found 1e-60"),
        ({"global_scaling_weight": 10**4_000}, "global_weight must be a finite number"),
        ({"hidden_size": 10**4_000}, r"weight of dense layer 0: expected \(3, 1000"),
        ({"hidden_size": 31}, r"weight of dense layer 0: expected \(3, 31\), found \(3, 32\)"),
        ({"hidden_size": ...}, "'hidden_size': expected int, found None"),
        ({"top_k_lora": 4}, "top 4 needs at least 4 experts; found 3"),
        ({"adapters": {"0": "", "1": ""}}, "the classifier has 3 outputs; 2 experts need 2"),
        ({"adapters": {"0": "", "1": "", "2": "", "3": ""}}, "expert '3' is not there"),
        ({"adapters": {str(k): "" for k in range(257)}}, "'adapters': expected at most 256, found 257"),
        ({"adapters": {"x" * 900_000: ""}}, "the experts are called 'xxx"),
        ({"layerwise_scalings": True}, "no file tells; give it"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_configs_that_do_not_fit(whole, params, tmp_path, changes, told):
    shutil.copytree(whole, tmp_path / "x")
    edited(tmp_path / "x", **changes)
    with pytest.raises(jpeft.AdapterError, match=told) as caught:
        load_peft_xlora(tmp_path / "x", params)
    assert len(str(caught.value)) < 2_000


@pytest.mark.parametrize(
    ("layerwise", "told"),
    [
        (False, "has 3 outputs; 2 experts need 2$"),
        (True, "has 3 outputs; 2 experts need 2, or so many for each module"),
    ],
)
def test_experts_are_counted_before_they_are_read(whole, params, tmp_path, layerwise, told):
    shutil.copytree(whole, tmp_path / "x")
    edited(tmp_path / "x", adapters={"0": "", "1": ""}, layerwise_scalings=layerwise)
    (tmp_path / "x" / "0" / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(jpeft.AdapterError, match=told):
        load_peft_xlora(tmp_path / "x", params)


def test_experts_that_are_links_to_one(whole, params, tmp_path):
    folder = tmp_path / "x"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "1")
    (folder / "1").symlink_to("0")
    with pytest.raises(jpeft.AdapterError, match="'1' and '0' are links to one; expected each for itself"):
        load_peft_xlora(folder, params)


@pytest.mark.parametrize(
    ("dtype", "told"),
    [
        (torch.float64, "which JAX would cast to float32 here"),
        (torch.int64, "expected floats, found int64"),
        (torch.bool, "expected floats, found bool"),
        (torch.complex64, "expected floats, found complex64"),
    ],
    ids=str,
)
@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_a_classifier_of_another_dtype(whole, params, tmp_path, leaf, dtype, told):
    folder = tmp_path / "x"
    shutil.copytree(whole, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    changed = {key: value.to(dtype) if key.endswith(leaf) else value for key, value in tensors.items()}
    save_file(changed, folder / "adapter_model.safetensors")
    with pytest.raises(jpeft.AdapterError, match=f"'{leaf} of dense layer 0'.*{told}"):
        load_peft_xlora(folder, params)


@pytest.fixture(scope="module")
def whole(base, experts, tmp_path_factory):
    return whole_folder(peft_xlora(base, experts), experts, tmp_path_factory.mktemp("whole") / "x")


def test_folders_with_other_things(whole, params, tmp_path):
    with pytest.raises(jpeft.AdapterError, match=r"no adapter_config\.json there"):
        load_peft_xlora(tmp_path, params)
    folder = tmp_path / "x"
    shutil.copytree(whole, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({**tensors, "base_model.other": torch.ones(1)}, folder / "adapter_model.safetensors")
    with pytest.raises(jpeft.AdapterError, match=r"'base_model\.other' is none of the classifier's"):
        load_peft_xlora(folder, params)
    save_file({key: value * torch.nan for key, value in tensors.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(jpeft.AdapterError, match="'weight of dense layer 0' holds values that are not finite"):
        load_peft_xlora(folder, params)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"lora_bias": True}, r"expert '0' has biases on B"),
        ({"modules_to_save": ["norm"]}, "expert '0' replaces 'model/layers/0/input_layernorm/weight' whole"),
        ({"use_dora": True}, "expert '0'.*(?i:dora)"),
    ],
)
def test_experts_that_would_be_another_mixture(base, whole, params, tmp_path, options, told):
    folder = tmp_path / "x"
    shutil.copytree(whole, folder)
    made = peft_twins.adapted(base, 5, r=2, target_modules=["q_proj"], **options)
    peft_twins.save(made, folder / "0")
    with pytest.raises(jpeft.AdapterError, match=told):
        load_peft_xlora(folder, params)


def test_an_order_that_lacks_a_module(base, experts, params, tmp_path):
    folder = whole_folder(peft_xlora(base, experts, layerwise_scalings=True), experts, tmp_path / "x")
    order = [name for name, _ in base.named_modules() if not name.endswith("0.self_attn.k_proj")]
    with pytest.raises(jpeft.AdapterError, match=r"missing: \['model\.layers\.0\.self_attn\.k_proj'\]"):
        load_peft_xlora(folder, params, order=order)


def test_peft_merges_what_cannot_be(base, experts, params, whole):
    """PEFT's merge_and_unload gives a model that is another one; here it is refused."""
    mixture = load_peft_xlora(whole, params)
    with pytest.raises(TypeError, match="so no single weight does it"):
        jpeft.merge(params, mixture)
