from __future__ import annotations

import tracemalloc
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft.finite import is_finite
from jpeft.methods import METHODS
from jpeft.methods import SPECS as SAVED
from jpeft.tree import flatten
from jpeft_interop.abstract import abstract_params
from jpeft_interop.blocks import Blocks, run
from jpeft_interop.load_model import load_model
from jpeft_interop.merge_folder import merge_folder
from jpeft_interop.merge_rows import _multiply
from jpeft_interop.models import build, pure
from jpeft_interop.save_model import save_model
from jpeft_interop.torch_table import nest
from jpeft_interop.weights import write_weights

streaming = import_module("jpeft_interop.merge_folder")
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "tie_word_embeddings": False,
}
NAMES = ["q_proj", "v_proj", "down_proj", "embed_tokens"]
SPECS = {
    "lora": jpeft.LoRA(rank=5, alpha=3, targets=NAMES),
    "no rank": jpeft.LoRA(rank=4, targets=NAMES, rank_pattern={"down_proj": 0}),
    "adalora": jpeft.AdaLoRA(rank=5, target_rank=2, targets=NAMES[:3]),
    "dora": jpeft.DoRA(rank=5, alpha=3, targets=NAMES[:3]),
    "ia3": jpeft.IA3(targets=NAMES[:3], feedforward=["down_proj"]),
}


def written(folder: Path, draw: Any, dtype: Any = jnp.float32, **config: Any) -> tuple[Any, Any]:
    """A base in a folder, and its params as they are loaded from there."""
    abstract = abstract_params(LLAMA | config)
    keys = jax.random.split(jax.random.key(0), len(abstract))
    params = {
        path: draw(key, leaf.shape).astype(dtype) for key, (path, leaf) in zip(keys, abstract.items(), strict=True)
    }
    save_model(folder, nest(params), LLAMA | config)
    return load_model(folder)


def trained(spec: Any, params: Any, draw: Any) -> jpeft.Adapter:
    adapter = jpeft.init(jax.random.key(1), spec, params)
    leaves, tree = jax.tree.flatten(adapter.trained)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    new = [draw(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return adapter.replace(trained=jax.tree.unflatten(tree, new))


def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return 0.3 * jax.random.normal(key, shape)


def whole(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.randint(key, shape, -9, 10).astype(jnp.float32)


def merged(tmp_path: Path, params: Any, adapter: jpeft.Adapter) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `merge_folder` writes, and what `jpeft.merge` makes."""
    jpeft.save(tmp_path / "adapter.safetensors", adapter)
    merge_folder(tmp_path / "base", tmp_path / "adapter.safetensors", tmp_path / "out")
    return flatten(load_model(tmp_path / "out")[1]), flatten(jpeft.merge(params, adapter))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces a block and several blocks a tensor, none of them a divisor of it."""
    monkeypatch.setattr(streaming, "BLOCK", 32 * 11)
    monkeypatch.setattr(streaming, "PIECE", 32 * 3)


@pytest.fixture
def no_whole_leaf(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError(f"made as a whole: {arguments[1]}")

    monkeypatch.setattr(streaming, "_made", refuse)


@pytest.mark.usefixtures("small_blocks", "no_whole_leaf")
@pytest.mark.parametrize("name", SPECS)
def test_rows_are_what_merge_makes(name: str, tmp_path: Path) -> None:
    _, params = written(tmp_path / "base", normal)
    found, expected = merged(tmp_path, params, trained(SPECS[name], params, normal))
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-6, atol=1e-6, err_msg=path)
    changed = [path for path in expected if not np.array_equal(found[path], flatten(params)[path])]
    assert len(changed) == {"lora": 7, "no rank": 5}.get(name, 6)


@pytest.mark.usefixtures("small_blocks", "no_whole_leaf")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_lora_of_whole_numbers_is_the_same_to_the_bit(dtype: Any, tmp_path: Path) -> None:
    # Every sum is exact in fp32 in any order, and most are too long for 16 bits: one rounding, or it shows.
    _, params = written(tmp_path / "base", whole, dtype)
    adapter = trained(jpeft.LoRA(rank=6, alpha=3, targets=NAMES), params, whole)
    found, expected = merged(tmp_path, params, adapter)
    for path, leaf in expected.items():
        assert found[path].dtype == dtype
        np.testing.assert_array_equal(np.asarray(found[path], np.float32), np.asarray(leaf, np.float32), path)


def test_dora_of_an_embedding_goes_the_other_way(tmp_path: Path) -> None:
    _, params = written(tmp_path / "base", normal)
    adapter = trained(jpeft.DoRA(rank=3, targets=["embed_tokens"]), params, normal)
    found, expected = merged(tmp_path, params, adapter)
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_base_that_is_not_finite_is_refused(value: float, tmp_path: Path) -> None:
    _, params = written(tmp_path / "base", normal, jnp.bfloat16)
    jpeft.save(tmp_path / "adapter.safetensors", trained(SPECS["lora"], params, normal))
    path = tmp_path / "base" / "model.safetensors"
    written_bytes = bytearray(path.read_bytes())
    written_bytes[-2:] = np.array(value, ml_dtypes.bfloat16).tobytes()  # in the last tensor by name, a norm's weight
    path.write_bytes(written_bytes)
    with pytest.raises(jpeft.JpeftError, match="norm/weight' holds values that are not finite"):
        merge_folder(tmp_path / "base", tmp_path / "adapter.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_weight_is_in_memory_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BLOCK", 1 << 14)
    monkeypatch.setattr(streaming, "PIECE", 1 << 12)
    _, params = written(tmp_path / "base", normal, vocab_size=40_000, num_hidden_layers=1)
    weight = flatten(params)["model/embed_tokens/embedding"].nbytes
    jpeft.save(tmp_path / "a.safetensors", trained(jpeft.LoRA(rank=1, targets=["lm_head", "q_proj"]), params, normal))
    del params
    tracemalloc.start()
    try:
        merge_folder(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out", on_start=_forget_the_peak)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < weight / 4


def _forget_the_peak(tensors: int) -> None:
    assert tensors == 12
    tracemalloc.reset_peak()


@pytest.mark.parametrize("shape", [(1, 1, 1), (16, 3, 5), (35, 0, 7), (33, 9, 4000), (40, 300, 129), (0, 2, 3)])
def test_products_in_parts(shape: tuple[int, int, int]) -> None:
    rows, rank, columns = shape
    rng = np.random.default_rng(0)
    left, right = rng.integers(-9, 9, (rows, rank)), rng.integers(-9, 9, (rank, columns))
    out = np.full((rows, columns), np.nan, np.float32)
    _multiply(left.astype(np.float32), right.astype(np.float32), out)
    np.testing.assert_array_equal(out, left @ right)


def test_an_error_ends_the_writing() -> None:
    drawn = []

    def calls() -> Any:
        for number in range(1000):
            drawn.append(number)
            yield lambda number=number: 1 / (number - 5)

    with pytest.raises(ZeroDivisionError):
        run(calls())
    assert len(drawn) < 100


def test_blocks_of_another_length_are_refused(tmp_path: Path) -> None:
    short = Blocks((4,), np.dtype(np.float32), lambda: iter([(4, lambda write: write(np.ones(3, np.float32)))]))
    with pytest.raises(jpeft.WeightsError, match="'a': a block of 16 bytes was announced, and 12 came"):
        write_weights(tmp_path, [("a", short)])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2])
def test_what_is_finite(dtype: Any) -> None:
    array = np.array([0, -0.0, 1e-9, -1, jnp.finfo(dtype).max, jnp.finfo(dtype).min] * 3, np.float64).astype(dtype)
    assert is_finite(array) and is_finite(array[:0]) and is_finite(array.reshape(2, 9).T)
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        broken = array.copy()
        broken[7] = value
        assert not is_finite(broken) and not is_finite(broken.reshape(2, 9).T)


@pytest.mark.parametrize(
    "config",
    [LLAMA, LLAMA | {"model_type": "bert", "architectures": ["BertForMaskedLM"], "max_position_embeddings": 8}],
    ids=lambda config: config["model_type"],
)
def test_shapes_need_no_random_numbers(config: dict[str, Any]) -> None:
    assert abstract_params(config) == flatten(pure(nnx.eval_shape(lambda: build(config)))[1])


class Renamed(jpeft.LoRA):
    """A LoRA whose bias of B is a leaf by another name."""

    method = "renamed"


def test_a_bias_leaf_by_another_name_is_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a method adds to the layer's bias, its record says."""
    lora = METHODS["lora"]
    there = lambda leaves: {"shift" if name == "bias" else name: leaf for name, leaf in leaves.items()}
    here = lambda leaves: {"bias" if name == "shift" else name: leaf for name, leaf in leaves.items()}
    renamed = lora._replace(
        matrices=lambda leaves, kernel: there(lora.matrices(here(leaves), kernel)),
        init=lambda *arguments: there(lora.init(*arguments)),
        shapes=lambda spec, site: there(lora.shapes(spec, site)),
        axes=lambda kernel: there(lora.axes(kernel)),
        bias=lambda leaves: lora.bias(here(leaves)),
    )
    monkeypatch.setitem(METHODS, "renamed", renamed)
    monkeypatch.setitem(SAVED, "renamed", Renamed)
    _, params = written(tmp_path / "base", normal, attention_bias=True)
    adapter = trained(Renamed(rank=2, targets=["q_proj"], factor_bias=True), params, normal)
    found, expected = merged(tmp_path, params, adapter)
    changed = [path for path, leaf in expected.items() if not np.array_equal(leaf, flatten(params)[path])]
    assert len(changed) == 4
    for path in changed:
        np.testing.assert_allclose(found[path], expected[path], rtol=1e-6, atol=1e-6, err_msg=path)
    _, other = written(tmp_path / "plain", normal)
    jpeft.save(tmp_path / "plain.safetensors", trained(adapter.spec, other, normal))
    with pytest.raises(jpeft.MergeError, match=r"adds a bias to .*q_proj/kernel.*no .*q_proj/bias' to hold it"):
        merge_folder(tmp_path / "plain", tmp_path / "plain.safetensors", tmp_path / "none")
