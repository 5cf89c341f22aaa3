import json
import os
import pickle
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from jpeft.errors import AdapterError, JpeftError, WeightsError
from jpeft_interop.weights import LazyArray, read_json_object, read_safetensors, read_weights, write_weights

TORCH_DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
]


def raw(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).tobytes()


def torch_raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_tensors(seed=0):
    torch.manual_seed(seed)
    tensors = {str(dtype): (torch.randn(3, 5) * 100).to(dtype) for dtype in TORCH_DTYPES}
    return tensors | {"scalar": torch.randn(()), "empty": torch.zeros(0, 7), "odd": torch.randn(3).to(torch.float16)}


def test_what_safetensors_writes_is_read_bit_for_bit(tmp_path):
    tensors = random_tensors()
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    read, metadata = read_safetensors(tmp_path / "model.safetensors")
    assert metadata == {"format": "pt"} and set(read) == set(tensors)
    for key, tensor in tensors.items():
        assert read[key].shape == tuple(tensor.shape) == read.spec(key).shape
        assert read[key].dtype == read.spec(key).dtype and read[key].dtype.name == str(tensor.dtype)[6:]
        assert raw(read[key]) == torch_raw(tensor) and not (tensor.numel() and read[key].flags.writeable)


def test_what_is_written_here_safetensors_reads_bit_for_bit(tmp_path):
    tensors = random_tensors(1)
    safetensors.torch.save_file(tensors, tmp_path / "in.safetensors")
    arrays, _ = read_safetensors(tmp_path / "in.safetensors")
    write_weights(tmp_path, arrays.items())
    back = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert set(back) == set(tensors)
    assert all(
        torch_raw(back[key]) == torch_raw(tensors[key]) and back[key].dtype == tensors[key].dtype for key in back
    )
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_every_tensor_begins_at_its_item_size(tmp_path):
    write_weights(tmp_path, [("a", np.ones(3, np.int8)), ("b", np.ones(2)), ("c", np.ones(1, ml_dtypes.bfloat16))])
    read, _ = read_safetensors(tmp_path / "model.safetensors")
    assert all(array.flags.aligned for array in read.values())


def test_shards_and_index(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {f"w{i}": rng.standard_normal((10, 10)).astype(np.float32) for i in range(5)}
    write_weights(tmp_path, tensors.items(), max_shard_bytes=900)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 2000} and len(set(index["weight_map"].values())) == 3
    weights = read_weights(tmp_path)
    assert set(weights) == set(tensors)
    for key, array in tensors.items():
        np.testing.assert_array_equal(weights[key], array)
        assert weights.file(key).endswith(index["weight_map"][key])


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path):
    write_weights(
        tmp_path, [(f"w{i}", np.ones(size, np.int8)) for i, size in enumerate([5, 50, 5])], max_shard_bytes=10
    )
    assert len(list(tmp_path.glob("model-0000?-of-00003.safetensors"))) == 3


def test_release_keeps_arrays_valid(tmp_path):
    data = np.arange(100_000, dtype=np.int32)
    write_weights(tmp_path, [("a", np.ones(5, np.int32)), ("b", data), ("c", np.ones(5, np.int32))])
    weights = read_weights(tmp_path)
    array = weights["b"]
    assert array.sum() == data.sum()
    for key in weights:
        weights.release(key)
    np.testing.assert_array_equal(array, data)
    np.testing.assert_array_equal(weights["c"], 1)


def test_writing_copies_one_tensor_at_a_time(tmp_path):
    size, count = 1_000_000, 12
    lazy = [
        (f"w{i}", LazyArray((size,), np.dtype(np.int8), lambda i=i: np.full(size, i, np.int8))) for i in range(count)
    ]
    tracemalloc.start()
    try:
        write_weights(tmp_path, lazy)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * size
    weights = read_weights(tmp_path)
    assert [int(weights[f"w{i}"][0]) for i in range(count)] == list(range(count))


def test_jax_arrays_are_written(tmp_path):
    key = jax.random.key(0)
    params = {"a": jax.random.normal(key, (4, 3), jnp.bfloat16), "b": jax.random.normal(key, (4, 3)).T}
    write_weights(tmp_path, params.items())
    weights = read_weights(tmp_path)
    assert all(raw(weights[name]) == raw(np.asarray(params[name])) for name in params)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("a", np.ones(2)), ("a", np.ones(2))], "'a' comes twice"),
        ([("a", np.ones(2, np.complex128))], "'a'.*complex128"),
        ([("a", np.ones(2, ">f4"))], "'a'"),
        ([("a", np.array(["x"]))], "'a'"),
        ([("a", LazyArray((2,), np.dtype("f4"), lambda: np.ones(3, "f4")))], r"'a'.*\(2,\).*\(3,\)"),
    ],
)
def test_what_can_not_be_written_is_refused(tmp_path, tensors, message):
    with pytest.raises(WeightsError, match=message):
        write_weights(tmp_path, tensors)


def test_weights_are_not_written_beside_others(tmp_path):
    write_weights(tmp_path, [("a", np.ones(2))])
    with pytest.raises(WeightsError, match="model.safetensors"):
        write_weights(tmp_path, [("b", np.ones(2))])
    assert set(read_weights(tmp_path)) == {"a"}


def blob(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


GOOD = entry()
HOSTILE = {
    "empty": (b"", "truncated"),
    "seven bytes": (b"\0" * 7, "truncated"),
    "no header": (b"\0" * 8, "not valid JSON"),
    "header beyond the file": (blob({}, length=10_000), "truncated"),
    "header of 2**63": (blob({}, length=2**63), "truncated"),
    "a zip": (b"PK\3\4" + b"\0\0\7\7" * 10, "pickle"),
    "a pickle": (pickle.dumps({"a": [1.0] * 9}, 2), "pickle"),
    "not UTF-8": (blob(b'{"\xff": 1}'), "UTF-8"),
    "not JSON": (blob(b"{'a': 1}"), "not valid JSON"),
    "a list": (blob([1]), "expected a JSON object, found a list"),
    "a number": (blob(b"17"), "found a number"),
    "deep": (blob(b"[" * 100_000), "nested too deeply|not valid JSON"),
    "a huge number": (blob(b'{"a": ' + b"1" * 10_000 + b"}"), "not valid JSON"),
    "a key twice": (blob(b'{"a": 1, "a": 2}'), "'a' stands there twice"),
    "a field twice": (blob(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "'dtype' stands there twice"),
    "NaN": (blob(b'{"a": NaN}'), "NaN is no JSON"),
    "metadata of numbers": (blob({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata a list": (blob({"__metadata__": []}), "__metadata__"),
    "entry a list": (blob({"a": []}), "'a': expected an object"),
    "entry without dtype": (blob({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"1234"), "'a': expected an object"),
    "entry with more": (blob({"a": GOOD | {"x": 1}}, b"1234"), "'a': expected an object"),
    "unknown dtype": (blob({"a": entry("F33")}, b"1234"), "'F33' is not known"),
    "dtype a list": (blob({"a": entry([])}, b"1234"), "is not known"),
    "negative size": (blob({"a": entry(shape=(-1,))}, b"1234"), "sizes, found"),
    "fractional size": (blob({"a": entry(shape=(1.0,))}, b"1234"), "no integer"),
    "boolean size": (blob({"a": entry(shape=(True,))}, b"1234"), "sizes, found"),
    "overflowing shape": (blob({"a": entry(shape=(2**32, 2**32, 0), offsets=(0, 0))}), "sizes, found"),
    "too many axes": (blob({"a": entry(shape=(1,) * 100)}, b"1234"), "sizes, found"),
    "one offset": (blob({"a": entry(offsets=(0,))}, b"1234"), "two data_offsets"),
    "offsets swapped": (blob({"a": entry(offsets=(4, 0))}, b"1234"), "span -4"),
    "negative offset": (blob({"a": entry(offsets=(-4, 0))}, b"1234"), "two data_offsets"),
    "wrong span": (blob({"a": entry(shape=(2,))}, b"1234"), "8 bytes, but"),
    "offsets beyond the file": (blob({"a": entry(offsets=(4, 8))}, b"1234"), "hole|truncated"),
    "a hole": (blob({"a": GOOD, "b": entry(offsets=(8, 12))}, b"1" * 12), "'b' leaves a hole"),
    "an overlap": (blob({"a": GOOD, "b": GOOD}, b"1234"), "overlaps"),
    "truncated data": (blob({"a": GOOD, "b": entry(offsets=(4, 8))}, b"1" * 6), "truncated: expected"),
    "more data": (blob({"a": GOOD}, b"1" * 5), "after the last tensor"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_give_one_typed_error(tmp_path, name):
    data, message = HOSTILE[name]
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    for error in (AdapterError, WeightsError):
        with pytest.raises(JpeftError, match=message) as caught:
            read_safetensors(file, error)
        assert type(caught.value) is error and "model.safetensors" in str(caught.value)
    with pytest.raises(WeightsError, match=message):
        read_weights(tmp_path)


def test_a_header_as_long_as_a_pickle_opcode_is_no_pickle(tmp_path):
    header = json.dumps({"a": GOOD}).encode()
    (tmp_path / "a.safetensors").write_bytes(blob(header + b" " * (0x280 - len(header)), b"1234"))
    assert list(read_safetensors(tmp_path / "a.safetensors")[0]) == ["a"]


def test_an_overlong_header_is_refused(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(blob({"a": GOOD}, b"1234"))
    with pytest.raises(AdapterError, match="by byte 16"):
        read_safetensors(tmp_path / "a.safetensors", header_bytes=16)


def test_every_truncation_and_every_flipped_byte_of_a_header_is_an_error_or_reads(tmp_path):
    file = tmp_path / "a.safetensors"
    whole = blob({"w": entry(shape=(2,), offsets=(0, 8)), "v": entry("BF16", (3,), (8, 14))}, bytes(14))
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(AdapterError):
            read_safetensors(file)
    rng = np.random.default_rng(0)
    for position in range(len(whole) - 14):
        data = bytearray(whole)
        data[position] ^= int(rng.integers(1, 256))
        file.write_bytes(data)
        try:
            tensors, _ = read_safetensors(file)
        except AdapterError:
            continue
        assert sum(array.nbytes for array in tensors.values()) == 14


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin", "x.pt", "x.pth", "x.ckpt", "x.pkl"])
def test_pickles_are_never_read(tmp_path, name):
    (tmp_path / name).write_bytes(blob({"a": GOOD}, b"1234"))
    with pytest.raises(AdapterError, match="never read.*safetensors"):
        read_safetensors(tmp_path / name)
    with pytest.raises(WeightsError, match=f"{name}.*never read.*save_pretrained"):
        read_weights(tmp_path)


def test_only_ordinary_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    cases = {"pipe": "a pipe", "folder": "a folder", "link": "No such file", "absent": "No such file"}
    for read in (read_safetensors, read_json_object):
        for name, message in cases.items():
            with pytest.raises(AdapterError, match=f"{name}.*{message}"):
                read(tmp_path / name)
        with pytest.raises(AdapterError, match="a device"):
            read("/dev/zero")


def test_a_link_to_a_file_is_followed(tmp_path):
    write_weights(tmp_path, [("a", np.ones(2))])
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(tmp_path / "model.safetensors")
    assert set(read_weights(tmp_path / "snapshot")) == {"a"}


def sharded(tmp_path):
    write_weights(tmp_path, [("a", np.ones(4)), ("b", np.ones(4))], max_shard_bytes=32)
    return tmp_path / "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(a="../model-00001-of-00002.safetensors"), r"'a'.*same folder.*\.\./model"),
        (lambda m: m.update(a="/etc/passwd"), "'a'.*same folder"),
        (lambda m: m.update(a="..\\x.safetensors"), "'a'.*same folder"),
        (lambda m: m.update(a=".."), "'a'.*same folder"),
        (lambda m: m.update(a=""), "'a'.*same folder"),
        (lambda m: m.update(a=7), "'a'.*same folder"),
        (lambda m: m.update(a="x\0.safetensors"), "'a'.*same folder"),
        (lambda m: m.update(a="model.bin"), "'a'.*safetensors file"),
        (lambda m: m.update(a="model-00003-of-00003.safetensors"), "model-00003-of-00003.safetensors.*No such file"),
        (lambda m: m.update(a="model-00002-of-00002.safetensors"), "'a' in model-00002.*does not hold"),
        (lambda m: m.update(c="model-00002-of-00002.safetensors"), "'c' in model-00002.*does not hold"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, change, message):
    index = sharded(tmp_path)
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=message):
        read_weights(tmp_path)


def test_a_shard_with_an_unlisted_key_is_refused(tmp_path):
    write_weights(tmp_path, [(name, np.ones(4)) for name in "abc"], max_shard_bytes=64)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["a"]
    index.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match="'a'.*nowhere"):
        read_weights(tmp_path)


@pytest.mark.parametrize("content", ["[]", '{"weight_map": []}', "{}", "{"])
def test_an_index_of_another_form_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(WeightsError, match="index.json"):
        read_weights(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="holds neither"):
        read_weights(tmp_path)
    with pytest.raises(WeightsError, match="expected a folder"):
        read_weights(tmp_path / "absent")


def test_json_objects(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"a": [1, null, "ü"]}', encoding="utf-8")
    assert read_json_object(file) == {"a": [1, None, "ü"]}
    with pytest.raises(WeightsError, match="at most 5 bytes"):
        read_json_object(file, WeightsError, limit=5)


def test_reading_and_writing_import_no_torch():
    code = "import sys, jpeft_interop.weights; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
