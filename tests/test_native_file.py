"""The native file says of itself whether it is whole, and which base it is for."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jpeft


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
