"""Params as paths and leaves, whatever tree they came as."""

from typing import NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.core import freeze

import jpeft
from jpeft.tree import base_leaves, beside, flatten, is_floating, nearest, parameters, replace


class Pair(NamedTuple):
    left: object
    right: object


@flax.struct.dataclass
class Record:
    kernel: object
    name: str = flax.struct.field(pytree_node=False, default="x")


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs) for _ in range(11)])
        self.plain = nnx.Linear(2, 3, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


TREES = [
    ({"a": {"b": 1.0}}, {"a/b": 1.0}),
    ({"layers": [{"k": 1.0}, {"k": 2.0}]}, {"layers/0/k": 1.0, "layers/1/k": 2.0}),
    ({"layers": {0: 1.0, 10: 3.0, 2: 2.0}}, {"layers/0": 1.0, "layers/2": 2.0, "layers/10": 3.0}),
    ((1.0, [2.0]), {"0": 1.0, "1/0": 2.0}),
    ({"pair": Pair(1.0, {"x": 2.0})}, {"pair/left": 1.0, "pair/right/x": 2.0}),
    ({"record": Record(1.0)}, {"record/kernel": 1.0}),
    (freeze({"a": {"b": 1.0}}), {"a/b": 1.0}),
    ({"none": None, "a": 1.0}, {"a": 1.0}),
    ({"box": nn.Partitioned(1.0, ("x",))}, {"box": 1.0}),
    ({"box": {"deep": nn.LogicallyPartitioned(1.0, ("x",))}}, {"box/deep": 1.0}),
    (1.0, {"": 1.0}),
]


@pytest.mark.parametrize(("tree", "flat"), TREES)
def test_flatten_and_replace(tree, flat):
    assert flatten(tree) == flat
    assert replace(tree, {}) == tree
    doubled = replace(tree, {path: 2 * leaf for path, leaf in flat.items()})
    assert type(doubled) is type(tree)
    assert jax.tree.structure(doubled) == jax.tree.structure(tree)
    assert flatten(doubled) == {path: 2 * leaf for path, leaf in flat.items()}


def test_an_nnx_state():
    state = nnx.state(Net(nnx.Rngs(0)))
    flat = flatten(state)
    assert flat["layers/10/kernel"].shape == (2, 3)
    assert "plain/bias" not in {path for path, leaf in flat.items() if hasattr(leaf, "shape")}
    new = replace(state, {"layers/10/kernel": jnp.zeros((2, 3))})
    assert isinstance(new, nnx.State) and isinstance(new["layers"][10]["kernel"], nnx.Param)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert flatten(new)["layers/9/kernel"] is flat["layers/9/kernel"]


def test_parameters_of_a_state():
    """No batch statistics, no keys, no counters."""
    state = nnx.state(Net(nnx.Rngs(0)))
    assert {path.split("/")[0] for path in parameters(state)} == {"layers", "plain", "norm"}
    assert {path for path in parameters(state) if path.startswith("norm")} == {"norm/scale", "norm/bias"}
    assert all(is_floating(leaf) for leaf in parameters(state).values())
    assert set(parameters({"a": jnp.ones(2), "b": 2.0, "c": jnp.ones(2, int)})) == {"a", "c"}


def test_two_leaves_of_one_path():
    with pytest.raises(jpeft.SpecError, match="two leaves of the params have the path 'a/b'"):
        flatten({"a": {"b": 1.0}, "a/b": 2.0})


def test_attached_params_are_no_base():
    params = {"kernel": jnp.ones((3, 2))}
    adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=1), params)
    assert set(flatten(jpeft.attach(params, adapter))) == {"kernel"}
    with pytest.raises(jpeft.KernelError, match="'kernel' has an adapter attached"):
        base_leaves(jpeft.attach(params, adapter))


def test_beside():
    assert beside("a/b/kernel", "bias") == "a/b/bias"
    assert beside("kernel", "bias") == "bias"


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("qproj", "model.layers.0.attn.q_proj"),
        ("attn.kproj", "model.layers.0.attn.k_proj"),
        ("model.layers.1.attn.q_prj", "model.layers.1.attn.q_proj"),
        ("lmhead", "lm_head"),
    ],
)
def test_the_nearest_name(name, first):
    known = ["lm_head", *(f"model.layers.{i}.attn.{n}_proj" for i in range(12) for n in "kq")]
    assert nearest(name, known).startswith(repr(first))
    assert "more)" in nearest(name, known)


def test_the_nearest_of_none():
    assert nearest("x", []) == "(there are none)"
    assert nearest("x", ["completely", "different"]) == "'completely', 'different'"
