"""infer_layout: found unaided on the trees that people have, proven, and refused where it is not so."""

import jax
import numpy as np
import pytest

import jpeft
from jpeft.errors import WeightsError
from jpeft_interop import Layout, Place, load_layout, save_layout
from jpeft_interop.infer import infer_layout
from tiny_llama_tree import BF16, HEAD, LAYERS, VOCAB, WIDTH, cast, stacked, state_dict


def array(*shape) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def require_exact(layout: Layout, params, state) -> None:
    made = layout.arrays(params)
    assert made.keys() == state.keys()
    assert all(np.array_equal(made[key], state[key]) for key in state)


def changed(state, key: str):
    wrong = state[key].copy()
    wrong.reshape(-1).view(np.uint32)[5] ^= 1
    return state | {key: wrong}


def test_heads_rope_stacks_and_fused_weights_of_an_untrained_model():
    state = state_dict()
    params = stacked(state)
    layout = infer_layout(params, state)
    require_exact(layout, params, state)
    said = {path: (place.axes, place.torch[0].axes) for path, place in layout.items()}
    assert said["layers/attn/q/kernel"] == ("l d n (half two)", "(n two half) d")
    assert said["layers/attn/q/bias"] == ("l n (half two)", "(n two half)")  # zeros: as the kernel beside it
    assert said["layers/attn/kv/kernel"] == ("l (k + v) d n (half two)", "(k n two half) d")
    assert said["layers/mlp/gate_up"] == ("l d (gate + up)", "gate d")
    assert layout["embed/embedding"].torch[0].kind == "embedding"
    assert layout["layers/input_layernorm/scale"].torch[0].key == "model.layers.{l}.input_layernorm.weight"


@pytest.mark.parametrize("axis", [0, 1])
def test_stacks_on_any_axis_and_both_ways_of_rounding(axis):
    state = state_dict()
    params = stacked(state, axis)
    for mine, theirs in ((params, state), (cast(params), cast(state)), (params, cast(state)), (cast(params), state)):
        layout = infer_layout(mine, theirs)
        require_exact(layout, params, state)


def test_a_layout_is_kept_as_a_file_and_serves_without_the_base(tmp_path):
    state = state_dict()
    params = stacked(state)
    save_layout(tmp_path / "layout.json", infer_layout(params, state))
    require_exact(load_layout(tmp_path / "layout.json"), params, state)


def test_torch_tensors_files_and_nnx(tmp_path):
    import torch
    from flax import nnx

    from jpeft_interop.safetensors_file import write_safetensors

    model = nnx.Linear(WIDTH, 6, rngs=nnx.Rngs(0))
    kernel = np.asarray(model.kernel.get_value())
    state = {"up.weight": kernel.T, "up.bias": np.asarray(model.bias.get_value())}
    write_safetensors(tmp_path / "model.safetensors", state)
    tensors = {key: torch.from_numpy(np.array(tensor)).to(torch.bfloat16) for key, tensor in state.items()}
    for theirs in (tensors, tmp_path, tmp_path / "model.safetensors"):
        layout = infer_layout(nnx.state(model), theirs)
        assert layout["kernel"].torch[0].kind == "linear"
        assert np.array_equal(layout.arrays(nnx.state(model))["up.weight"], kernel.T)
    with pytest.raises(WeightsError, match="a state dict, or the path"):
        infer_layout(nnx.state(model), 3)  # pyright: ignore[reportArgumentType]


def test_a_fused_torch_tensor_whose_parts_are_leaves():
    state = state_dict()
    params = stacked(state)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}.self_attn."
        for end in ("weight", "bias"):
            state[f"{at}qkv_proj.{end}"] = np.concatenate([state.pop(f"{at}{part}_proj.{end}") for part in "qkv"])
    layout = infer_layout(params, state)
    require_exact(layout, params, state)
    assert layout["layers/attn/q/kernel"].torch[0].axes == "(n two half + 16) d"


def test_experts_apart_and_stacked_in_torch():
    gate, up, down = array(2, 4, 6, 10), array(2, 4, 6, 10) + 1, array(2, 4, 10, 6) + 2
    params = {"gate": gate, "up": up, "down": down}
    apart = {
        f"layers.{layer}.experts.{expert}.{name}.weight": tensor[layer, expert].T
        for name, tensor in (("w1", gate), ("w3", up), ("w2", down))
        for layer in range(2)
        for expert in range(4)
    }
    layout = infer_layout(params, apart)
    require_exact(layout, params, apart)
    assert layout["gate"].torch[0].key == "layers.{l}.experts.{e}.w1.weight" and layout["gate"].axes.startswith("l e ")
    fused = {
        f"layers.{layer}.experts.{name}": tensor
        for layer in range(2)
        for name, tensor in (
            ("gate_up_proj", np.concatenate([gate[layer], up[layer]], -1).swapaxes(1, 2)),
            ("down_proj", down[layer].swapaxes(1, 2)),
        )
    }
    layout = infer_layout(params, fused)
    require_exact(layout, params, fused)
    assert layout["gate"].torch[0].kind == "experts"
    assert layout.kernels["gate"].batch == (0, 1)


def test_tied_missing_and_copied_heads():
    state = state_dict()
    params = stacked(state)
    embedding = state["model.embed_tokens.weight"]
    tied = state | {"lm_head.weight": embedding}
    layout = infer_layout(params, tied)
    require_exact(layout, params, tied)
    assert {tensor.key for tensor in layout["embed/embedding"].torch} == {"model.embed_tokens.weight", "lm_head.weight"}
    copied = params | {"lm_head": {"kernel": embedding.T}}
    require_exact(infer_layout(copied, tied), copied, tied)
    with pytest.raises(WeightsError, match="'lm_head/kernel' holds what 'model.embed_tokens.weight' does"):
        infer_layout(copied, state)
    infer_layout(copied, state, ignore=["lm_head/*"])


def test_padded_vocabularies():
    state = state_dict()
    params = stacked(state)
    embedding = state["model.embed_tokens.weight"]
    padded = np.concatenate([embedding, np.zeros((3, WIDTH), np.float32)])
    there = state | {"model.embed_tokens.weight": padded}
    layout = infer_layout(params, there)
    require_exact(layout, params, there)
    here = params | {"embed": {"embedding": padded}}
    layout = infer_layout(here, state)
    require_exact(layout, here, state)
    assert layout["embed/embedding"].axes == f"({layout['embed/embedding'].axes[1]} + 3) d"
    assert layout["embed/embedding"].shape == (VOCAB + 3, WIDTH)
    ones = params | {"embed": {"embedding": np.concatenate([embedding, np.ones((3, WIDTH), np.float32)])}}
    with pytest.raises(WeightsError, match="'embed/embedding'.*holds values that no tensor has, 72 in all"):
        infer_layout(ones, state)


@pytest.mark.parametrize("scale", [HEAD**-0.5, 10**-0.5, 1.2345])
def test_scales_folded_into_a_leaf(scale):
    params = {"q": (array(WIDTH, 6, 10) * np.float32(scale)).astype(np.float32)}
    state = {"q.weight": array(WIDTH, 6, 10).reshape(WIDTH, 60).T}
    layout = infer_layout(params, state)
    assert layout["q"].scale == pytest.approx(scale, rel=1e-6)
    assert np.allclose(layout.arrays(params)["q.weight"], state["q.weight"], rtol=3e-7, atol=0)


def test_norms_that_torch_keeps_as_a_distance_from_one():
    weight = 0.1 * array(64)
    layout = infer_layout({"norm": {"scale": 1 + weight}}, {"norm.weight": weight})
    assert (layout["norm/scale"].offset, layout["norm/scale"].scale) == (1.0, 1.0)
    assert infer_layout({"norm": {"scale": weight - 1}}, {"norm.weight": weight})["norm/scale"].offset == -1.0


def test_equal_layers_are_told_apart_by_their_numbers():
    state = state_dict()
    same = {key: state[key.replace(".1.", ".0.")] for key in state}
    params = stacked(same)
    require_exact(infer_layout(params, same), params, same)


def test_what_names_and_neighbours_do_not_tell_is_refused():
    state = state_dict()
    with pytest.raises(WeightsError, match=r"input_layernorm.*are equal and could each be any of.*alpha/scale"):
        infer_layout(stacked(state, norms=("alpha", "beta")), state)
    square = {"a": {"kernel": np.zeros((4, 4), np.float32)}}
    with pytest.raises(WeightsError, match="too many are equal to tell the order"):
        infer_layout(square, {"a.weight": np.zeros((4, 4), np.float32)})


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.2.self_attn.q_proj.bias",
        "model.embed_tokens.weight",
        "model.norm.weight",
    ],
)
def test_one_bit_changed_is_refused_with_the_tensors_name(key):
    state = state_dict()
    with pytest.raises(
        WeightsError, match=rf"'{key}' fits '\S+', but 1 of \d+ values differ, the first at \[(0, )?5\]"
    ):
        infer_layout(stacked(state), changed(state, key))


def test_another_tensor_in_its_place_is_refused():
    state = state_dict()
    key = "model.layers.1.self_attn.q_proj.weight"
    with pytest.raises(WeightsError, match=f"'{key}' fits 'layers/attn/q/kernel', but 576 of 576 values differ"):
        infer_layout(stacked(state), state | {key: array(*state[key].shape)})


def test_a_tolerance_allows_other_roundings():
    state = state_dict()
    params = stacked(state)
    key = "model.layers.1.mlp.down_proj.weight"
    near = changed(state, key)
    with pytest.raises(WeightsError, match="1 of 960 values differ"):
        infer_layout(params, near)
    require_exact(infer_layout(params, near, tolerance=1e-6), params, state)


def test_buffers_and_leaves_without_counterpart():
    state = state_dict() | {"rotary.inv_freq": array(4), "position_ids": np.arange(4)}
    params = stacked(state) | {"lora": {"a": array(4, 3)}}
    with pytest.raises(WeightsError, match=r"no tensor holds 'lora/a' \(4, 3\).*no leaf holds 'rotary.inv_freq'"):
        infer_layout(params, state)
    layout = infer_layout(params, state, ignore=["*inv_freq", "lora/*"])
    assert "lora/a" not in layout and "position_ids" not in layout.by_key
    counted = stacked(state) | {"step": np.int32(3), "key": jax.random.key(0)}
    with pytest.raises(WeightsError, match=r"no tensor holds 'step'|no tensor holds 'key'"):
        infer_layout(counted, state, ignore=["*inv_freq"])
    infer_layout(counted, state, ignore=["*inv_freq", "step", "key"])


def test_an_order_that_no_layout_says_is_refused():
    both = array(6, 5)
    state = {"a.weight": both[::2].copy(), "b.weight": both[1::2].copy()}
    with pytest.raises(WeightsError, match="no layout can say: .* takes every 2th index of axis 0"):
        infer_layout({"ab": both}, state)


def test_the_geometry_says_what_a_tensor_is():
    kernel = array(5, 8)
    geometry = jpeft.kernels(lambda params, x: x @ params["w"], {"w": kernel}, array(2, 5))
    for tensor, kind in ((kernel.T, "linear"), (kernel, "conv1d")):
        assert infer_layout({"w": kernel}, {"some.weight": tensor}, kernels=geometry)["w"].torch[0].kind == kind
    assert infer_layout({"w": kernel}, {"h.0.mlp.c_fc.weight": kernel})["w"].torch[0].kind == "conv1d"


def draw_place(generator: np.random.Generator, name: str) -> tuple[Place, tuple[int, ...]]:
    """A random order of the axes, split anywhere on either side; the first is perhaps a number in the key."""
    names = list("abcde")[: generator.integers(2, 6)]
    sizes = {axis: int(generator.integers(2, 8)) for axis in names}
    numbered = bool(generator.integers(2)) and len(names) > 2
    mine, theirs = (_cut(generator, generator.permutation(part)) for part in (names, names[numbered:]))
    key = f"m.{{a}}.{name}.weight" if numbered else f"m.{name}.weight"
    shape = tuple(int(np.prod([sizes[axis] for axis in part.split()])) for part in mine)
    text = lambda parts: " ".join(f"({part})" if " " in part else part for part in parts)
    return Place.of(text(mine), {key: text(theirs)}, **sizes), shape


def _cut(generator: np.random.Generator, names) -> list[str]:
    count = generator.integers(1, len(names) + 1)
    cuts = sorted(generator.choice(np.arange(1, len(names)), count - 1, replace=False))
    return [" ".join(part) for part in np.split(names, cuts)]


@pytest.mark.parametrize("seed", range(40))
def test_any_layout_is_found_again(seed):
    generator = np.random.default_rng(seed)
    drawn = {f"w{n}x": draw_place(generator, f"w{n}x") for n in range(4)}
    params = {path: generator.standard_normal(shape).astype(np.float32) for path, (_, shape) in drawn.items()}
    state = Layout.of(params, {path: place for path, (place, _) in drawn.items()}).arrays(params)
    require_exact(infer_layout(params, state), params, state)


def test_dtypes_of_one_leaf_may_differ_from_the_rest():
    params = {"a": array(6, 8).astype(BF16), "b": array(6, 9)}
    state = {"a.weight": params["a"].T, "b.weight": params["b"].T}
    require_exact(infer_layout(params, state), params, state)
