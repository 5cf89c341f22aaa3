"""X-LoRA against a dense computation in which every token has weights of its own."""

import json
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
from safetensors.numpy import load_file, save_file

import jpeft
import zoo
from agreement import QUICK, perturbed
from jpeft import xlora
from jpeft.digest import digest
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


MIXED = xlora.lift(model)
RUN = jax.jit(MIXED, compiler_options=QUICK)
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


# What is trained


def sizes(tree):
    return [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree)]


def quickly(fn):
    return jax.jit(fn, compiler_options=QUICK)


@pytest.mark.parametrize("train_experts", [False, True])
def test_what_is_trained_has_gradients(train_experts):
    made = mixture(depth=2, train_experts=train_experts)
    loss = lambda trained: jnp.sin(MIXED(PARAMS, made.replace(trained=trained), IDS)[0].logits).sum()
    gradient = quickly(jax.grad(loss))(made.trained)
    assert set(gradient) == ({"classifier", "experts"} if train_experts else {"classifier"})
    assert min(sizes(gradient)) > 0
    slope = sum(float((g**2).sum()) for g in jax.tree.leaves(gradient))
    step = 1e-2 / slope**0.5
    ahead, back = (jax.tree.map(lambda p, g, s=s: p + s * step * g, made.trained, gradient) for s in (1, -1))
    found = (quickly(loss)(ahead) - quickly(loss)(back)) / (2 * step)
    np.testing.assert_allclose(found, slope, rtol=1e-2)


def test_nothing_flows_back_through_the_first_pass():
    """The base's gradient is that of the second pass alone, its gates as they were found."""
    made = sharp(mixture(), 3.0)
    gates = RUN(PARAMS, made, IDS)[1]
    by_path = {path: gates[:, :, number] for number, path in enumerate(LAYERS)}
    fixed = lambda params: jpeft.attach(params, list(made.experts.values()), gates=by_path)
    expected = quickly(jax.grad(lambda params: jnp.sin(jpeft.lift(model)(fixed(params), IDS).logits).sum()))(PARAMS)
    found = quickly(jax.grad(lambda params: jnp.sin(MIXED(params, made, IDS)[0].logits).sum()))(PARAMS)
    jax.tree.map(assert_same, found, expected)


def test_dropout_acts_with_a_key_alone():
    made = sharp(mixture(depth=2, dropout=0.5), 4.0)
    drawn = [RUN(PARAMS, made, IDS, dropout_key=jax.random.key(seed))[1] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[0] - drawn[2]).max() > 1e-2
    assert np.abs(drawn[0] - RUN(PARAMS, made, IDS)[1]).max() > 1e-2


def test_dropout_of_the_experts():
    chosen = {name: expert(1, rank=2, alpha=8, targets=["v"], dropout=rate) for name, rate in (("a", 0.5), ("b", 0.0))}
    made = mixture(chosen=chosen)
    logits = [RUN(PARAMS, made, IDS, dropout_key=jax.random.key(seed))[0].logits for seed in (0, 1)]
    assert np.abs(logits[0] - logits[1]).max() > 1e-2


# Two domains

SIDE = jnp.where(jnp.arange(VOCAB) < 5, 2.0, -2.0)[:, None] * jnp.eye(D)[0]  # what a pretrained base would know
PRETRAINED = PARAMS | {"embed": {"embedding": PARAMS["embed"]["embedding"] + SIDE}}


def sentences(domain, seed, rows=16, length=12):
    """(rows, length): a random walk on the first five tokens, upwards, or on the next five, downwards."""
    steps = np.random.default_rng(seed).integers(1, 3, (rows, length)).cumsum(1)
    return jnp.asarray(steps % 5 if domain == 0 else 5 + (-steps) % 5)


def language_loss(logits, ids):
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()


def fitted(loss, trained, batches, rate=0.03):
    optimizer = optax.adam(rate)

    def step(state, ids):
        updates, inner = optimizer.update(jax.grad(loss)(state[0], ids), state[1])
        return (optax.apply_updates(state[0], updates), inner), None

    return quickly(lambda start: jax.lax.scan(step, start, batches))((trained, optimizer.init(trained)))[0][0]


@cache
def learnt_expert(domain):
    adapter = expert(5, rank=4, targets=["q", "v", "down"] if domain else ["k", "v", "up"])
    forward = lambda trained, ids: jpeft.lift(model)(jpeft.attach(PRETRAINED, adapter.replace(trained=trained)), ids)
    batches = jnp.stack([sentences(domain, seed) for seed in range(60)])
    trained = fitted(lambda t, ids: language_loss(forward(t, ids).logits, ids), adapter.trained, batches)
    return adapter.replace(trained=trained)


@pytest.mark.parametrize(("train_experts", "rate", "least"), [(False, 0.1, 0.9), (True, 0.03, 0.8)])
def test_the_classifier_learns_which_expert_knows_the_domain(train_experts, rate, least):
    spec = XLoRA(depth=2, hidden=16, train_experts=train_experts)
    made = xlora.init(jax.random.key(0), spec, {"up": learnt_expert(0), "down": learnt_expert(1)}, features=D)

    def loss(trained, ids):
        return language_loss(MIXED(PRETRAINED, made.replace(trained=trained), ids)[0].logits, ids)

    batches = jnp.stack([jnp.concatenate([sentences(d, 100 + seed, rows=8) for d in (0, 1)]) for seed in range(60)])
    after = made.replace(trained=fitted(loss, made.trained, batches, rate))
    for domain in (0, 1):
        ids = sentences(domain, seed=999)
        outputs, scalings = zip(*(RUN(PRETRAINED, m, ids) for m in (made, after)), strict=True)
        shares = [s.mean((0, 1, 2)) for s in scalings]
        assert shares[1][domain] > least > shares[0][domain]
        losses = [language_loss(output.logits, ids) for output in outputs]
        assert losses[1] < losses[0] - 0.1


# The bugs that cannot happen here


NAMES = ["lora", "lora_", "lora_A", "ia3", "self_attn", "layers", "model", "0", "1", "weight", "default", "base_layer"]
NAMES += ["a.b", "a/b", "a b", "ü", "", "one"]


def test_experts_of_any_name_and_target_switched_added_and_removed():
    """Peft #2485: an expert on q and v, another on q, k and v; PEFT raised a KeyError at the layers one lacks."""
    qv, qkv = expert(1, rank=2, targets=["q", "v"]), expert(2, rank=3, targets=["q", "k", "v"])
    for spec in ({"softmax": False}, {"softmax": False, "layerwise": True}):
        made = sharp(mixture(chosen={"qv": qv, "qkv": qkv}, **spec), 3.0)
        output, before = RUN(PARAMS, made, IDS)

        switched = xlora.select(made, ["qkv", "qv"])
        again, scalings = RUN(PARAMS, switched, IDS)
        np.testing.assert_array_equal(scalings, before[..., ::-1])
        assert_same(again.logits, np.asarray(output.logits))

        removed = xlora.select(made, ["qv"])
        one, scalings = RUN(PARAMS, removed, IDS)
        kept = [n for n, layer in enumerate(xlora.layers_of(made.experts)) if layer.path in qv.trained]
        np.testing.assert_allclose(scalings[..., 0], before[:, :, kept, 0], rtol=0, atol=1e-5)
        assert np.abs(one.logits - output.logits).max() > 1e-2

        added = xlora.add(removed, "layers/0", qkv, jax.random.key(9))
        both, scalings = RUN(PARAMS, added, IDS)
        np.testing.assert_allclose(scalings[:, :, kept, 0], before[:, :, kept, 0], rtol=0, atol=1e-5)
        assert np.abs(both.logits - one.logits).max() > 1e-2


@pytest.mark.parametrize("layerwise", [False, True])
def test_names_decide_nothing_and_survive_a_folder(tmp_path, layerwise):
    """Experts of all kinds of names beside each other, saved and loaded: each the one it was."""
    chosen = {name: expert(i, rank=1, targets=["q"] if i % 2 else ["k", "v"]) for i, name in enumerate(NAMES)}
    made = sharp(mixture(chosen=chosen, layerwise=layerwise), 3.0)
    plain = mixture(chosen={str(100 + i): one for i, one in enumerate(chosen.values())}, layerwise=layerwise)
    np.testing.assert_array_equal(
        RUN(PARAMS, made, IDS)[0].logits, RUN(PARAMS, plain.replace(classifier=made.classifier), IDS)[0].logits
    )
    xlora.save(tmp_path / "mixture", made)
    assert_equal(xlora.load(tmp_path / "mixture"), made)


def assert_equal(found, made):
    assert found.spec == made.spec and found.names == made.names
    assert jax.tree.structure(found) == jax.tree.structure(made)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, made)
    jax.tree.map(np.testing.assert_array_equal, found, made)


def test_the_order_of_experts_survives_tree_map():
    """JAX sorts a dict's keys; the classifier's columns go by `names`."""
    made = sharp(mixture(chosen={"b": expert(1, targets=["q"]), "a": expert(2, targets=["v"])}), 3.0)
    mapped = jax.tree.map(lambda leaf: leaf, made)
    assert mapped.names == ("b", "a")
    np.testing.assert_array_equal(RUN(PARAMS, mapped, IDS)[0].logits, RUN(PARAMS, made, IDS)[0].logits)


def test_rank_0():
    made = mixture(chosen={"none": expert(1, rank=0, targets=["q", "k"]), "some": expert(2, rank=2, targets=["v"])})
    output, scalings = RUN(PARAMS, made, IDS)
    assert scalings.shape[2] == 6 and np.abs(output.logits - BASE).max() > 1e-2
    nothing = mixture(chosen={"none": expert(1, rank=0, targets=["q"])})
    np.testing.assert_allclose(RUN(PARAMS, nothing, IDS)[0].logits, BASE, rtol=0, atol=1e-6)


def test_stacked_layers():
    """Of a stack of weights under scan, each has its own scalings."""
    case = zoo.get("linen_scan")
    kernel = next(path for path, one in case.adapted.items() if one.batch)
    spec = jpeft.LoRA(rank=2, targets=[jpeft.tree.module_of(kernel)])
    one = perturbed(jpeft.init(jax.random.key(1), spec, case.params, kernels=case.adapted), 1)
    assert [layer.size for layer in xlora.layers_of({"a": one})] == [zoo.LAYERS]
    made = xlora.init(jax.random.key(0), XLoRA(softmax=False, layerwise=True), {"a": one}, features=3)
    rows = case.fn(case.params, case.x).shape[:2]
    hidden = zoo.normal(*rows, 3)
    run = xlora.lift(lambda params, x: case.fn(params, x), hidden=lambda output: hidden)
    output, scalings = run(case.params, made, case.x)
    assert scalings.shape == (*rows, zoo.LAYERS, 1)
    gates = {kernel: jnp.moveaxis(scalings, 2, 0)}
    expected = jpeft.lift(case.fn)(jpeft.attach(case.params, [one], gates=gates), case.x)
    assert_same(output, np.asarray(expected))
    assert np.abs(expected - case.fn(case.params, case.x)).max() > 1e-3


# The folder


def test_a_new_process_loads_it_to_the_same_bits(tmp_path):
    made = sharp(mixture(depth=2, layerwise=True, top_k=2, softmax_topk=True), 3.0)
    xlora.save(tmp_path / "mixture", made)
    code = (
        "import sys, numpy, test_xlora as t\n"
        "output, scalings = t.RUN(t.PARAMS, t.xlora.load(sys.argv[1] + '/mixture'), t.IDS)\n"
        "numpy.savez(sys.argv[1] + '/found.npz', logits=output.logits, scalings=scalings)"
    )
    here = os.path.dirname(__file__)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([here, os.path.dirname(here)])}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True, timeout=300)
    output, scalings = RUN(PARAMS, made, IDS)
    found = np.load(tmp_path / "found.npz")
    np.testing.assert_array_equal(found["logits"], output.logits)
    np.testing.assert_array_equal(found["scalings"], scalings)


def test_a_folder_is_replaced_whole(tmp_path):
    folder = tmp_path / "mixture"
    made = mixture()
    xlora.save(folder, made)
    xlora.save(folder, xlora.select(made, ["one"]))
    assert sorted(path.name for path in folder.iterdir()) == ["expert-0.safetensors", "xlora.safetensors"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(jpeft.JpeftError, match=r"notes\.txt"):
        xlora.save(folder, made)
    assert_equal(xlora.load(folder), xlora.select(made, ["one"]))


def test_bf16_is_saved_as_it_is(tmp_path):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), mixture())
    xlora.save(tmp_path / "mixture", half)
    assert_equal(xlora.load(tmp_path / "mixture"), half)


def test_what_is_not_finite_is_not_saved(tmp_path):
    made = mixture()
    broken = made.replace(classifier=({**made.classifier[0], "bias": jnp.array([0, jnp.nan, 0])},))
    with pytest.raises(jpeft.AdapterError, match="'0/bias' of the classifier"):
        xlora.save(tmp_path / "mixture", broken)
    assert not (tmp_path / "mixture").exists()


def test_broken_folders(tmp_path):
    folder = tmp_path / "mixture"
    with pytest.raises(jpeft.AdapterError, match=r"no xlora\.safetensors there"):
        xlora.load(folder)
    xlora.save(folder, mixture())
    whole = (folder / "xlora.safetensors").read_bytes()
    (folder / "expert-1.safetensors").unlink()
    with pytest.raises(jpeft.AdapterError, match=r"expert 'layers' is missing; expected it in expert-1"):
        xlora.load(folder)
    (folder / "xlora.safetensors").write_bytes(whole[:-4])
    with pytest.raises(jpeft.AdapterError, match="truncated: expected"):
        xlora.load(folder)
    deeper = whole.replace(b'\\"depth\\": 1', b'\\"depth\\": 2')
    (folder / "xlora.safetensors").write_bytes(deeper)
    with pytest.raises(jpeft.AdapterError, match="has changed since it was written"):
        xlora.load(folder)
    (folder / "xlora.safetensors").write_bytes(deeper.replace(b"jpeft-xlora-3", b"jpeft-xlora-1"))  # had no digest
    (folder / "expert-1.safetensors").write_bytes((folder / "expert-0.safetensors").read_bytes())
    with pytest.raises(jpeft.AdapterError, match=r"expected the tensors \['0/bias', '0/kernel', '1/bias'"):
        xlora.load(folder)


def test_experts_of_another_mixture(tmp_path):
    """Each file is whole; the folder is not."""
    xlora.save(tmp_path / "a", mixture())
    one, other = (tmp_path / "a" / f"expert-{k}.safetensors" for k in (0, 1))
    one.rename(tmp_path / "kept")
    other.rename(one)
    (tmp_path / "kept").rename(other)
    with pytest.raises(jpeft.AdapterError, match=r"expert-0.* is no expert of this mixture: expected the digest"):
        xlora.load(tmp_path / "a")


def test_experts_that_are_links_to_one(tmp_path):
    xlora.save(tmp_path / "a", mixture())
    one, other = (tmp_path / "a" / f"expert-{k}.safetensors" for k in (0, 1))
    other.unlink()
    other.symlink_to(one.name)
    with pytest.raises(jpeft.AdapterError, match="are links to one; expected each for itself"):
        xlora.load(tmp_path / "a")


def told(folder, **changed):
    """A folder of the form that has no digests, with other metadata."""
    xlora.save(folder, mixture())
    data = (folder / "xlora.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    found = {name: header["__metadata__"][name] for name in ("spec", "names")}
    header["__metadata__"] = found | {"format": "jpeft-xlora-1"} | changed
    text = json.dumps(header).encode()
    (folder / "xlora.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, None),
        ({"spec": '{"temperature": 1' + "0" * 400 + "}"}, r"field 'temperature': expected float"),
        ({"spec": '{"temperature": 1' + "0" * 5_000 + "}"}, r"'spec': not valid JSON: Exceeds the limit"),
        ({"spec": '{"hidden": 1' + "0" * 4_000 + "}"}, r"field 'hidden': expected int, found 1000"),
        ({"spec": '{"temperature": 1e-60}'}, r"temperature must be greater than 0"),
        ({"spec": '{"global_weight": 1e60}'}, r"global_weight must be a finite number"),
        ({"spec": '{"top_k": 9}'}, r"a mixture of the top 9 needs at least 9 experts"),
        ({"spec": "[]"}, r"expected a JSON object"),
        ({"spec": '{"depth": [[[]]]}'}, r"nested too deeply"),
        ({"names": "[[[]]]"}, r"nested too deeply"),
        ({"names": '["a", "a"]'}, r"'names': expected those of 1 to 256 experts, each once"),
        ({"names": json.dumps([f"n{k}" for k in range(400)])}, r"'names': expected those of 1 to 256 experts"),
        ({"names": '["a"], "more": []'}, r"'names': expected a list of strings"),
        ({"names": json.dumps([f"n{k}" for k in range(200)])}, r"200 names of experts; the classifier has kernels of"),
        ({"names": '["' + "x" * 100_000 + '"]'}, r"1 names of experts"),
    ],
)
def test_what_a_strangers_mixture_says(tmp_path, changed, message):
    told(tmp_path / "a", **changed)
    if message is None:
        xlora.load(tmp_path / "a")
        return
    with pytest.raises(jpeft.AdapterError, match=message) as caught:
        xlora.load(tmp_path / "a")
    assert len(str(caught.value)) < 2_000


@pytest.mark.parametrize("name", ["one", "x" * 1_000_000])
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (jpeft.IA3(), r"is a 'ia3' at 'q/kernel'; a mixture takes low-rank experts"),
        (jpeft.LoRA(rank=1, modules_to_save=["norm"]), r"replaces 'norm/scale' whole"),
    ],
    ids=["ia3", "replacement"],
)
def test_an_expert_that_can_not_be_mixed(tmp_path, spec, message, name):
    told(tmp_path / "a", names=json.dumps([name, "layers", "rest"]))
    params = {"q": {"kernel": jnp.ones((4, 4))}, "norm": {"scale": jnp.ones(4)}}
    jpeft.save(tmp_path / "a" / "expert-0.safetensors", jpeft.init(jax.random.key(0), spec, params))
    with pytest.raises(jpeft.AdapterError, match=message) as caught:
        xlora.load(tmp_path / "a")
    assert len(str(caught.value)) < 2_000


def test_folders_of_earlier_forms(tmp_path):
    made = mixture()
    told(tmp_path / "1")
    assert_equal(xlora.load(tmp_path / "1"), made)
    told(tmp_path / "2")
    main = tmp_path / "2" / "xlora.safetensors"
    tensors = load_file(main)
    names = {"spec": json.dumps({"hidden": 16}), "names": json.dumps(made.names)}
    metadata = {"format": "jpeft-xlora-2", **names}  # with a digest of its own, and none of the experts'
    save_file(tensors, main, metadata | {"digest": digest(tensors, metadata)})
    assert_equal(xlora.load(tmp_path / "2"), made)
    save_file(tensors, main, metadata | {"digest": digest(tensors, metadata)[::-1]})
    with pytest.raises(jpeft.AdapterError, match="has changed since it was written"):
        xlora.load(tmp_path / "2")


def test_the_metadata_is_parsed_as_often_for_many_experts_as_for_two(tmp_path, monkeypatch):
    calls, module = [], sys.modules["jpeft.xlora.save"]  # a function has that name in the package
    parse = module.parse_json_object
    monkeypatch.setattr(module, "parse_json_object", lambda *a, **k: calls.append(1) or parse(*a, **k))
    counts = []
    for names in (list(SCALINGS)[:2], list(SCALINGS)):
        xlora.save(tmp_path / "a", xlora.select(mixture(), names))
        calls.clear()
        xlora.load(tmp_path / "a")
        counts.append(len(calls))
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (np.float64, "which JAX would cast to float32 here"),
        (np.int64, "expected floats, found int64"),
        (np.bool_, "expected floats, found bool"),
        (np.complex64, "expected floats, found complex64"),
    ],
)
def test_a_classifier_of_another_dtype(tmp_path, dtype, message):
    told(tmp_path / "a")
    main = tmp_path / "a" / "xlora.safetensors"
    tensors = load_file(main)
    metadata = {"format": "jpeft-xlora-1", "spec": "{}", "names": '["a", "b", "c"]'}
    save_file(tensors | {"0/kernel": tensors["0/kernel"].astype(dtype)}, main, metadata)
    with pytest.raises(jpeft.AdapterError, match=f"'0/kernel'.*{message}"):
        xlora.load(tmp_path / "a")


def test_more_tensors_than_a_classifier_has(tmp_path):
    told(tmp_path / "a")
    metadata = {"format": "jpeft-xlora-1", "spec": "{}", "names": '["a", "b", "c"]'}
    save_file({f"{n}": np.ones(1, np.float32) for n in range(1_001)}, tmp_path / "a" / "xlora.safetensors", metadata)
    with pytest.raises(jpeft.AdapterError, match="expected at most 1000 tensors, found 1001"):
        xlora.load(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: {"names": ("\ud800", *made.names[1:])}, "'names': expected text, found half of a surrogate pair"),
        (lambda made: {"names": made.names * 100}, "'names': expected those of 1 to 256 experts"),
        (lambda made: {"classifier": made.classifier * 501}, "holds at most 1000 tensors; found 1002"),
    ],
    ids=["half a letter", "300 experts", "501 layers"],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, change, message):
    made = mixture()
    changed = made.replace(**change(made))
    changed = changed.replace(experts={name: made.experts["one"] for name in changed.names})
    with pytest.raises(jpeft.AdapterError, match=message):
        xlora.save(tmp_path / "a", changed)
    assert not (tmp_path / "a").exists()


def test_paths_with_numbers_of_any_length():
    params = {"l" + "1" * 5_000: {"kernel": jnp.ones((4, 4))}, "l²": {"kernel": jnp.ones((4, 4))}}
    expert = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=1), params)
    assert len(xlora.layers_of({"a": expert})) == 2


# What is refused


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"depth": 0}, "depth must be an integer >= 1; found 0"),
        ({"temperature": 0}, "temperature must be greater than 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"top_k": True}, "top_k must be an integer"),
        ({"softmax_topk": True}, "top_k is None; give top_k="),
        ({"top_k": 1, "scaling_pass_value": 0.5}, "no top 1 of them can be told"),
        ({"global_weight": float("nan")}, "global_weight must be a finite number"),
    ],
)
def test_specs_that_mean_nothing(options, told):
    with pytest.raises(jpeft.SpecError, match=told):
        XLoRA(**options)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (jpeft.DoRA(rank=1, targets=["q"]), "expert 'odd' is a 'dora' at 'layers/0/q/kernel'"),
        (jpeft.IA3(targets=["q"], feedforward=[]), "expert 'odd' is a 'ia3'"),
        (jpeft.LoRA(rank=1, targets=["q"], modules_to_save=["head"]), "expert 'odd' replaces 'head/kernel' whole"),
    ],
)
def test_experts_that_cannot_be_mixed(spec, told):
    odd = jpeft.init(jax.random.key(0), spec, PARAMS, kernels=KERNELS)
    with pytest.raises(jpeft.SpecError, match=told):
        mixture(chosen={"plain": experts()["one"], "odd": odd})
    with pytest.raises(jpeft.SpecError, match=told):
        xlora.add(mixture(), "odd", odd, jax.random.key(0))


def test_experts_that_are_none():
    with pytest.raises(jpeft.SpecError, match="a mixture needs at least 1 experts; found 0"):
        xlora.init(jax.random.key(0), XLoRA(), {}, features=D)
    with pytest.raises(jpeft.SpecError, match="top 4 needs at least 4 experts; found 3"):
        mixture(top_k=4)
    with pytest.raises(TypeError, match="expert 'a': expected an adapter"):
        xlora.init(jax.random.key(0), XLoRA(), {"a": jpeft.LoRA()}, features=D)
    with pytest.raises(jpeft.SpecError, match="there is an expert 'one' already"):
        xlora.add(mixture(), "one", experts()["one"], jax.random.key(0))
    with pytest.raises(jpeft.SpecError, match="expected some of the experts .*found 'two'"):
        xlora.select(mixture(), ["two"])


def test_a_mixture_cannot_be_merged():
    """No single kernel does what differs from token to token."""
    for call in (jpeft.merge, jpeft.apply, jpeft.attach):
        with pytest.raises(TypeError, match="differs from token to token, so no single weight does it"):
            call(PARAMS, mixture())


def test_runs_that_would_be_wrong():
    made = mixture()
    run = xlora.lift(model)
    with pytest.raises(jpeft.LiftError, match="a cache holds what one of the passes saw"):
        run(PARAMS, made, IDS, cache={})
    with pytest.raises(jpeft.LiftError, match="neither last_hidden_state nor hidden_states"):
        xlora.lift(lambda params, ids: model(params, ids).logits)(PARAMS, made, IDS)
    with pytest.raises(jpeft.LiftError, match=r"expected hidden states \(batch, tokens, 8\)"):
        xlora.lift(model, hidden=lambda output: output.logits)(PARAMS, made, IDS)
    with pytest.raises(TypeError, match=r"made by jpeft\.xlora\.init"):
        run(PARAMS, made.experts, IDS)
    with pytest.raises(jpeft.KernelError, match="has an adapter attached"):
        run(jpeft.attach(PARAMS, experts()["one"]), made, IDS)
