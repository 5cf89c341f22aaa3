"""The native file says of itself whether it is whole, and which base it is for."""

import json
import os
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft.digest import digest
from jpeft.save import parse


def base(seed):
    draw = np.random.default_rng(seed)
    return {name: {"kernel": jnp.asarray(draw.standard_normal((6, 4), np.float32))} for name in ("up", "down")}


@pytest.fixture
def adapter():
    new = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=2, targets=["up", "down"]), base(0))
    return new.replace(trained=jax.tree.map(lambda leaf: leaf + 0.5, new.trained))


def equal(found, expected):
    assert found.meta == expected.meta
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_every_byte_counts(tmp_path, adapter):
    file = tmp_path / "a.safetensors"
    jpeft.save(file, adapter, params=base(0))
    whole, draw = file.read_bytes(), np.random.default_rng(0)
    for place in range(len(whole)):
        bits = bytearray(whole)
        bits[place] ^= 1 << int(draw.integers(8))
        file.write_bytes(bits)
        with pytest.raises(jpeft.AdapterError):
            jpeft.load(file, params=base(0))
    file.write_bytes(whole)
    equal(jpeft.load(file, params=base(0)), adapter)


def test_another_base_of_the_same_shapes(tmp_path, adapter):
    file = tmp_path / "a.safetensors"
    jpeft.save(file, adapter, params=base(0))
    with pytest.raises(jpeft.AdapterError, match=r"another base.*leave out params="):
        jpeft.load(file, params=base(1))
    equal(jpeft.load(file), adapter)
    equal(jpeft.load(file, params=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base(0))), adapter)
    one_weight_is_anothers = base(0) | {"down": base(1)["down"]}
    with pytest.raises(jpeft.AdapterError, match="another base"):
        jpeft.load(file, params=one_weight_is_anothers)


def test_a_base_without_values_is_no_witness(tmp_path, adapter):
    file = tmp_path / "a.safetensors"
    jpeft.save(file, adapter, params=base(0))
    equal(jpeft.load(file, params=jax.eval_shape(lambda: base(1))), adapter)


def test_files_of_before_there_was_a_digest(tmp_path, adapter):
    new, old = tmp_path / "new.safetensors", tmp_path / "old.safetensors"
    jpeft.save(new, adapter)
    save_file(load_file(new), old, {"format": "jpeft-1", "meta": metadata(new)["meta"]})
    equal(jpeft.load(old), adapter)


def metadata(file):
    data = file.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path)])
def test_what_is_no_file(tmp_path, make):
    make(tmp_path / "a.safetensors")
    with pytest.raises(jpeft.AdapterError, match="a pipe|a folder|can't be read"):
        jpeft.load(tmp_path / "a.safetensors")


def described(adapter, change):
    """A file whose digest is right, of tensors and metadata that are changed."""
    tensors = {f"trained|{path}|{n}": np.asarray(a) for path, ls in adapter.trained.items() for n, a in ls.items()}
    tensors |= {f"constant|{path}|{n}": np.asarray(a) for path, ls in adapter.constant.items() for n, a in ls.items()}
    meta = {"method": "lora", "spec": asdict(adapter.spec), "sites": [asdict(site) for site in adapter.sites]}
    change(meta, tensors)
    told = {"format": "jpeft-2", "meta": json.dumps(meta)}
    return tensors, told | {"digest": digest(tensors, told)}


def renamed(tensors, old, new):
    for key in [key for key in tensors if key.endswith(f"|{old}")]:
        tensors[f"{key.removesuffix(old)}{new}"] = tensors.pop(key)


def many_kinds(meta, tensors):
    """As many sites as a header holds, each of a shape of its own: to look at each kind takes a millisecond."""
    one = meta["sites"][0]
    for n in range(2_000):
        kernel = one["kernel"] | {"shape": (n + 1, 4)}
        meta["sites"].append(one | {"path": f"p{n}/kernel", "kernel": kernel})
        tensors[f"trained|p{n}/kernel|a"] = np.zeros((n + 1, 2), np.float32)
        tensors[f"trained|p{n}/kernel|b"] = np.zeros((2, 4), np.float32)
        tensors[f"constant|p{n}/kernel|scaling"] = np.ones((), np.float32)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda meta, tensors: None, None),
        (lambda meta, tensors: meta["spec"].update(rank="2"), r"field 'rank': expected int, found '2'"),
        (lambda meta, tensors: meta["spec"].update(rank=True), r"field 'rank': expected int, found True"),
        (lambda meta, tensors: meta["spec"].update(rank_stabilized="false"), r"expected bool, found 'false'"),
        (lambda meta, tensors: meta["spec"].update(more=1), r"unknown field 'more'"),
        (lambda meta, tensors: meta.update(method="os.system"), r"unknown method 'os.system'"),
        (lambda meta, tensors: meta["sites"][0].update(method="ia3"), r"has the method 'ia3', in an adapter of 'lora'"),
        (lambda meta, tensors: meta["sites"][0].update(rank=1 << 40), r"no such rank"),
        (lambda meta, tensors: meta["sites"][0]["kernel"].update(shape=[1 << 40, 1 << 40]), r"the shape of a weight"),
        (lambda meta, tensors: renamed(tensors, "a", "c"), r"expected the leaves \['a', 'b'.*found \['b', 'c'"),
        (many_kinds, r"expected at most 500 kinds of weights"),
    ],
)
def test_what_a_file_may_say(adapter, change, told):
    tensors, metadata = described(adapter, change)
    if told is None:
        equal(parse("f", tensors, metadata), adapter)
        return
    with pytest.raises(jpeft.AdapterError, match=told):
        parse("f", tensors, metadata)
