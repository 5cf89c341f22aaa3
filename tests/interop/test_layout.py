"""Layouts: the notation, both directions of a conversion, and what is refused."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jpeft.errors import WeightsError
from jpeft_interop import Layout, Place, infer_layout, load_layout, save_layout
from jpeft_interop.layout.axes import parse, solve
from jpeft_interop.models.building import build
from jpeft_interop.models.pure import pure

PLACES = {
    "heads and rope": ("l d n (half two)", {"q.{l}.weight": "(n two half) d"}, (2, 6, 3, 10), {"two": 2}),
    "stacked on axis 1": ("n l h d", {"o.{l}.weight": "d (n h)"}, (3, 2, 5, 7), {}),
    "fused": ("d (q + k + v)", {"q.weight": "q d", "k.weight": "k d", "v.weight": "v d"}, (4, 11), {"q": 6, "k": 2}),
    "a pair": ("(k + v) n d h", {"k.weight": "(k n h) d", "v.weight": "(v n h) d"}, (2, 3, 4, 5), {"k": 1}),
    "experts": ("e d f", {"experts.{e}.up.weight": "f d"}, (4, 3, 5), {}),
    "numbers with a stride": ("l d f", {"layers.{l*2+1}.up.weight": "f d"}, (3, 4, 5), {}),
    "two numbers": ("(l e) d f", {"layers.{l}.experts.{e}.weight": "f d"}, (6, 4, 5), {"l": 2}),
    "more rows in torch": ("v d", {"embed.weight": ("(v + 3) d", "embedding")}, (5, 4), {}),
    "a convolution": ("h w i o", {"conv.weight": "o i h w"}, (2, 3, 4, 5), {}),
    "an axis of one": ("d", {"cls": "1 1 d"}, (4,), {}),
}


def array(shape) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


@pytest.mark.parametrize("row", PLACES)
def test_each_direction_is_the_others_inverse(row):
    axes, torch, shape, sizes = PLACES[row]
    params = {"w": array(shape)}
    layout = Layout.of(params, {"w": Place.of(axes, torch, **sizes)})
    state = layout.arrays(params)
    assert sum(tensor.size for tensor in state.values()) >= params["w"].size
    assert np.array_equal(layout.from_torch(state)["w"], params["w"])


def test_the_axes_are_what_the_notation_says():
    leaf = array((2, 6, 3, 10))
    layout = Layout.of({"w": leaf}, {"w": Place.of("l d n (half two)", {"q.{l}.weight": "(n two half) d"}, two=2)})
    expected = leaf[1].reshape(6, 3, 5, 2).transpose(1, 3, 2, 0).reshape(30, 6)
    assert np.array_equal(layout.arrays({"w": leaf})["q.1.weight"], expected)


def test_padding_is_zero_and_goes():
    params = {"e": array((70, 4))}
    layout = Layout.of(params, {"e": Place.of("(v + 6) d", {"embed.weight": ("v d", "embedding")})})
    state = layout.arrays(params)
    assert state["embed.weight"].shape == (64, 4)
    back = np.asarray(layout.from_torch(state)["e"])
    assert np.array_equal(back[:64], params["e"][:64]) and not back[64:].any()


def test_a_scale_is_taken_out_and_put_back():
    params = {"q": array((4, 8))}
    layout = Layout.of(params, {"q": Place.of("d f", {"q.weight": "f d"}, scale=0.25)})
    state = layout.arrays(params)
    assert np.array_equal(state["q.weight"], 4 * params["q"].T)
    assert np.array_equal(layout.from_torch(state)["q"], params["q"])


def test_a_norm_that_torch_keeps_as_its_distance_from_one(tmp_path):
    params = {"norm": np.array([1.5, 0.25, 1.0], np.float32)}
    layout = Layout.of(params, {"norm": Place.of("d", {"norm.weight": "d"}, offset=1.0)})
    state = layout.arrays(params)
    assert state["norm.weight"].tolist() == [0.5, -0.75, 0.0]
    assert np.array_equal(layout.from_torch(state)["norm"], params["norm"])
    save_layout(tmp_path / "layout.json", layout)
    assert load_layout(tmp_path / "layout.json") == layout


def test_two_leaves_in_one_tensor():
    params = {"q": array((4, 6)), "k": array((4, 2))}
    places = {"q": Place.of("d q", {"qkv.weight": "(q + 2) d"}), "k": Place.of("d k", {"qkv.weight": "(6 + k) d"})}
    layout = Layout.of(params, places)
    state = layout.arrays(params)
    assert np.array_equal(state["qkv.weight"], np.concatenate([params["q"], params["k"]], 1).T)
    assert np.array_equal(layout.from_torch(state)["k"], params["k"])


def test_torch_tensors_both_ways_and_dtypes():
    import torch

    params = {"up": jnp.asarray(array((4, 6)), jnp.bfloat16)}
    layout = Layout.of(params, {"up": Place.of("d f", {"up.weight": "f d"})})
    state = layout.to_torch(params)
    assert state["up.weight"].dtype == torch.bfloat16 and state["up.weight"].shape == (6, 4)
    assert layout.from_torch(state)["up"].dtype == jnp.bfloat16
    assert np.array_equal(layout.from_torch(state)["up"], params["up"])


SCALARS = {
    "one": (2.5, {"logit_scale": ""}, "", ["logit_scale"]),
    "stacked here": ([1.5, -2.5, 3.5], {"layers.{l}.scale": ""}, "l", [f"layers.{i}.scale" for i in range(3)]),
    "of one axis in torch": (2.5, {"logit_scale": "1"}, "", ["logit_scale"]),
    "of one axis here": ([2.5], {"logit_scale": ""}, "1", ["logit_scale"]),
}


@pytest.mark.parametrize("row", SCALARS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("terms", [{}, {"scale": 2.0}, {"offset": 1.0}])
def test_a_leaf_or_a_tensor_without_axes_keeps_its_value(row, dtype, terms):
    values, torch, axes, keys = SCALARS[row]
    leaf = np.asarray(values, dtype)
    layout = Layout.of({"scale": leaf}, {"scale": Place.of(axes, torch, **terms)})
    state = layout.to_torch({"scale": leaf})
    expected = (leaf.astype(np.float32) - terms.get("offset", 0.0)) / terms.get("scale", 1.0)
    assert [float(state[key]) for key in keys] == expected.reshape(-1).tolist()
    back = np.asarray(layout.from_torch(state)["scale"])
    assert back.dtype == leaf.dtype and back.shape == leaf.shape and np.array_equal(back, leaf)


@pytest.mark.parametrize("row", SCALARS)
def test_the_layout_of_a_leaf_without_axes_is_inferred_and_kept(row, tmp_path):
    values, torch, axes, _ = SCALARS[row]
    params = {"scale": np.asarray(values, np.float32), "up": array((3, 4))}
    places = {"scale": Place.of(axes, torch), "up": Place.of("i o", {"up.weight": "o i"})}
    state = Layout.of(params, places).arrays(params)
    layout = infer_layout(params, state)
    save_layout(tmp_path / "layout.json", layout)
    again = load_layout(tmp_path / "layout.json").arrays(params)
    assert again.keys() == state.keys() and all(np.array_equal(again[key], state[key]) for key in state)


def test_a_tie_is_stored_once_or_equal():
    params = {"e": array((5, 4))}
    names = {"embed.weight": ("v d", "embedding"), "head.weight": "v d"}
    layout = Layout.of(params, {"e": Place.of("v d", names)})
    state = layout.arrays(params)
    assert np.array_equal(layout.from_torch({"embed.weight": state["embed.weight"]})["e"], params["e"])
    assert np.array_equal(layout.from_torch({"head.weight": state["head.weight"]})["e"], params["e"])
    with pytest.raises(WeightsError, match="tied"):
        layout.from_torch(state | {"head.weight": state["head.weight"] + 1})


def test_the_kind_of_tree_is_kept():
    from flax import nnx

    model = nnx.Linear(3, 5, rngs=nnx.Rngs(0))
    state = nnx.state(model)
    layout = Layout.of(state, {"kernel": Place.of("i o", {"weight": "o i"}), "bias": Place.of("o", {"bias": "o"})})
    again = layout.from_torch(layout.arrays(state), like=state)
    assert isinstance(again, nnx.State)
    assert np.array_equal(again["kernel"].get_value(), model.kernel.get_value())


BAD = {
    "a name torch lacks": ("d f", {"w": "f"}, "'d',.*0 are meant by .'f'."),
    "a name the leaf lacks": ("d f", {"w": "f d h"}, "'h' is no axis"),
    "twice": ("d f", {"w": "f d d"}, "do not name the same axes"),
    "too few axes": ("d", {"w": "d"}, "gives it 1 axes"),
    "an open size": ("d (n h)", {"w": "(n h) d"}, "needs a size for 'n'"),
    "no size": ("d (n h)", {"w": "(n h) d"}, "expected \\(4, 5"),
    "brackets": ("d (f", {"w": "f d"}, "without its"),
    "signs": ("d, f", {"w": "f d"}, "only names, numbers"),
    "a number in a product": ("d (2 f)", {"w": "f d"}, "a name of its own"),
    "which part": ("d (q + k)", {"w": "q d", "v": "(q k) d"}, "do not name the same|2 are meant|it must be one"),
}


@pytest.mark.parametrize("row", BAD)
def test_what_means_nothing_is_refused(row):
    axes, torch, message = BAD[row]
    sizes = {"n": 5, "h": 1} if row == "no size" else {"q": 2} if row == "which part" else {}
    with pytest.raises(WeightsError, match=message):
        Layout.of({"w": array((4, 6))}, {"w": Place.of(axes, torch, **sizes)})


def test_one_part_of_a_tensor_has_one_leaf():
    params = {"a": array((4, 6)), "b": array((4, 6))}
    place = Place.of("d f", {"up.weight": "f d"})
    with pytest.raises(WeightsError, match="same part of 'up.weight'"):
        Layout.of(params, {"a": place, "b": place})
    with pytest.raises(WeightsError, match="different shapes"):
        Layout.of(params, {"a": place, "b": Place.of("d f", {"up.weight": "(f + 1) d"})})


def test_another_models_params_and_states_are_refused():
    params = {"up": {"kernel": array((4, 6))}}
    layout = Layout.of(params, {"up/kernel": Place.of("d f", {"up.weight": "f d"})})
    with pytest.raises(WeightsError, match="another model's layout"):
        layout.arrays({"up": {"kernel": array((4, 8))}})
    with pytest.raises(WeightsError, match="no such leaf.*'down/kernel'"):
        layout.arrays({"down": {"kernel": array((4, 6))}})
    with pytest.raises(WeightsError, match="no place for 'down'"):
        layout.arrays(params | {"down": array((2,))})
    state = layout.arrays(params)
    with pytest.raises(WeightsError, match="'up.weight' is missing"):
        layout.from_torch({})
    with pytest.raises(WeightsError, match="'down.weight' lies in no leaf"):
        layout.from_torch(state | {"down.weight": state["up.weight"]})
    with pytest.raises(WeightsError, match=r"expected shape \(6, 4\), found \(4, 6\)"):
        layout.from_torch({"up.weight": state["up.weight"].T})


def test_the_geometry_is_torchs_carried_to_the_leaf():
    params = {"stacked": array((2, 3, 4, 5)), "each": array((2, 3, 4, 5)), "embed": array((7, 4))}
    places = {
        "stacked": Place.of("l e d f", {"{l}.experts.up": ("e f d", "experts")}),
        "each": Place.of("l e d f", {"{l}.experts.{e}.up.weight": "f d"}),
        "embed": Place.of("v d", {"embed.weight": ("v d", "embedding"), "head.weight": "v d"}),
    }
    kernels = Layout.of(params, places).kernels
    for name in ("stacked", "each"):
        kernel = kernels[name]
        assert (kernel.batch, kernel.experts, kernel.contracted, kernel.output) == ((0, 1), (1,), (2,), (3,))
    assert kernels["embed"].kind == "embedding" and kernels["embed"].contracted == (0,)


def test_a_leaf_whose_axis_would_have_two_roles_has_no_geometry():
    params = {"w": array((4, 6))}
    layout = Layout.of(params, {"w": Place.of("d (l f)", {"up.{l}.weight": "f d"}, l=2)})
    with pytest.raises(WeightsError, match="axis 1 would be batch and output"):
        _ = layout.kernels


def test_the_file_is_the_layout(tmp_path):
    params = {f"layers_{i}": {"q": {"kernel": array((4, 3, 2))}, "norm": {"scale": array((4,))}} for i in range(12)}
    params |= {"embed": array((7, 4)), "stack": array((3, 4, 6))}
    places = {
        "embed": Place.of("v d", {"embed.weight": ("v d", "embedding"), "lm_head.weight": "v d"}),
        "stack": Place.of("l d f", {"blocks.{l}.up.weight": "f d"}, scale=0.5),
    }
    for i in range(12):
        places[f"layers_{i}/q/kernel"] = Place.of("d n h", {f"model.layers.{i}.q_proj.weight": "(n h) d"})
        places[f"layers_{i}/norm/scale"] = Place.of("d", {f"model.layers.{i}.norm.weight": "d"})
    layout = Layout.of(params, places)
    save_layout(tmp_path / "layout.json", layout)
    assert load_layout(tmp_path / "layout.json") == layout
    assert (tmp_path / "layout.json").read_text().count("q_proj") == 1  # one row for all layers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "expected a layout"),
        ('{"format": "jpeft-layout-1", "places": {"w": {"axes": "d"}}}', "expected 'axes', 'torch' and 'sizes'"),
        (
            '{"format": "jpeft-layout-1", "places": {"w": {"axes": "d", "torch": [["w", "d", "x"]], "sizes": {}}}}',
            "no kind",
        ),
        ('{"format": "jpeft-layout-1", "places": {"w{#}": {"axes": "d", "torch": [], "sizes": {}}}}', "a 'count'"),
    ],
)  # fmt: skip
def test_a_file_that_is_none_is_refused(tmp_path, text, message):
    (tmp_path / "layout.json").write_text(text)
    with pytest.raises(WeightsError, match=message):
        load_layout(tmp_path / "layout.json")


def test_the_layout_of_torchs_own_names_is_read_off_them(tmp_path):
    from jpeft_interop.layout import default_layout

    sizes = dict(vocab_size=7, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)
    _, params = pure(build({"model_type": "llama", "tie_word_embeddings": True, **sizes}, None, "LlamaForCausalLM"))
    from jpeft.tree import flatten

    layout = default_layout(flatten(params))
    assert set(layout.by_key) >= {"model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"}
    save_layout(tmp_path / "layout.json", layout)
    assert load_layout(tmp_path / "layout.json") == layout


def test_sizes_are_solved_from_the_shape():
    assert solve(parse("d (q + k n)"), (4, 10), {"q": 4, "n": 3}, "w") == {"d": 4, "q": 4, "n": 3, "k": 2}
