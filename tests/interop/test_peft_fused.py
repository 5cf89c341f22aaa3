"""Adapters through layouts of every form: what PEFT wrote for the torch model acts the same here, and comes back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from peft import AdaLoraConfig, IA3Config
from safetensors.numpy import load_file

import jpeft
from jpeft_interop import Layout, Place, load_peft, save_peft
from llama_layouts import ATTENTION, LAYOUTS, SIZES, base_here
from peft_twins import adapted, adapted_by, base, llama, load, save

WEIGHTS = "adapter_model.safetensors"


def merged_by_peft(peft_model) -> dict:
    module = peft_model.merge_and_unload()
    return {key: tensor.numpy() for key, tensor in module.state_dict().items()}


def largest(ours: dict, theirs: dict) -> float:
    assert set(ours) <= set(theirs)
    return max(float(np.abs(ours[key] - theirs[key]).max()) for key in ours)


def noisy(adapter: jpeft.Adapter) -> jpeft.Adapter:
    noise = lambda leaf: leaf + 0.1 * np.random.default_rng(leaf.size).standard_normal(leaf.shape).astype(leaf.dtype)
    return adapter.replace(trained=jax.tree.map(noise, adapter.trained))


CONFIGS = {
    "all alike": dict(r=3, lora_alpha=5, target_modules="all-linear"),
    "ranks of their own": dict(
        r=3, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"], use_rslora=True,
        rank_pattern={"0.self_attn.q_proj": 5, "v_proj": 1, "1.mlp.up_proj": 2},
        alpha_pattern={"k_proj": 2.5, "1.self_attn.o_proj": 11},
    ),
    "some parts": dict(r=2, target_modules=["q_proj", "v_proj", "up_proj", "embed_tokens"], lora_alpha=7),
    "one layer": dict(r=2, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"], layers_to_transform=[1]),
    "dora": dict(r=2, use_dora=True, target_modules="all-linear", rank_pattern={"q_proj": 4}),
}  # fmt: skip


@pytest.mark.parametrize("form", LAYOUTS)
@pytest.mark.parametrize("row", CONFIGS)
def test_what_peft_wrote_acts_the_same_and_comes_back(row, form, tmp_path):
    module = base(llama)
    theirs = adapted(module, **CONFIGS[row])
    params, layout = base_here(module, form)
    adapter = load_peft(save(theirs, tmp_path / "theirs"), params, layout=layout)
    expected = merged_by_peft(theirs)
    assert largest(layout.arrays(jpeft.merge(params, adapter)), expected) < 1e-5
    save_peft(tmp_path / "ours", adapter, params=params, layout=layout)
    first, second = load_file(tmp_path / "theirs" / WEIGHTS), load_file(tmp_path / "ours" / WEIGHTS)
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        np.testing.assert_allclose(second[key], tensor, atol=1e-6 if "magnitude" in key else 0, err_msg=key)
    again, _ = load(module, tmp_path / "ours")
    assert largest(merged_by_peft(again), expected) < 1e-6


@pytest.mark.parametrize("form", LAYOUTS)
@pytest.mark.parametrize("spec", [jpeft.LoRA(rank=3, alpha=4), jpeft.DoRA(rank=2)], ids=["lora", "dora"])
def test_an_adapter_made_here_is_the_same_in_peft(form, spec, tmp_path):
    module = base(llama)
    params, layout = base_here(module, form)
    adapter = noisy(jpeft.init(jax.random.key(0), spec, params, layout=layout))
    save_peft(tmp_path / "ours", adapter, params=params, layout=layout)
    loaded, warned = load(module, tmp_path / "ours")
    assert not [message for message in warned if "key" in message.lower()]
    assert largest(layout.arrays(jpeft.merge(params, adapter)), merged_by_peft(loaded)) < 1e-5
    back = load_peft(tmp_path / "ours", params, layout=layout)
    assert jax.tree.structure(back.trained) == jax.tree.structure(adapter.trained)
    assert all(map(np.array_equal, jax.tree.leaves(back.constant), jax.tree.leaves(adapter.constant)))
    if form == "fused":  # the parts share A
        state = load_file(tmp_path / "ours" / WEIGHTS)
        name = "base_model.model.model.layers.0.self_attn.{}_proj.lora_A.weight"
        assert np.array_equal(state[name.format("q")], state[name.format("v")])


@pytest.mark.parametrize("form", LAYOUTS)
def test_ia3_of_parts(form, tmp_path):
    module = base(llama)
    targets = ["k_proj", "v_proj", "down_proj"]
    theirs = adapted_by(module, IA3Config(target_modules=targets, feedforward_modules=["down_proj"]))
    params, layout = base_here(module, form)
    adapter = load_peft(save(theirs, tmp_path / "theirs"), params, layout=layout)
    assert largest(layout.arrays(jpeft.merge(params, adapter)), merged_by_peft(theirs)) < 1e-5
    save_peft(tmp_path / "ours", adapter, params=params, layout=layout)
    first, second = load_file(tmp_path / "theirs" / WEIGHTS), load_file(tmp_path / "ours" / WEIGHTS)
    assert first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


def test_blocks_stay_apart_through_training(tmp_path):
    module = base(llama)
    theirs = adapted(module, r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"0.self_attn.v_proj": 3})
    params, layout = base_here(module, "fused")
    adapter = load_peft(save(theirs, tmp_path / "theirs"), params, layout=layout)

    def loss(trained):
        return sum(
            jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(jpeft.apply(params, adapter.replace(trained=trained)))
        )

    optimizer = optax.adamw(1e-2)
    trained, state = adapter.trained, optimizer.init(adapter.trained)
    for _ in range(3):
        updates, state = optimizer.update(jax.grad(loss)(trained), state, trained)
        trained = optax.apply_updates(trained, updates)
    adapter = adapter.replace(trained=trained)
    merged = layout.arrays(jpeft.merge(params, adapter))
    keys = "model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.q_proj.weight"
    assert np.array_equal(merged[keys[0]], module.state_dict()[keys[0]])
    assert not np.array_equal(merged[keys[1]], module.state_dict()[keys[1]])
    save_peft(tmp_path / "ours", adapter, params=params, layout=layout)
    loaded, _ = load(module, tmp_path / "ours")
    assert largest(merged, merged_by_peft(loaded)) < 1e-5


def test_blocks_are_refused_where_they_are_not_wanted(tmp_path):
    module = base(llama)
    params, layout = base_here(module, "fused")
    folder = save(adapted(module, r=2, target_modules=["q_proj", "k_proj", "v_proj"]), tmp_path / "apart")
    with pytest.raises(jpeft.AdapterError, match="'qkv', and have factors of their own"):
        load_peft(folder, params, layout=layout, blocks=False)
    adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=2, targets=["qkv"]), params, layout=layout)
    save_peft(tmp_path / "shared", noisy(adapter), params=params, layout=layout)
    again = load_peft(tmp_path / "shared", params, layout=layout, blocks=False)
    assert "mask" not in again.constant["qkv"]


def test_what_takes_one_a_for_the_whole_refuses_blocks(tmp_path):
    module = base(llama)
    theirs = adapted(module, r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 3})
    params, layout = base_here(module, "fused")
    adapter = load_peft(save(theirs, tmp_path / "theirs"), params, layout=layout)
    with pytest.raises(jpeft.SpecError, match="'qkv' holds adapters of its own"):
        jpeft.lora_fa(adapter, 1e-3)
    with pytest.raises(jpeft.SpecError, match="'qkv' holds blocks"):
        jpeft.initialize.on_original_base(adapter, adapter)


def test_the_fast_path_and_the_native_file_know_the_mask(tmp_path):
    module = base(llama)
    theirs = adapted(module, r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 3}, lora_alpha=6)
    params, layout = base_here(module, "fused")
    adapter = load_peft(save(theirs, tmp_path / "theirs"), params, layout=layout)
    assert adapter.constant["qkv"]["mask"].shape == (2, 5, 64)
    fn = lambda params, x: jnp.einsum("td,ldo->lto", x, params["qkv"])
    x = np.random.default_rng(0).standard_normal((7, 32)).astype(np.float32)
    only = {"qkv": params["qkv"]}
    found = jpeft.lift(fn)(jpeft.attach(only, adapter), x)
    np.testing.assert_allclose(found, fn(jpeft.apply(only, adapter), x), atol=1e-5)
    jpeft.save(tmp_path / "a.safetensors", adapter)
    again = jpeft.load(tmp_path / "a.safetensors")
    assert jax.tree.all(jax.tree.map(np.array_equal, again, adapter))


def test_what_is_trained_whole_is_whole(tmp_path):
    module = base(llama)
    theirs = adapted(module, r=2, target_modules=["o_proj"], modules_to_save=["norm", "gate_proj", "up_proj"])
    params, layout = base_here(module, "fused")
    adapter = load_peft(save(theirs, tmp_path / "theirs"), params, layout=layout)
    assert largest(layout.arrays(jpeft.merge(params, adapter)), merged_by_peft(theirs)) < 1e-5
    some = adapted(module, r=2, target_modules=["o_proj"], modules_to_save=["gate_proj"])
    with pytest.raises(jpeft.AdapterError, match="a part of 'gate_up', without 'model.layers.0.mlp.up_proj.weight'"):
        load_peft(save(some, tmp_path / "some"), params, layout=layout)


def test_what_is_not_one_adapter_of_the_whole_is_refused(tmp_path):
    module = base(llama)
    params, layout = base_here(module, "fused")
    dora = save(adapted(module, r=2, use_dora=True, target_modules=["q_proj"]), tmp_path / "dora")
    with pytest.raises(jpeft.AdapterError, match="some have no factors: DoRA's magnitudes"):
        load_peft(dora, params, layout=layout)
    config = AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=["q_proj", "k_proj", "v_proj"])
    adalora = save(adapted_by(module, config), tmp_path / "adalora")
    with pytest.raises(jpeft.AdapterError, match="AdaLoRA's penalty and budget"):
        load_peft(adalora, params, layout=layout)
    none = adapted(module, r=2, target_modules=["q_proj", "k_proj"], alpha_pattern={"k_proj": 0})
    with pytest.raises(jpeft.AdapterError, match="some have alpha 0"):
        load_peft(save(none, tmp_path / "none"), params, layout=layout)
    config = IA3Config(target_modules=["gate_proj", "up_proj"], feedforward_modules=["gate_proj", "up_proj"])
    with pytest.raises(jpeft.AdapterError, match="inputs, which are scaled differently"):
        load_peft(save(adapted_by(module, config), tmp_path / "ia3"), params, layout=layout)


def test_weights_that_torch_has_fused(tmp_path):
    """Phi-3's form: one matrix of torch's holds q, k and v, which are leaves here."""
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal((6, size)).astype(np.float32) for name, size in (("q", 4), ("k", 2), ("v", 2))}
    places = {
        "q": Place.of("d q", {"qkv.weight": "(q + 4) d"}),
        "k": Place.of("d k", {"qkv.weight": "(4 + k + 2) d"}),
        "v": Place.of("d v", {"qkv.weight": "(6 + v) d"}),
    }
    layout = Layout.of(params, places)
    adapter = noisy(jpeft.init(jax.random.key(0), jpeft.LoRA(rank=2, alpha=3), params, layout=layout))
    save_peft(tmp_path / "a", adapter, params=params, layout=layout)
    state = load_file(tmp_path / "a" / WEIGHTS)
    assert {key: tensor.shape for key, tensor in state.items()} == {
        "base_model.model.qkv.lora_A.weight": (6, 6),
        "base_model.model.qkv.lora_B.weight": (8, 6),
    }
    again = load_peft(tmp_path / "a", params, layout=layout)
    ours, back = jpeft.merge(params, adapter), jpeft.merge(params, again)
    assert all(np.allclose(ours[name], back[name], atol=1e-6) for name in params)
    shared = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=2), params, layout=layout)
    same = {path: leaves | {"a": shared.trained["q"]["a"]} for path, leaves in noisy(shared).trained.items()}
    save_peft(tmp_path / "b", shared.replace(trained=same), params=params, layout=layout)
    assert load_file(tmp_path / "b" / WEIGHTS)["base_model.model.qkv.lora_A.weight"].shape == (2, 6)


def test_a_layout_misused_writes_nothing(tmp_path):
    module = base(llama)
    params, layout = base_here(module, "scanned")
    adapter = noisy(jpeft.init(jax.random.key(0), jpeft.LoRA(rank=2), params, layout=layout))
    other = {**params, "q": params["q"].reshape(32, 2, 2, 16)}
    with pytest.raises(jpeft.WeightsError, match="another model's layout"):
        save_peft(tmp_path / "a", adapter, params=other, layout=layout)
    heads = dict(layout.places)
    heads["q"] = Place.of(
        "l d n (half two)", {f"{ATTENTION}q_proj.weight": "(n two half) d"}, **{**SIZES, "n": 2, "half": 8}
    )
    with pytest.raises(jpeft.WeightsError, match="another model's layout"):
        save_peft(tmp_path / "a", adapter, params=params, layout=Layout(heads))
    assert not (tmp_path / "a").exists()
    save_peft(tmp_path / "a", adapter, params=params, layout=layout)
    with pytest.raises(jpeft.WeightsError, match="no such leaf"):
        load_peft(tmp_path / "a", params, layout=Layout({"x": layout["q"]}))
