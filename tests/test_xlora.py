"""X-LoRA against a dense computation in which every token has weights of its own."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
import zoo
from agreement import QUICK, perturbed
from jpeft import xlora
from jpeft.xlora import XLoRA

VOCAB, D, FF = 11, 8, 12


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Record:
    logits: jax.Array
    hidden_states: tuple[jax.Array, ...]


def network(dense, lookup, ids, np_):
    """Two layers of attention and an MLP; `dense(path, x)` does the products. Returns the states, and the logits."""
    x = lookup("embed/embedding", ids)
    states = [x]
    causal = np_.tril(np_.ones((ids.shape[1],) * 2, bool))
    for i in range(2):
        q, k, v = (dense(f"layers/{i}/{name}/kernel", x) for name in "qkv")
        scores = np_.where(causal, q @ np_.swapaxes(k, -1, -2) / D**0.5, -1e9)
        weights = np_.exp(scores - scores.max(-1, keepdims=True))
        x = x + weights / weights.sum(-1, keepdims=True) @ v
        x = x + dense(f"layers/{i}/down/kernel", np_.tanh(dense(f"layers/{i}/up/kernel", x)))
        states.append(x)
    return states, dense("head/kernel", x)


SHAPES = {"embed/embedding": (VOCAB, D), "head/kernel": (D, VOCAB)} | {
    f"layers/{i}/{name}/kernel": shape
    for i in range(2)
    for name, shape in {"q": (D, D), "k": (D, D), "v": (D, D), "up": (D, FF), "down": (FF, D)}.items()
}


def nested(flat):
    tree = {}
    for path, leaf in flat.items():
        *parts, last = path.split("/")
        inner = tree
        for part in parts:
            inner = inner.setdefault(part, {})
        inner[last] = leaf
    return tree


PARAMS = nested({path: zoo.normal(*shape, seed=i) / 2 for i, (path, shape) in enumerate(SHAPES.items())})
IDS = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (3, 5)))


def params_at(params, path):
    for part in path.split("/"):
        params = params[part]
    return params


def model(params, ids):
    flat = {path: params_at(params, path) for path in SHAPES}
    take = lambda path, ids: jnp.take(flat[path], ids, 0)
    states, logits = network(lambda path, x: x @ flat[path], take, ids, jnp)
    return Record(logits, tuple(states))


RUN = jax.jit(xlora.lift(model), compiler_options=QUICK)
KERNELS = jpeft.kernels(lambda params, ids: model(params, ids).logits, PARAMS, IDS)


def expert(seed, **options):
    return perturbed(jpeft.init(jax.random.key(seed), jpeft.LoRA(**options), PARAMS, kernels=KERNELS), seed)


@cache
def experts():
    """Different targets, ranks, alphas and kinds of scaling; names that are parts of paths and keys."""
    return {
        "one": expert(1, rank=2, alpha=4, targets=["q", "v"]),
        "layers": expert(2, rank=3, alpha=2, targets=["q", "k", "v"], rank_stabilized=True),
        "lora_A.0/ü": expert(3, rank=1, alpha=3, targets=["1.up", "down", "embed"]),
    }


SCALINGS = {"one": 4 / 2, "layers": 2 / 3**0.5, "lora_A.0/ü": 3 / 1}


def mixture(key=0, chosen=None, **spec):
    return xlora.init(jax.random.key(key), XLoRA(**{"hidden": 16, **spec}), chosen or experts(), features=D)


def sharp(made, factor=20.0):
    """As if trained: the classifier prefers some experts by far."""
    return made.replace(classifier=jax.tree.map(lambda leaf: factor * leaf, made.classifier))


def f64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def classifier_by_hand(made, hidden):
    x, layers = hidden, f64(made.classifier)
    for layer in layers[:-1]:
        x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
    return np.tensordot(x, layers[-1]["kernel"], 1) + layers[-1]["bias"]


def dense_with(gates):
    """The network on W + Σ g_k ΔW_k of each token, in float64; `gates` are {path: (batch, tokens, {name: g})}."""
    flat = {path: np.asarray(params_at(PARAMS, path), np.float64) for path in SHAPES}

    def kernels(path):
        w = np.broadcast_to(flat[path], (*IDS.shape, *flat[path].shape)).copy()
        for name, leaves in f64({name: one.trained for name, one in experts().items()}).items():
            if path in leaves and name in gates[path]:
                delta = SCALINGS[name] * leaves[path]["a"] @ leaves[path]["b"]
                w += gates[path][name][..., None, None] * delta
        return w

    product = lambda path, x: np.einsum("bti,btio->bto", x, kernels(path))
    rows, columns = np.indices(IDS.shape)
    take = lambda path, ids: kernels(path)[rows, columns, ids]
    return network(product, take, np.asarray(IDS), np)


LAYERS = [
    "embed/embedding",
    *[f"layers/0/{name}/kernel" for name in ("down", "k", "q", "v")],
    *[f"layers/1/{name}/kernel" for name in ("down", "k", "q", "up", "v")],
]


def gates_by_hand(made, first=0.0):
    """The scalings from the first pass, by the formula: (batch, tokens, layers, experts)."""
    everywhere = {path: {name: np.full(IDS.shape, first) for name in made.names} for path in SHAPES}
    logits = classifier_by_hand(made, dense_with(everywhere)[0][-1])
    if not made.spec.layerwise:
        logits = np.repeat(logits[..., None, :], len(LAYERS), -2)
    return logits


def expected_logits(made, scalings, weight=1.0):
    by_path = {path: dict.fromkeys((), 0) for path in SHAPES}
    for number, path in enumerate(LAYERS):
        by_path[path] = {name: weight * scalings[..., number, k] for k, name in enumerate(made.names)}
    return dense_with(by_path)[1]


def assert_same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


BASE = np.asarray(model(PARAMS, IDS).logits)


def check(made, scalings, weight=1.0):
    output, found = RUN(PARAMS, made, IDS)
    assert_same(found, scalings)
    assert_same(output.logits, expected_logits(made, scalings, weight))
    assert np.abs(output.logits - BASE).max() > 1e-1
    return found


def top(scalings, k):
    order = np.argsort(-scalings, axis=-1)
    kept = np.zeros(scalings.shape, bool)
    np.put_along_axis(kept, order[..., :k], True, -1)
    return kept


def test_three_experts_on_different_targets():
    made = sharp(mixture(), 3.0)
    found = check(made, softmax(gates_by_hand(made)))
    assert np.ptp(np.asarray(found), axis=1).max() > 0.1, "tokens differ"


@pytest.mark.parametrize("depth", [2, 3])
def test_a_deeper_classifier(depth):
    made = sharp(mixture(depth=depth), 4.0)
    check(made, softmax(gates_by_hand(made)))


def test_temperature():
    made = sharp(mixture(temperature=0.3), 3.0)
    check(made, softmax(gates_by_hand(made) / 0.3))


def test_without_softmax_the_logits_are_the_scalings():
    made = mixture(softmax=False, temperature=0.3)
    check(made, gates_by_hand(made))


def test_top_k():
    made = sharp(mixture(top_k=2), 3.0)
    scalings = softmax(gates_by_hand(made))
    check(made, np.where(top(scalings, 2), scalings, 0))


@pytest.mark.parametrize("soft", [True, False])
def test_softmax_of_the_top_k(soft):
    made = sharp(mixture(top_k=2, softmax=soft, softmax_topk=True, temperature=0.5), 3.0)
    logits = gates_by_hand(made)
    scalings = softmax(logits / 0.5) if soft else logits
    check(made, softmax(np.where(top(scalings, 2), scalings, -np.inf)))


def test_layerwise():
    made = sharp(mixture(layerwise=True), 3.0)
    found = check(made, softmax(gates_by_hand(made)))
    assert np.ptp(np.asarray(found), axis=2).max() > 0.1, "layers differ"
    assert [layer.path for layer in xlora.layers_of(made.experts)] == LAYERS


def test_global_weight():
    made = mixture(global_weight=0.3)
    check(made, softmax(gates_by_hand(made)), weight=0.3)


@pytest.mark.parametrize(("value", "first"), [(0.7, 0.7), (None, 1 / 3)])
def test_scaling_pass_value(value, first):
    """The first pass sees every expert at this value; the classifier reads other states, so the scalings differ."""
    made = sharp(mixture(scaling_pass_value=value, global_weight=0.5), 3.0)
    found = check(made, softmax(gates_by_hand(made, 0.5 * first)), weight=0.5)
    without = RUN(PARAMS, replace(made, spec=replace(made.spec, scaling_pass_value=0.0)), IDS)[1]
    assert np.abs(found - without).max() > 1e-3
