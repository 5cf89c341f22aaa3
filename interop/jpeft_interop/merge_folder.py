"""A model's folder and an adapter, folded into a new ordinary Hugging Face folder, a few rows at a time.

The base stays in its mapped file. Rows of it are read, changed, checked and written where they belong in the new file,
several such blocks at once (`merge_rows`). What is more than rows of one matrix (stacked experts, a bias that is added
to) goes through `jpeft.apply` tensor by tensor.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jpeft
from jpeft import biases
from jpeft.adapter import Meta
from jpeft.errors import MergeError, WeightsError
from jpeft.finite import is_finite
from jpeft.site import Site
from jpeft.tree import module_of
from jpeft_interop.abstract import abstract_params
from jpeft_interop.any_adapter import load_adapter
from jpeft_interop.arrays import host, own
from jpeft_interop.blocks import Block, Blocks, Write
from jpeft_interop.checkpoint import match, model_table
from jpeft_interop.classifier_config import with_adapters_head
from jpeft_interop.fit import some
from jpeft_interop.load_model import hf_folder, read_config
from jpeft_interop.merge_rows import Change, goes_by_rows, row_change
from jpeft_interop.models import Family, family
from jpeft_interop.save_model import Lazy, write_model
from jpeft_interop.stacks import join_stacks
from jpeft_interop.torch_table import TorchKey, nest, to_jax, to_torch_axes, to_torch_shape
from jpeft_interop.weights import Weights, read_weights

UNTIE = "tie_word_embeddings"
MODULE = "module"
BLOCK = 1 << 22  # entries of a weight that are worked on at once
PIECE = 1 << 18  # entries that stay in a core's cache while they are
COLUMNWISE = ("lora", "dora", "adalora", "ia3")  # methods that change each column of W for itself
WHOLE = ("a", "e", "l_in")  # leaves without an axis for these columns

Beside = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Merged:
    """What was done.

    Attributes:
      changed: paths of the weights that the adapter changed.
      kept: how many tensors were copied as they were.
      left_out: why a key of the base's folder is not in the new one, by key.
    """

    changed: tuple[str, ...]
    kept: int
    left_out: Mapping[str, str]


def merge_folder(
    model: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    untie: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    on_start: Callable[[int], None] = lambda tensors: None,
    on_tensor: Callable[[], None] = lambda: None,
) -> Merged:
    """Write the model of `model` with the adapter folded in to the folder `out`.

    The change is computed in fp32, checked to be finite, and rounded to each weight's own dtype. Config, tokenizer and
    whatever else is no weight come along. `out` appears whole or not at all.

    Args:
      model: the base's Hugging Face folder (or a GGUF file, converted once).
      adapter: a PEFT folder, or a file of `jpeft.save`.
      out: the new folder.
      untie: where the adapter acts on one side of a weight that is both embedding and output head, write two weights,
        and a config with `tie_word_embeddings` false.
      max_shard_bytes: where to split into shards.
      on_start: told the number of tensors before the first is read.
      on_tensor: called at each tensor that is done.

    Raises:
      MergeError: a tie that would break, a merged value that is not finite, or a bias with no place in the base.
      AdapterError: the adapter is broken, or for another base.
      WeightsError: the base is broken, or `out` holds other things.
    """
    folder = hf_folder(model)
    if Path(out).resolve() in (folder.resolve(), Path(adapter).resolve()):
        raise MergeError(f"{out}: merging would overwrite what it reads from; choose another folder")
    config = with_adapters_head(read_config(folder), Path(adapter))
    base = _base(folder, config)
    found = load_adapter(adapter, nest(base.leaves))
    _require_head(base, found, folder)
    untied = _has_to_untie(found, untie)
    if untied:
        config = config | {UNTIE: False}
    acts = _acts(base, found, untied)
    tensors = {name: _counted(_leaf(base, name, *act, found), on_tensor) for name, act in acts.items()}
    on_start(len(tensors))
    write_model(out, tensors, config, abstract_params(config) if untied else base.shapes, max_shard_bytes, folder)
    changed = tuple(name for name, (_, sites) in acts.items() if sites)
    return Merged(changed, len(tensors) - len(changed), base.left_out)


@dataclass(frozen=True)
class _Base:
    """The base's leaves by path, on mapped memory in JAX's axes, and where each comes from."""

    leaves: Mapping[str, np.ndarray]
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    table: Mapping[str, TorchKey]
    sources: Mapping[str, str]
    weights: Weights
    family: Family
    left_out: Mapping[str, str]


def _base(folder: Path, config: Mapping[str, Any]) -> _Base:
    known = family(config.get("model_type"))
    weights = join_stacks(read_weights(folder), known.stacks)
    shapes = abstract_params(config)
    table = model_table(shapes, known)
    found = match(weights, table, shapes, known, str(next(iter(config.get("architectures") or ["the model"]))))
    dtype = next((weights.spec(key).dtype for key in found.sources.values()), np.dtype(np.float32))
    leaves = {path: np.broadcast_to(np.zeros((), dtype), shapes[path].shape) for path in found.missing}
    leaves |= {path: to_jax(weights[key], table[path]) for path, key in found.sources.items()}
    return _Base({path: leaves[path] for path in table}, shapes, table, found.sources, weights, known, found.ignored)


def _require_head(base: _Base, adapter: jpeft.Adapter, folder: Path) -> None:
    """A head that the base lacks comes whole from the adapter."""
    brought = {site.path for site in adapter.sites if site.method == "replacement"}
    if missing := [path for path in base.leaves if path not in base.sources and path not in brought]:
        raise WeightsError(f"{folder} has no weights for {some(missing)}, and the adapter does not bring them")


def _has_to_untie(adapter: jpeft.Adapter, allowed: bool) -> bool:
    """Whether the adapter acts on one use alone of a weight that has two; refused where that is not allowed."""
    split = [site for site in adapter.sites if site.use is not None]
    if split and not allowed:
        side = "embedding" if split[0].use == "lookup" else "output head"
        raise MergeError(
            f"{split[0].path!r} is one weight for embedding and output head, and the adapter acts on the {side} alone: "
            "merging has to make two of it, which --untie (untie=True) allows"
        )
    return bool(split)


def _acts(base: _Base, adapter: jpeft.Adapter, untied: bool) -> dict[str, tuple[str, tuple[Site, ...]]]:
    """For every leaf of the new model, the base's that it comes from, and what acts on it.

    Untied, a weight of two names is two leaves, each with what acts on its use.
    """
    sites = _sites(adapter, base.leaves)
    acting = lambda path, other: (path, tuple(site for site in sites.get(path, ()) if site.use != other))
    acts = {path: acting(path, "product") for path in base.leaves}
    if not untied:
        return acts
    heads = {first: second for first, second in base.family.tied if first in base.leaves and second not in base.leaves}
    return acts | {second: acting(first, "lookup") for first, second in heads.items()}


def _sites(adapter: jpeft.Adapter, leaves: Mapping[str, Any]) -> dict[str, list[Site]]:
    """The sites that bear on each leaf: its own, and for a bias those of the weight beside it that brings one."""
    found: dict[str, list[Site]] = {}
    for site in adapter.sites:
        found.setdefault(site.path, []).append(site)
        bias = f"{module_of(site.path)}/bias"
        if biases.adds(adapter, site) or biases.scales(adapter, site):
            if bias not in leaves and biases.adds(adapter, site):
                raise MergeError(f"the adapter adds a bias to {site.path!r}, and the model has no {bias!r} to hold it")
            if bias in leaves:
                found.setdefault(bias, []).append(site)
    return found


def _turned(leaf: Lazy) -> Lazy:
    """An embedding (rows, columns) as the kernel (columns, rows) of a head: in torch they are the same."""
    return replace(leaf, shape=leaf.shape[::-1], make=lambda: leaf.make().T)


def _counted(leaf: Lazy, on_tensor: Callable[[], None]) -> Lazy:
    def make() -> np.ndarray:
        array = leaf.make()
        on_tensor()
        return array

    def blocks(of: Blocks) -> Iterator[Block]:
        yield from of.blocks()
        on_tensor()

    counted = leaf.blocks and replace(leaf.blocks, blocks=partial(blocks, leaf.blocks))
    return replace(leaf, make=make, blocks=counted)


def _leaf(base: _Base, name: str, path: str, sites: tuple[Site, ...], adapter: jpeft.Adapter) -> Lazy:
    """The leaf at `path` with what the sites do to it; `name` is what it is called in the new model."""
    array = base.leaves[path]
    make = partial(_made, base, name, path, sites, adapter) if sites else lambda: array
    leaf = Lazy(array.shape, array.dtype, make, _blocks(base, name, path, sites, adapter))
    return _turned(leaf) if name != path and name.endswith("/kernel") else leaf


def _blocks(base: _Base, name: str, path: str, sites: tuple[Site, ...], adapter: jpeft.Adapter) -> Blocks | None:
    """The leaf as it lies in torch, by rows; None where that can't be."""
    array, entry = base.leaves[path], base.table[path]
    axes = to_torch_axes(entry.kind, array.ndim)
    own = len(sites) == 1 and sites[0].path == path and array.dtype.itemsize <= 4
    if path not in base.sources or sites and not (own and goes_by_rows(adapter, sites[0], axes)):
        return None

    def blocks() -> Iterator[Block]:
        change = row_change(adapter, sites[0], axes) if sites else None
        source = base.weights[base.sources[path]]
        source = source if sites else source.reshape(-1)
        for rows in _slices(len(source), BLOCK, source):
            yield source[rows].size, partial(_hand_over, base, name, path, source, change, rows)

    return Blocks(to_torch_shape(array.shape, entry), array.dtype, blocks)


def _slices(stop: int, entries: int, source: np.ndarray, start: int = 0) -> Iterator[slice]:
    """The rows from `start` up to `stop` in parts of so many entries, or of one row."""
    step = max(1, entries // max(1, math.prod(source.shape[1:])))
    return (slice(row, min(row + step, stop)) for row in range(start, stop, step))


def _hand_over(
    base: _Base, name: str, path: str, source: np.ndarray, change: Change | None, rows: slice, write: Write
) -> None:
    """Write rows of the new leaf, and let go of the base's."""
    pieces = list(_slices(rows.stop, PIECE, source, rows.start))
    new = (source[piece] for piece in pieces) if change is None else _changed(source, change, pieces)
    for array in new:
        write(_checked(name, array, change))
    size = source.itemsize * math.prod(source.shape[1:])
    base.weights.release(base.sources[path], rows.start * size, rows.stop * size)


def _changed(source: np.ndarray, change: Change, pieces: list[slice]) -> Iterator[np.ndarray]:
    """The new rows, piece by piece, in fp32 and rounded once; each array is good until the next is asked for."""
    shape = (pieces[0].stop - pieces[0].start, source.shape[1])
    wide, room = np.empty(shape, np.float32), np.empty(shape, np.float32)
    narrow = wide if source.dtype == np.float32 else np.empty(shape, source.dtype)
    for piece in pieces:
        w, spare, new = (array[: piece.stop - piece.start] for array in (wide, room, narrow))
        with np.errstate(all="ignore"):  # what overflows is found, and refused
            np.copyto(w, source[piece])
            change(w, piece, spare)
            np.copyto(new, w, casting="unsafe")
        yield new


def _checked(name: str, array: np.ndarray, change: object) -> np.ndarray:
    if is_finite(array):
        return array
    if change is None:
        raise WeightsError(f"{name!r} holds values that are not finite; nothing was written")
    raise MergeError(f"{name!r} holds values that are not finite after merging; nothing was written")


def _made(base: _Base, name: str, path: str, sites: tuple[Site, ...], adapter: jpeft.Adapter) -> np.ndarray:
    """The leaf as a whole, by `jpeft.apply`."""
    bears = [site for site in sites if biases.adds(adapter, site) or biases.scales(adapter, site)]
    neighbours = {f"{module_of(site.path)}/bias" for site in bears} & base.leaves.keys()
    neighbours |= {site.path for site in sites}
    beside = tuple(sorted((_name(one), base.leaves[one].shape) for one in neighbours if one != path))
    merged = _run(base.leaves[path], _part(adapter, sites), _name(path), beside, base.table[path])
    if path in base.sources:
        base.weights.release(base.sources[path])
    return _checked(name, merged, sites)


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _part(adapter: jpeft.Adapter, sites: tuple[Site, ...]) -> jpeft.Adapter:
    """The adapter on one module alone, which is called the same whatever it is: equal layers share one program."""
    paths = {site.path: f"{MODULE}/{_name(site.path)}" for site in sites}
    trained = {new: adapter.trained[path] for path, new in paths.items()}
    constant = {new: adapter.constant[path] for path, new in paths.items() if path in adapter.constant}
    moved = tuple(replace(site, path=paths[site.path], use=None) for site in sites)
    return jpeft.Adapter(trained, constant, Meta(adapter.spec, moved))


def _run(array: np.ndarray, adapter: jpeft.Adapter, leaf: str, beside: Beside, entry: TorchKey) -> np.ndarray:
    """One leaf of a module, adapted, a block of columns at a time; laid out as torch has it, turned only to the eye."""
    result = np.empty(to_torch_shape(array.shape, entry), array.dtype)
    seen = to_jax(result, entry)
    for columns in _columns(array, adapter):
        part = _narrowed(adapter, columns) if columns != slice(None) else adapter
        near = tuple((name, (*shape[:-1], part.sites[0].kernel.shape[-1])) for name, shape in beside)
        seen[..., columns] = host(_apply(own(array[..., columns]), part, leaf, near))
    return seen


def _columns(array: np.ndarray, adapter: jpeft.Adapter) -> list[slice]:
    """Parts of the output axis that are small enough for the fp32 work on them; all of it where there is more to it."""
    masked = any("mask" in leaves for leaves in adapter.constant.values())
    plain = not masked and all(
        site.method in COLUMNWISE and site.kernel.output == (array.ndim - 1,) for site in adapter.sites
    )
    if array.size <= BLOCK or array.ndim != 2 or not plain:
        return [slice(None)]
    rows, width = array.shape
    step = max(1, BLOCK // rows)
    return [slice(start, min(start + step, width)) for start in range(0, width, step)]


def _narrowed(adapter: jpeft.Adapter, columns: slice) -> jpeft.Adapter:
    """An adapter on some columns of W: what is by rank or input feature whole, these columns of all else."""
    cut = lambda leaves: {name: leaf if name in WHOLE else leaf[..., columns] for name, leaf in leaves.items()}
    width = columns.stop - columns.start
    kernel = lambda site: replace(site.kernel, shape=(*site.kernel.shape[:-1], width))
    sites = tuple(replace(site, kernel=kernel(site)) for site in adapter.sites)
    trained = {path: cut(leaves) for path, leaves in adapter.trained.items()}
    return adapter.replace(trained=trained, meta=Meta(adapter.spec, sites))


@partial(jax.jit, static_argnums=(2, 3))
def _apply(array: Array, adapter: jpeft.Adapter, leaf: str, beside: Beside) -> Array:
    """One leaf of an adapted module; what lies beside it does not bear on it, and only has to be there."""
    module = {name: jnp.zeros(shape, array.dtype) for name, shape in beside} | {leaf: array}
    return jpeft.apply({MODULE: module}, adapter)[MODULE][leaf]
