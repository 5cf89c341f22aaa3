"""Broken and foreign adapter folders: one typed error that names file, key, expected and found; nothing applied."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft_interop import load_peft, save_peft

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FIRST = "base_model.model.block.q_proj.lora_A.weight"


@pytest.fixture
def params():
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    return {"block": {"q_proj": {"kernel": draw(0, 6, 4), "bias": draw(1, 4)}, "v_proj": {"kernel": draw(2, 6, 4)}}}


@pytest.fixture
def folder(tmp_path, params, key):
    adapter = jpeft.init(key, jpeft.LoRA(rank=2, alpha=3, targets=["q_proj", "v_proj"]), params)
    save_peft(tmp_path / "adapter", adapter, params=params)
    load_peft(tmp_path / "adapter", params)
    return tmp_path / "adapter"


def refused(folder, params, *words):
    with pytest.raises(jpeft.AdapterError) as caught:
        load_peft(folder, params)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def change_config(folder, **fields):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))
    change_tensors(folder, lambda tensors: None)  # and so the digest is gone, as from a stranger's file


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("keep", [0, 7, 50, -1])
def test_truncated_weights(folder, params, keep):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    refused(folder, params, WEIGHTS)


def test_weights_with_something_after_them(folder, params):
    with open(folder / WEIGHTS, "ab") as file:
        file.write(b"more")
    refused(folder, params, WEIGHTS)


def test_a_header_that_claims_the_world(folder, params):
    (folder / WEIGHTS).write_bytes((2**60).to_bytes(8, "little") + b"{}")
    refused(folder, params, WEIGHTS)


def test_a_pickle_is_never_read(folder, params):
    os.rename(folder / WEIGHTS, folder / "adapter_model.bin")
    refused(folder, params, "adapter_model.bin", "safe_serialization=True")
    (folder / WEIGHTS).write_bytes(b"PK\x03\x04" + b"0" * 100)
    refused(folder, params, WEIGHTS)


@pytest.mark.parametrize("text", ["", "[1, 2]", "3", "{", '{"r": 1, "r": 2}', "null", "\ud800"])
def test_a_config_that_is_no_object(folder, params, text):
    (folder / CONFIG).write_text(text, errors="surrogatepass")
    refused(folder, params, CONFIG)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file(folder, params, name):
    (folder / name).unlink()
    refused(folder, params, name)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_fifo_does_not_hang(folder, params, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, params, name)


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("peft_type", "LOHA", "LOHA"),
        ("peft_type", None, "None"),
        ("rr", 3, "'r'"),
        ("r", "8", "integer"),
        ("r", -1, "integer"),
        ("r", True, "integer"),
        ("lora_alpha", None, "number"),
        ("lora_dropout", 1.5, "[0, 1)"),
        ("bias", "some", "lora_only"),
        ("target_modules", None, "list of strings"),
        ("target_modules", [1], "list of strings"),
        ("rank_pattern", {"q_proj": 1.5}, "integers"),
        ("use_dora", 1, "true or false"),
        ("use_bdlora", True, "not supported"),
        ("target_parameters", ["w"], "no stacked kernel"),
        ("layer_replication", [[0, 1]], "not supported"),
        ("init_lora_weights", "pissa", "path_initial_model_for_weight_conversion"),
    ],
)
def test_a_field_that_means_nothing_here(folder, params, field, value, word):
    change_config(folder, **{field: value})
    refused(folder, params, CONFIG, field, word)


def test_a_missing_factor(folder, params):
    change_tensors(folder, lambda tensors: tensors.pop(FIRST))
    refused(folder, params, FIRST, "missing")


def test_a_missing_target(folder, params):
    change_tensors(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if "q_proj" in key])
    refused(folder, params, "block.q_proj", "missing")


def test_factors_of_no_target(folder, params):
    change_config(folder, target_modules=["q_proj"])
    refused(folder, params, "block.v_proj", "no target")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("base_model.model.", "model.", ("base_model.model.",)),
        ("base_model.model.", "base_model.model.base_model.model.", ("base_model.model.block.q_proj", "nearest")),
        ("q_proj", "q_porj", ("q_porj", "block.q_proj")),
    ],
)
def test_keys_that_fit_no_param(folder, params, old, new, words):
    def rename(tensors):
        for key in list(tensors):
            tensors[key.replace(old, new, 1)] = tensors.pop(key)

    change_tensors(folder, rename)
    refused(folder, params, WEIGHTS, *words)


def test_an_unexpected_tensor(folder, params):
    change_tensors(folder, lambda tensors: tensors.update({"base_model.model.block.q_proj.lora_E": np.ones(3)}))
    refused(folder, params, "lora_E")


@pytest.mark.parametrize("shape", [(3, 6), (2, 5), (2,), (2, 6, 1), (0, 6), ()])
def test_a_wrong_shape(folder, params, shape):
    change_tensors(folder, lambda tensors: tensors.update({FIRST: np.ones(shape, np.float32)}))
    refused(folder, params, WEIGHTS, "block.q_proj")


def test_integers_for_factors(folder, params):
    change_tensors(folder, lambda tensors: tensors.update({FIRST: np.ones((2, 6), np.int32)}))
    refused(folder, params, FIRST, "int32")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(folder, params, value, tmp_path, key):
    change_tensors(folder, lambda tensors: tensors[FIRST].__setitem__((0, 0), value))
    refused(folder, params, FIRST, "finite")
    adapter = jpeft.init(key, jpeft.LoRA(rank=2, targets=["q_proj"]), params)
    broken = adapter.replace(trained=jax.tree.map(lambda leaf: leaf.at[0, 0].set(value), adapter.trained))
    with pytest.raises(jpeft.AdapterError, match="finite"):
        save_peft(tmp_path / "new", broken, params=params)
    with pytest.raises(jpeft.AdapterError, match="finite"):
        jpeft.save(tmp_path / "new.safetensors", broken)
    with pytest.raises(jpeft.MergeError, match="finite"):
        jpeft.merge(params, broken)
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.safetensors").exists()


def test_what_jax_would_cast(folder, params):
    """1e300 is finite in float64, and an infinity in float32."""
    change_tensors(folder, lambda tensors: tensors.update({FIRST: np.full((2, 6), 1e300)}))
    refused(folder, params, FIRST, "float64", "float32", "jax_enable_x64")
    with jax.enable_x64(True):
        assert load_peft(folder, params).trained["block/q_proj/kernel"]["a"].dtype == np.float64


BIAS, INNER = "base_model.model.block.q_proj.bias", "base_model.model.block.q_proj.base_layer.bias"


def test_two_keys_for_one_param(folder, params):
    change_config(folder, bias="lora_only")
    change_tensors(folder, lambda tensors: tensors.update(biases(0)))
    assert load_peft(folder, params).trained["block/q_proj/bias"]["value"][0] == 0
    change_tensors(folder, lambda tensors: tensors.update({INNER: np.ones(4, np.float32)}))
    refused(folder, params, BIAS, INNER, "are one param, and hold different values")


def biases(value):
    return {key: np.full(4, value, np.float32) for key in (BIAS, INNER)}


def test_the_copy_of_what_is_trained_whole(folder, params):
    """PEFT has left the base's own beside it, and never used it; where nothing is trained whole, none is there."""
    trained, copy = (f"base_model.model.head.{name}.weight" for name in ("modules_to_save", "original_module"))
    params = params | {"head": {"kernel": jnp.ones((4, 3))}}
    whole = {trained: np.ones((3, 4), np.float32), copy: np.zeros((3, 4), np.float32)}
    change_tensors(folder, lambda tensors: tensors.update(whole))
    refused(folder, params, "head")
    change_config(folder, modules_to_save=["head"])
    assert load_peft(folder, params).trained["head/kernel"]["value"][0, 0] == 1
    change_tensors(folder, lambda tensors: tensors.update({copy: np.zeros((1, 4), np.float32)}))
    refused(folder, params, copy, "expected shape (3, 4), found (1, 4)")
    change_config(folder, modules_to_save=None)
    change_tensors(folder, lambda tensors: tensors.pop(trained))
    refused(folder, params, copy, "its module is none of 'modules_to_save'")


def test_the_bases_own_weight_where_there_is_only_its_shape(folder, params):
    key = "base_model.model.block.q_proj.base_layer.weight"
    change_tensors(
        folder, lambda tensors: tensors.update({key: np.asarray(params["block"]["q_proj"]["kernel"]).T.copy()})
    )
    load_peft(folder, params)
    refused(folder, jax.eval_shape(lambda: params), key, "is only a shape, which can't be compared")


def test_another_base(folder):
    wider = {"block": {"q_proj": {"kernel": jnp.ones((8, 4))}, "v_proj": {"kernel": jnp.ones((6, 4))}}}
    refused(folder, wider, "(2, 8)")
    refused(folder, {"block": {"v_proj": {"kernel": jnp.ones((6, 4))}}}, "q_proj")


def test_a_bias_that_should_be_there(folder, params):
    change_config(folder, bias="lora_only")
    refused(folder, params, "base_model.model.block.q_proj.bias", "missing")


def test_the_native_file(tmp_path, params, key):
    file = tmp_path / "adapter.safetensors"
    jpeft.save(file, jpeft.init(key, jpeft.LoRA(rank=2, targets=["q_proj"]), params))
    data = file.read_bytes()
    for broken in (data[:-1], data[:9], b"", data + b"x"):
        file.write_bytes(broken)
        with pytest.raises(jpeft.AdapterError, match="adapter.safetensors"):
            jpeft.load(file)
    with pytest.raises(OSError, match="no such file"):
        jpeft.load(tmp_path / "none")


def test_a_peft_file_is_not_a_native_one(folder):
    with pytest.raises(jpeft.AdapterError, match="load_peft"):
        jpeft.load(folder / WEIGHTS)
