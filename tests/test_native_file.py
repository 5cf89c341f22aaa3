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


def many_shapes(meta, tensors):
    """Each of a shape of its own, for each of which JAX would compile something, if asked."""
    one = meta["sites"][0]
    for n in range(2_000):
        kernel = one["kernel"] | {"shape": (n + 1, 4)}
        meta["sites"].append(one | {"path": f"p{n}/kernel", "kernel": kernel})
        tensors[f"trained|p{n}/kernel|a"] = np.zeros((n + 1, 2), np.float32)
        tensors[f"trained|p{n}/kernel|b"] = np.zeros((2, 4), np.float32)
        tensors[f"constant|p{n}/kernel|scaling"] = np.ones((), np.float32)


def cast(tensors, leaf, dtype):
    for key in [key for key in tensors if key.endswith(f"|{leaf}")]:
        tensors[key] = tensors[key].astype(dtype)


def test_as_many_shapes_as_weights(adapter, caplog):
    with jax.log_compiles(), caplog.at_level("WARNING"):
        found = parse("f", *described(adapter, many_shapes))
    assert len(found.sites) == 2_002
    assert "Compiling" not in caplog.text


def test_what_float64_holds(tmp_path, adapter):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 1e300, jnp.float64), adapter)
        jpeft.save(tmp_path / "a.safetensors", wide)
        equal(jpeft.load(tmp_path / "a.safetensors"), wide)
    with pytest.raises(jpeft.AdapterError, match=r"is float64, which JAX would cast to float32 here: turn it on"):
        jpeft.load(tmp_path / "a.safetensors")


def test_a_dtype_that_the_format_has_no_name_for(tmp_path, adapter):
    other = jax.tree.map(lambda leaf: leaf.astype(jnp.float8_e4m3b11fnuz), adapter)
    with pytest.raises(jpeft.AdapterError, match="no name for float8_e4m3b11fnuz; nothing was written"):
        jpeft.save(tmp_path / "a.safetensors", other)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda params: params.pop("down"), r"acts on 'down/kernel'; the params have 'up/kernel'"),
        (lambda params: params.update(down={"kernel": jnp.ones((6, 5))}), r"in the params it is \(6, 5\)"),
    ],
)
def test_a_base_that_it_does_not_fit(tmp_path, adapter, change, told):
    file, other = tmp_path / "a.safetensors", base(0)
    jpeft.save(file, adapter, params=base(0))
    change(other)
    with pytest.raises(jpeft.AdapterError, match=told):
        jpeft.load(file, params=other)


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
        (lambda meta, tensors: meta["sites"][0].update(path="p/" * 600), r"a path of at most 1000 characters"),
        (lambda meta, tensors: meta["sites"].extend([{}] * 400_000), r"expected at most 400000 values"),
        (lambda meta, tensors: meta["spec"].update(bias=[[[[[[]]]]]]), r"nested too deeply: expected at most 6"),
        (lambda meta, tensors: meta["spec"].update(targets=["a"] * 60_000), r"'targets': expected at most 50000"),
        (lambda meta, tensors: cast(tensors, "scaling", np.complex64), r"expected floats, found complex64"),
        (lambda meta, tensors: cast(tensors, "scaling", np.bool_), r"expected floats, found bool"),
        (lambda meta, tensors: cast(tensors, "a", np.float64), r"is float64, which JAX would cast to float32 here"),
    ],
)
def test_what_a_file_may_say(adapter, change, told):
    tensors, metadata = described(adapter, change)
    if told is None:
        equal(parse("f", tensors, metadata), adapter)
        return
    with pytest.raises(jpeft.AdapterError, match=told):
        parse("f", tensors, metadata)
