"""Bugs that were reported of PEFT, each in jpeft's terms, with PEFT beside it where it still fails.

X-LoRA's reports (peft #2485, #2132) are in test_xlora_peft.py.
"""

import copy
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import jpeft
from agreement import perturbed
from jpeft.tree import flatten
from jpeft_interop import load_peft, params_from_torch, save_peft
from jpeft_interop.adapter_folders import load_adapters, save_adapters
from jpeft_interop.models import build, pure
from peft_twins import SIZES, base, gpt2, llama

WEIGHTS = "adapter_model.safetensors"
IDS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


@pytest.fixture(scope="module")
def module():
    return base(llama, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def params(module):
    return params_from_torch(module)


def forward_of(module):
    model = nnx.eval_shape(lambda: build(module.config.to_dict(), architecture="LlamaForCausalLM"))
    function, _ = pure(model)
    return jax.jit(lambda params: function(params, IDS).logits)


@pytest.fixture(scope="module")
def forward(module):
    return forward_of(module)


@pytest.fixture(scope="module")
def kernels(forward, params):
    return jpeft.kernels(forward, params)


def new(params, kernels, seed=0, spec=None):
    spec = jpeft.LoRA(rank=2, alpha=4) if spec is None else spec
    return perturbed(jpeft.init(jax.random.key(seed), spec, params, kernels=kernels), seed)


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def close(found, expected, tolerance=1e-5):
    found, expected = np.asarray(found), np.asarray(expected)
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def lifted(forward):
    return jax.jit(jpeft.lift(forward))


def quietly(call, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **options)


def test_peft_2390_two_all_linear_adapters_on_one_model(forward, params, kernels, module, tmp_path):
    """The second never sees the first: targets are resolved on the base, of which an adapter is no part."""
    adapters = {"first": new(params, kernels), "second": new(params, kernels, 1)}
    assert [s.path for s in adapters["first"].sites] == [s.path for s in adapters["second"].sites]
    assert len(adapters["first"].sites) == 14
    save_adapters(tmp_path / "ours", adapters, params=params)
    for name, adapter in adapters.items():
        keys = load_file(tmp_path / "ours" / name / WEIGHTS).keys()
        assert all(key.count("base_model.model.") == 1 and key.count("lora_") == 1 for key in keys)
        same(load_adapters(tmp_path / "ours", params)[name].trained, adapter.trained)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")
    nested = peft.get_peft_model(copy.deepcopy(module), config)
    nested = quietly(peft.get_peft_model, nested, config, adapter_name="second")  # still nests prefixes in 0.21.2
    quietly(nested.save_pretrained, tmp_path / "theirs")
    theirs = next((tmp_path / "theirs").rglob(WEIGHTS))
    assert all("base_model.model.base_model.model." in key for key in load_file(theirs))


def test_an_adapter_on_the_result_of_apply_or_attach(forward, params, kernels):
    """Applying twice is arithmetic on plain params; attaching to what has one attached is refused."""
    a, b = new(params, kernels), new(params, kernels, 1)
    twice = jpeft.apply(jpeft.apply(params, a), b)
    assert flatten(twice).keys() == flatten(params).keys()
    close(forward(twice), forward(jpeft.apply(params, [a, b])))
    again = jpeft.init(jax.random.key(2), b.spec, twice, kernels=kernels)
    assert [site.path for site in again.sites] == [site.path for site in b.sites]
    with pytest.raises(jpeft.KernelError, match="has an adapter attached; attach all at once"):
        jpeft.attach(jpeft.attach(params, a), b)
    with pytest.raises(jpeft.KernelError):
        jpeft.init(jax.random.key(2), b.spec, jpeft.attach(params, a), kernels=kernels)


NAMES = ["lora", "lora_", "lora_A", "ia3", "self_attn", "layers", "model", "0", "weight", "default", "base_layer"]
NAMES += ["q_proj", "A-1", "x" * 64]


@pytest.mark.parametrize("name", NAMES)
def test_peft_2699_an_adapters_name_changes_no_file(name, params, kernels, forward, tmp_path):
    """peft #2699, #3584: any name round-trips exactly next to another adapter, whose file it does not touch."""
    adapters = {name: new(params, kernels), "other": new(params, kernels, 1)}
    save_adapters(tmp_path / "a", adapters, params=params)
    back = load_adapters(tmp_path / "a", params)
    assert back.keys() == adapters.keys()
    for key, adapter in adapters.items():
        same(back[key].trained, adapter.trained)
    save_peft(tmp_path / "alone", adapters["other"], params=params)
    assert (tmp_path / "alone" / WEIGHTS).read_bytes() == (tmp_path / "a" / "other" / WEIGHTS).read_bytes()
    close(forward(jpeft.apply(params, back)), forward(jpeft.apply(params, adapters)))


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "a/b", "/a", "a\\b", "a\0b", "adapter_config.json", "x" * 65, "a b", "名前", "a\n"],
)
def test_names_that_no_folder_can_have_are_refused_before_anything_is_written(name, params, kernels, tmp_path):
    with pytest.raises(jpeft.AdapterError, match="can't be saved under the name .*nothing was written"):
        save_adapters(tmp_path / "a", {"good": new(params, kernels), name: new(params, kernels)}, params=params)
    assert not (tmp_path / "a").exists()


def test_peft_3584_beside_a_name_of_a_path_part_peft_still_loses_keys(module, tmp_path):
    """What the names above guard against: PEFT 0.21.2 writes a truncated file for the *other* adapter, in silence."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(copy.deepcopy(module), config)
    quietly(model.add_adapter, "self_attn", config)
    quietly(model.save_pretrained, tmp_path)
    with safe_open(tmp_path / WEIGHTS, "np") as file:
        assert len(list(file.keys())) < 2 * SIZES["num_hidden_layers"]


def test_peft_2699_keys_filtered_by_hand(params, kernels, tmp_path):
    """The reporter kept only keys with 'lora' in them: that is every key of a file, and no name is among them."""
    adapter = new(params, kernels)
    save_adapters(tmp_path, {"lora": adapter}, params=params)
    file = tmp_path / "lora" / WEIGHTS
    kept = {key: tensor for key, tensor in load_file(file).items() if "lora" in key}
    save_file(kept, file, {"format": "pt"})
    same(load_peft(tmp_path / "lora", params).trained, adapter.trained)


def test_peft_1539_a_budget_that_prunes_whole_layers_saved_and_loaded(forward, params, kernels, tmp_path):
    """Rank 0 in some kernels: through training, pruning, the native file and a PEFT folder."""
    spec = jpeft.AdaLoRA(rank=2, target_rank=0, total_steps=12, alpha=8, targets=["q_proj", "v_proj", "down_proj"])
    adapter = new(params, kernels, spec=spec)
    optimizer = jpeft.adalora(optax.adam(0.05), adapter)
    loss = lambda trained: (jpeft.lift(forward)(jpeft.attach(params, adapter.replace(trained=trained))) ** 2).mean()

    @jax.jit
    def step(trained, state):
        updates, state = optimizer.update(jax.grad(loss)(trained), state, trained)
        return optax.apply_updates(trained, updates), state

    trained, state = adapter.trained, optimizer.init(adapter.trained)
    for _ in range(5):  # before the budget is 0
        trained, state = step(trained, state)
    for path in list(trained)[:2]:  # and two layers lose all they have
        trained = trained | {path: trained[path] | {"e": jnp.zeros_like(trained[path]["e"])}}
    pruned = jpeft.prune(adapter.replace(trained=trained))
    ranks = {site.path: site.rank for site in pruned.sites}
    assert 0 in ranks.values() and max(ranks.values()) > 0
    expected = forward(jpeft.apply(params, adapter.replace(trained=trained)))
    jpeft.save(tmp_path / "native.safetensors", pruned)
    save_peft(tmp_path / "folder", pruned, params=params)
    for back in (jpeft.load(tmp_path / "native.safetensors"), load_peft(tmp_path / "folder", params)):
        assert {site.path: site.rank for site in back.sites} == ranks
        close(forward(jpeft.merge(params, back)), expected)
        close(lifted(forward)(jpeft.attach(params, back)), expected)


def test_rank_0_everywhere_is_the_base(forward, params, kernels, tmp_path):
    adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=0), params, kernels=kernels)
    jpeft.save(tmp_path / "a.safetensors", adapter)
    back = jpeft.load(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(lifted(forward)(jpeft.attach(params, back)), forward(params))
    same(jpeft.merge(params, back), params)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_prefixes_of_an_inner_model_are_exact_or_refused(count, params, kernels, tmp_path):
    """peft #2132 and kin: `base_model.model.` is taken off once; what follows is a path that is there, or an error."""
    adapter = new(params, kernels)
    save_peft(tmp_path, adapter, params=params)
    tensors = load_file(tmp_path / WEIGHTS)
    prefix = "base_model.model."
    renamed = {prefix * count + key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    save_file(renamed, tmp_path / WEIGHTS, {"format": "pt"})
    if count == 1:
        same(load_peft(tmp_path, params).trained, adapter.trained)
    else:
        with pytest.raises(jpeft.AdapterError, match="base_model.model"):
            load_peft(tmp_path, params)


def test_models_without_an_inner_model_prefix(tmp_path):
    """`transformer.h` models, and bare inner models."""
    for number, module in enumerate((base(gpt2), base(llama).model)):
        params = params_from_torch(module)
        names = {0: ["c_attn", "c_fc"], 1: ["q_proj", "up_proj"]}[number]
        adapter = perturbed(jpeft.init(jax.random.key(0), jpeft.LoRA(rank=2, targets=names), params))
        save_peft(tmp_path / str(number), adapter, params=params)
        same(load_peft(tmp_path / str(number), params).trained, adapter.trained)
        theirs = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(module), tmp_path / str(number))
        merged = params_from_torch(theirs.merge_and_unload())
        for path, leaf in flatten(jpeft.merge(params, adapter)).items():
            np.testing.assert_allclose(flatten(merged)[path], leaf, atol=1e-6)


def test_a_tied_embedding_is_adapted_once_and_merged_once():
    module = base(llama, tie_word_embeddings=True)
    params = params_from_torch(module)
    forward = forward_of(module)
    kernels = jpeft.kernels(forward, params)
    adapter = new(params, kernels, spec=jpeft.LoRA(rank=2, targets=["embed_tokens"]))
    assert [site.path for site in adapter.sites] == ["model/embed_tokens/embedding"]
    merged = forward(jpeft.merge(params, adapter))
    close(lifted(forward)(jpeft.attach(params, adapter)), merged)
    assert np.abs(merged - forward(params)).max() > 1e-2


@pytest.mark.parametrize(
    "specs",
    [
        (jpeft.LoRA(rank=2), jpeft.LoRA(rank=3, rank_stabilized=True)),
        (jpeft.LoRA(rank=2), jpeft.AdaLoRA(rank=3, target_rank=1)),
        (jpeft.DoRA(rank=2), jpeft.LoRA(rank=2)),
        (jpeft.IA3(), jpeft.LoRA(rank=2)),
        (jpeft.IA3(targets=["v_proj"]), jpeft.DoRA(rank=2)),
    ],
    ids=lambda specs: "+".join(spec.method for spec in specs),
)
def test_two_active_adapters_agree_in_every_way_and_order(specs, forward, params, kernels):
    a, b = (new(params, kernels, seed, spec) for seed, spec in enumerate(specs))
    expected = forward(jpeft.apply(params, [a, b]))
    for order in ([a, b], [b, a]):
        close(lifted(forward)(jpeft.attach(params, order)), expected)
        close(forward(jpeft.merge(params, order)), expected)


def test_base_weights_in_an_adapters_file_never_change_the_base(params, kernels, tmp_path):
    """A file that brings along base weights: the same ones are taken note of, others are refused."""
    adapter = new(params, kernels, spec=jpeft.LoRA(rank=2, targets=["q_proj", "embed_tokens"]))
    save_peft(tmp_path, adapter, params=params)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    tensors = load_file(tmp_path / WEIGHTS)
    np.testing.assert_array_equal(tensors[key], params["model"]["embed_tokens"]["embedding"])
    same(load_peft(tmp_path, params).trained, adapter.trained)
    save_file(tensors | {key: tensors[key] + 1}, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(jpeft.AdapterError, match="is the base's own weight .*, and differs"):
        load_peft(tmp_path, params)
    stray = {"base_model.model.model.layers.0.self_attn.k_proj.weight": tensors[key][:16, :32].copy()}
    save_file(tensors | stray, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(jpeft.AdapterError, match="k_proj"):
        load_peft(tmp_path, params)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None


def test_adapters_of_a_peft_model_that_holds_several(module, params, tmp_path):
    """As PEFT writes them: `default` at the root, the others below; each equal to what PEFT merges."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(module), config)
    model.add_adapter("second", config)
    quietly(model.save_pretrained, tmp_path)
    found = load_adapters(tmp_path, params)
    assert set(found) == {"default", "second"}
    for name, adapter in found.items():
        one = copy.deepcopy(model)
        one.set_adapter(name)
        merged = flatten(params_from_torch(one.merge_and_unload(adapter_names=[name])))
        for path, leaf in flatten(jpeft.merge(params, adapter)).items():
            np.testing.assert_allclose(leaf, merged[path], atol=1e-5)
