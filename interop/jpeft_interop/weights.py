"""The weights of a Hugging Face folder: `model.safetensors`, or shards and their index. Nothing here imports torch.

Reading maps files into memory and copies nothing; writing copies one tensor at a time.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jpeft.errors import WeightsError
from jpeft.safetensors_header import PICKLES
from jpeft.strict_json import is_plain_name
from jpeft.strict_json import read_json_object as read_json_object
from jpeft_interop.fit import ArraySpec, some
from jpeft_interop.safetensors_file import LazyArray as LazyArray
from jpeft_interop.safetensors_file import nbytes, write_safetensors
from jpeft_interop.safetensors_file import read_safetensors as read_safetensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
METADATA = {"format": "pt"}  # transformers asks for it
CHUNK = 1 << 24


class Source(Protocol):
    """What tensors are read from: a file, see `Tensors`."""

    path: str

    def __getitem__(self, key: str) -> np.ndarray: ...

    def spec(self, key: str) -> ArraySpec:
        """Shape and dtype, without touching the data."""
        ...

    def release(self, key: str, begin: int = 0, end: int | None = None) -> None:
        """Give the tensor's memory back to the system, all of it or the bytes from `begin` up to `end`."""
        ...


class Weights(Mapping[str, np.ndarray]):
    """The tensors of a folder by torch key, each in the file where it lies; see `Tensors`."""

    def __init__(self, files: Mapping[str, Source]):
        self._files = files

    def __getitem__(self, key: str) -> np.ndarray:
        return self._files[key][key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def file(self, key: str) -> str:
        """The path of the file that holds a tensor."""
        return self._files[key].path

    def spec(self, key: str) -> ArraySpec:
        """Shape and dtype, without touching the data."""
        return self._files[key].spec(key)

    def with_sources(self, without: Collection[str], sources: Mapping[str, Source]) -> Weights:
        """Without some of the tensors, and with others from elsewhere."""
        return Weights({key: file for key, file in self._files.items() if key not in without} | dict(sources))

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors are equal bit for bit."""
        if self.spec(one) != self.spec(other):
            return False
        left, right = (self[key].reshape(-1).view(np.uint8) for key in (one, other))
        steps = range(0, left.size, CHUNK)
        equal = all(np.array_equal(left[start : start + CHUNK], right[start : start + CHUNK]) for start in steps)
        self.release(one)
        self.release(other)
        return equal

    def release(self, key: str, begin: int = 0, end: int | None = None) -> None:
        """Give the tensor's memory back to the system once it is copied, or the bytes from `begin` up to `end`."""
        self._files[key].release(key, begin, end)


def read_weights(folder: str | os.PathLike[str]) -> Weights:
    """The tensors of a Hugging Face folder, mapped into memory and read when they are used.

    Args:
      folder: holds `model.safetensors`, or else `model.safetensors.index.json` and its shards (transformers prefers the
        former, too).

    Raises:
      WeightsError: there are no weights, they are pickles, or a file is broken. Names file, key, expected and found.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise WeightsError(f"{folder}: expected a folder with config.json and {SINGLE}, found none")
    if os.path.lexists(folder / SINGLE):
        tensors, _ = read_safetensors(folder / SINGLE, WeightsError)
        return Weights(dict.fromkeys(tensors, tensors))
    if os.path.lexists(folder / INDEX):
        return _read_shards(folder)
    pickles = sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(PICKLES))
    if pickles:
        raise WeightsError(
            f"{folder}: expected {SINGLE}, found {some(pickles)}: a pickle can run any code and is never read; where "
            "you trust it, convert it: AutoModel.from_pretrained(folder).save_pretrained(other)"
        )
    raise WeightsError(f"{folder}: holds neither {SINGLE} nor {INDEX}")


def _read_shards(folder: Path) -> Weights:
    weight_map = _weight_map(folder / INDEX)
    shards = {name: read_safetensors(folder / name, WeightsError)[0] for name in sorted(set(weight_map.values()))}
    for key, name in weight_map.items():
        if key not in shards[name]:
            raise WeightsError(f"{folder / INDEX}: expected {key!r} in {name}, which does not hold it")
    for name, tensors in shards.items():
        for key in tensors:
            if weight_map.get(key) != name:
                listed = f"in {weight_map[key]}" if key in weight_map else "nowhere"
                raise WeightsError(f"{folder / name}: holds {key!r}, which {INDEX} lists {listed}")
    return Weights({key: tensors for tensors in shards.values() for key in tensors})


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index, WeightsError).get("weight_map")
    if not isinstance(weight_map, dict):
        raise WeightsError(f"{index}: expected an object 'weight_map', found {weight_map!r:.100}")
    for key, name in weight_map.items():
        if not is_plain_name(name) or not name.endswith(".safetensors"):
            raise WeightsError(f"{index}: {key!r}: expected a safetensors file of the same folder, found {name!r:.200}")
    return weight_map


def write_weights(
    folder: str | os.PathLike[str], tensors: Iterable[tuple[str, Any]], max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write tensors as transformers lays them out: one file, or shards and an index beyond `max_shard_bytes`.

    Args:
      folder: exists, and holds no weights yet (`jpeft.atomic.write_folder` gives such a one).
      tensors: torch keys with NumPy or JAX arrays. A `LazyArray` is read when its turn comes and dropped after, so that
        no more than one tensor is copied at a time.
      max_shard_bytes: a file holds at most this much, or a single tensor.

    Raises:
      WeightsError: the folder holds weights, a key comes twice, a dtype is none of safetensors'.
    """
    folder = Path(folder)
    if old := sorted(name for name in os.listdir(folder) if is_weights_file(name)):
        raise WeightsError(f"{folder}: holds weights already ({some(old)}); write to an empty folder")
    shards = _plan(tensors, max_shard_bytes)
    if len(shards) == 1:
        write_safetensors(folder / SINGLE, shards[0], METADATA)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, METADATA)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(nbytes(tensor) for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def is_weights_file(name: str) -> bool:
    """Whether a file of this name is part of a folder's weights: the single file, a shard, the index."""
    return name in (SINGLE, INDEX) or SHARD.fullmatch(name) is not None


def _plan(tensors: Iterable[tuple[str, Any]], max_shard_bytes: int) -> list[dict[str, Any]]:
    shards: list[dict[str, Any]] = [{}]
    seen: set[str] = set()
    size = 0
    for key, tensor in tensors:
        if key in seen:
            raise WeightsError(f"{key!r} comes twice")
        seen.add(key)
        if shards[-1] and size + nbytes(tensor) > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = tensor
        size += nbytes(tensor)
    return shards
