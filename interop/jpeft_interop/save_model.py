"""Params written as a Hugging Face folder: transformers, vLLM and the rest read it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jpeft.atomic import write_folder
from jpeft.errors import WeightsError
from jpeft.finite import is_finite
from jpeft.tree import flatten
from jpeft_interop.abstract import abstract_params
from jpeft_interop.arrays import host
from jpeft_interop.blocks import Blocks
from jpeft_interop.checkpoint import model_table
from jpeft_interop.fit import require_same_paths, require_same_shapes
from jpeft_interop.load_model import CONFIG
from jpeft_interop.models import Family, family
from jpeft_interop.stacks import split_stack
from jpeft_interop.torch_table import Table, TorchKey, to_torch, to_torch_shape
from jpeft_interop.weights import LazyArray, is_weights_file, write_weights

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


@dataclass(frozen=True)
class Lazy:
    """A leaf that is made when someone asks for its values, and forgotten after: what `write_model` writes.

    Attributes:
      shape: of the leaf.
      dtype: its own.
      make: gives the values.
      blocks: the same as it lies in torch, block by block, each checked to be finite by whoever makes it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]
    blocks: Blocks | None = None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The values."""
        return np.asarray(self.make(), dtype)


def save_model(
    folder: str | os.PathLike[str],
    params: Mapping[str, Any],
    config: Mapping[str, Any] | Any,
    *,
    architecture: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    files_from: str | os.PathLike[str] | None = None,
) -> None:
    """Write `config.json` and safetensors, moved into place whole; at most one tensor is copied at a time.

    Args:
      folder: made if need be; one that holds other things than a model is refused.
      params: as `load_model` gives them, of any floating dtype, which the config will name.
      config: of `read_config(folder)`, or a transformers config.
      architecture: torch's class name, where it is not the first that the config names.
      max_shard_bytes: where to split into shards.
      files_from: a folder whose other files (tokenizer, chat template, licence) come along.

    Raises:
      WeightsError: params that do not fit the config, a value that is not finite. Names path, expected and found.
      ModelError: the model is none of those in `jpeft_interop.models`.
    """
    config = dict(config if isinstance(config, Mapping) else config.to_dict())
    if architecture is not None:
        config["architectures"] = [architecture]
    write_model(folder, flatten(params), config, abstract_params(config), max_shard_bytes, files_from)


def write_model(
    folder: str | os.PathLike[str],
    flat: Mapping[str, Any],
    config: Mapping[str, Any],
    shapes: Mapping[str, Any],
    max_shard_bytes: int,
    files_from: str | os.PathLike[str] | None,
) -> None:
    """`save_model` for leaves by path, `Lazy` ones among them, where the shapes of the config's model are known."""
    where = f"the {config['architectures'][0]} of this config"
    require_same_paths(flat, shapes, where)
    require_same_shapes(flat, shapes, where)
    config = with_dtype(dict(config), flat)
    known = family(config.get("model_type"))
    table = model_table(shapes, known)
    text = json_of(config)

    def fill(fresh: Path) -> None:
        (fresh / CONFIG).write_text(text, encoding="utf-8")
        write_weights(fresh, _tensors(flat, table, known), max_shard_bytes)
        for file in other_files(files_from):
            shutil.copyfile(file, fresh / file.name)

    write_folder(folder, fill, replaceable=is_weights_file)


def with_dtype(config: dict[str, Any], flat: Mapping[str, Any]) -> dict[str, Any]:
    """The config, naming the dtype that holds all params exactly: transformers casts to it when it loads."""
    dtypes = {np.dtype(leaf.dtype) for leaf in flat.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else jnp.result_type(*dtypes)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise WeightsError(f"the params: expected floating point arrays, found {dtype.name} among them")
    name = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    return config | {name: dtype.name}


def json_of(config: Mapping[str, Any]) -> str:
    """A config as the text of its file."""
    try:
        return json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as reason:
        raise WeightsError(f"the config can't be written as JSON: {reason}") from None


def _tensors(flat: Mapping[str, Any], table: Table, known: Family) -> Iterator[tuple[str, LazyArray | Blocks]]:
    @lru_cache(maxsize=2)  # parts come one by one: the two stacks of a layer are not made anew for each
    def whole(path: str) -> np.ndarray:
        return _tensor(flat[path], table[path])

    for path, entry in table.items():
        leaf = flat[path]
        name, shape = known.file_name(entry.key), to_torch_shape(tuple(leaf.shape), entry)
        parts = split_stack(name, shape, known.stacks)
        if not parts and isinstance(leaf, Lazy) and leaf.blocks is not None:
            yield name, leaf.blocks
            continue
        for key, part_shape, piece in parts or [(name, shape, None)]:
            make = partial(_tensor, leaf, entry) if piece is None else lambda path=path, piece=piece: whole(path)[piece]
            yield key, LazyArray(part_shape, np.dtype(leaf.dtype), make)


def _tensor(leaf: Any, entry: TorchKey) -> np.ndarray:
    array = host(leaf)
    if not is_finite(array):
        raise WeightsError(f"{entry.path!r} holds values that are not finite; nothing was written")
    return to_torch(array, entry)


def other_files(folder: str | os.PathLike[str] | None) -> list[Path]:
    """What a model's folder has beside its config and its weights."""
    if folder is None:
        return []
    files = [file for file in Path(folder).iterdir() if file.is_file() and file.name != CONFIG]
    return sorted(file for file in files if not file.name.endswith(WEIGHT_SUFFIXES) and not file.name.startswith("."))
