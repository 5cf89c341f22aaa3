"""Params with other names and shapes, and a layout that says where each leaf lies in torch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft_interop import Layout, Place, load_peft, params_from_torch, save_peft
from peft_twins import adapted, base, llama, save

HEADS, HEAD, LAYERS = 4, 8, 2


def stacked_attention():
    """q as (layers, d, heads, head_dim) and o as (heads, layers, head_dim, d), and what einsum does with them."""
    q = jax.random.normal(jax.random.key(0), (LAYERS, 32, HEADS, HEAD))
    o = jax.random.normal(jax.random.key(1), (HEADS, LAYERS, HEAD, 32))

    def forward(params, x):
        for layer in range(LAYERS):
            y = jnp.einsum("td,dhk->thk", x, params["q"]["w"][layer])
            x = x + jnp.einsum("thk,hkd->td", y, params["o"]["w"][:, layer])
        return x

    return forward, {"q": {"w": q}, "o": {"w": o}}


@pytest.fixture
def layout():
    _, params = stacked_attention()
    name = "model.layers.{l}.self_attn."
    return Layout.of(
        params,
        {
            "q/w": Place.of("l d n h", {name + "q_proj.weight": "(n h) d"}),
            "o/w": Place.of("n l h d", {name + "o_proj.weight": "d (n h)"}),
        },
    )


def test_stacked_einsum_kernels_load_what_peft_wrote(tmp_path, layout):
    module = base(llama)
    flat = params_from_torch(module)
    peft_model = adapted(module, r=3, target_modules=["q_proj", "o_proj"], use_rslora=True)
    adapter = load_peft(save(peft_model, tmp_path / "theirs"), flat)
    expected = jpeft.merge(flat, adapter)["model"]["layers"]
    layers = [flat["model"]["layers"][str(i)]["self_attn"] for i in range(LAYERS)]
    params = {
        "q": {"w": jnp.stack([np.reshape(layer["q_proj"]["kernel"], (32, HEADS, HEAD)) for layer in layers])},
        "o": {"w": jnp.stack([np.reshape(layer["o_proj"]["kernel"], (HEADS, HEAD, 32)) for layer in layers], 1)},
    }
    merged = jpeft.merge(params, load_peft(tmp_path / "theirs", params, layout=layout))
    for i in range(LAYERS):
        attention = expected[str(i)]["self_attn"]
        q, o = merged["q"]["w"][i].reshape(32, 32), merged["o"]["w"][:, i].reshape(32, 32)
        np.testing.assert_allclose(q, attention["q_proj"]["kernel"], atol=1e-6)
        np.testing.assert_allclose(o, attention["o_proj"]["kernel"], atol=1e-6)


def test_what_is_saved_with_a_layout_loads_with_it(tmp_path, layout):
    forward, params = stacked_attention()
    kernels = jpeft.kernels(forward, params, jnp.ones((3, 32)))
    adapter = jpeft.init(jax.random.key(3), jpeft.LoRA(rank=2, alpha=3), params, kernels=kernels)
    noisy = jax.tree.map(lambda leaf: leaf + 0.1, adapter.trained)
    adapter = adapter.replace(trained=noisy)
    save_peft(tmp_path / "a", adapter, params=params, layout=layout)
    keys = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert keys["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"].shape == (2, 32)
    assert len(keys) == 2 * 2 * LAYERS
    again = load_peft(tmp_path / "a", params, layout=layout)
    for path, leaves in adapter.trained.items():
        for name, leaf in leaves.items():
            assert np.array_equal(again.trained[path][name], leaf), (path, name)


PLAIN = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}


def stacked_by_hand(folder, factors, **config):
    """A base of stacked matrices (layers, n, n), its layout, and a folder with A and B of each layer."""
    n = factors[0][0].shape[1]
    params = {"q": jax.ShapeDtypeStruct((len(factors), n, n), jnp.float32)}
    places = {"q": Place.of("l i o", {"layers.{l}.q_proj.weight": "o i"}).fit(params["q"].shape, "q")}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN | config))
    key = "base_model.model.layers.{}.q_proj.lora_{}.weight"
    pairs = {key.format(at, name): ab for at, both in enumerate(factors) for name, ab in zip("AB", both, strict=True)}
    save_file(pairs, folder / "adapter_model.safetensors")
    return params, Layout(places)


def test_layers_of_different_dtypes_are_not_cast(tmp_path):
    """One array holds the layers, and 1e6 is an infinity in the dtype of the first."""
    ones = [(np.full((1, 8), 1e6, dtype), np.ones((8, 1), dtype)) for dtype in ("float32", "float32")]
    params, layout = stacked_by_hand(tmp_path / "same", ones)
    assert load_peft(tmp_path / "same", params, layout=layout).trained["q"]["a"].max() == 1e6
    ones[0] = (np.ones((1, 8), np.float16), np.ones((8, 1), np.float16))
    params, layout = stacked_by_hand(tmp_path / "other", ones)
    with pytest.raises(
        jpeft.AdapterError, match="one array holds them, and 'a' is float(16|32) of one, float(16|32) of another"
    ):
        load_peft(tmp_path / "other", params, layout=layout)


@pytest.mark.parametrize("rank", [64, 1024])
def test_one_layers_rank_is_not_everyones(tmp_path, rank):
    """All that are stacked get the greatest rank: a small file could ask for any amount of zeros."""
    factors = [(np.ones((r, 256), np.float32), np.ones((256, r), np.float32)) for r in (rank, *[1] * 63)]
    params, layout = stacked_by_hand(tmp_path / "x", factors, rank_pattern={"layers.0.q_proj": rank})
    if rank == 64:
        assert load_peft(tmp_path / "x", params, layout=layout).trained["q"]["a"].shape == (64, 256, rank)
        return
    with pytest.raises(jpeft.AdapterError, match=r"stacked in 'q' have ranks of up to 1024; .* lower that rank"):
        load_peft(tmp_path / "x", params, layout=layout)


def test_some_layers_of_a_stack(tmp_path, layout):
    forward, params = stacked_attention()
    kernels = jpeft.kernels(forward, params, jnp.ones((3, 32)))
    spec = jpeft.LoRA(rank=2, targets=["q"], layers_to_transform=[1])
    adapter = jpeft.init(jax.random.key(3), spec, params, kernels=kernels)
    save_peft(tmp_path / "a", adapter, params=params, layout=layout)
    keys = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert sorted({key.split(".")[4] for key in keys}) == ["1"]
    again = load_peft(tmp_path / "a", params, layout=layout)
    assert np.array_equal(again.constant["q/w"]["scaling"], adapter.constant["q/w"]["scaling"])
