"""The params of any Flax model, an adapter folded in or not, written as a Hugging Face folder by way of a layout.

Streams: a torch tensor is made when its turn comes, from the leaves that hold it, and dropped after. A module's adapted
leaves are made once, and kept while tensors of that module are written.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import jpeft
from jpeft.adapter import Adapter, Meta
from jpeft.atomic import write_folder
from jpeft.errors import WeightsError
from jpeft.finite import is_finite
from jpeft.tree import flatten, module_of, nearest
from jpeft_interop.infer.folder import Folder, open_folder
from jpeft_interop.layout import Layout
from jpeft_interop.load_model import CONFIG, hf_folder, read_config
from jpeft_interop.models.stack import Stack
from jpeft_interop.save_model import json_of, other_files, with_dtype
from jpeft_interop.stacks import split_stack
from jpeft_interop.torch_table import nest
from jpeft_interop.weights import LazyArray, is_weights_file, write_weights

Merging = Callable[[str], Mapping[str, Any]]

KEPT = 4  # modules whose adapted leaves are held: a fused tensor of torch's may be made of several


def export_model(
    folder: str | os.PathLike[str],
    params: Any,
    *,
    layout: Layout,
    base: str | os.PathLike[str],
    adapter: Adapter | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write params of any form as the Hugging Face folder that `base` is: its names, its config, its tokenizer.

    Args:
      folder: made if need be; one that holds other things than a model is refused. Appears whole or not at all.
      params: in the layout's form, of any floating dtype, which the config will name.
      layout: where each leaf lies in torch, by the names in the base's files or by those of its modules.
      base: the Hugging Face folder of the same model: its config, generation config, tokenizer and whatever else is no
        weight come along, and the new weights have its names and shapes.
      adapter: to fold in: fp32 maths, one rounding to each leaf's dtype.
      max_shard_bytes: where to split into shards.

    Raises:
      WeightsError: the layout is another model's than `params` or `base`, or a value is not finite.
      MergeError: an adapter that no plain weights can hold.
    """
    flat, source = layout.check(params), hf_folder(base)
    if left := [path for path in flat if path not in layout]:
        raise WeightsError(f"the layout has no place for {left[0]!r}; nothing was written")
    base_tensors = _base(open_folder(source), layout)
    keys = list(_keys(layout, base_tensors))
    text = json_of(with_dtype(read_config(source), flat))
    merged = _merging(flat, adapter)

    def fill(fresh: Path) -> None:
        (fresh / CONFIG).write_text(text, encoding="utf-8")
        write_weights(fresh, _tensors(keys, layout, flat, merged, base_tensors), max_shard_bytes)
        for file in other_files(source):
            shutil.copyfile(file, fresh / file.name)

    write_folder(folder, fill, replaceable=is_weights_file)


class Stored(NamedTuple):
    """How the base's files hold one tensor.

    Attributes:
      name: what they call it.
      shape: the tensor's.
      stacks: those that it may be a stack of; none where the files hold it whole.
    """

    name: str
    shape: tuple[int, ...]
    stacks: tuple[Stack, ...] = ()


def _base(folder: Folder, layout: Layout) -> dict[str, Stored]:
    """Tell how the base's files hold each tensor, by the name that the layout has for it.

    A layout may have the names in files or those of the modules, where these differ.
    """
    weights = folder.weights
    if all(key in layout.by_key for key in weights):
        return {key: Stored(key, weights.spec(key).shape) for key in weights}
    found = _by_modules(folder, layout, ask_transformers=False)
    return found if all(key in layout.by_key for key in found) else _by_modules(folder, layout, ask_transformers=True)


def _by_modules(folder: Folder, layout: Layout, *, ask_transformers: bool) -> dict[str, Stored]:
    """Tell how the files hold each tensor, what the modules call it being the same as of the layout's name."""
    stacks = () if folder.family is None else folder.family.stacks
    here = folder.module_names(layout.by_key, ask_transformers=ask_transformers)
    own = {name: key for key, name in here.items()}
    stored = {
        key: Stored(key, folder.joined.spec(key).shape, () if key in folder.weights else stacks)
        for key in folder.joined
    }
    there = folder.names(ask_transformers=ask_transformers)
    return {own.get(name, name): stored[key] for key, name in there.items()}


def _keys(layout: Layout, base: Mapping[str, Stored]) -> Iterator[str]:
    """The tensors to write, leaf by leaf: of a tie, the names that the base's folder has."""
    for key, stored in base.items():
        if key not in layout.by_key:
            called = "" if stored.name == key else f" ({stored.name!r} in its files)"
            raise WeightsError(
                f"the base has {key!r}{called}, which lies in no leaf; the nearest known are "
                f"{nearest(key, layout.by_key)}"
            )
    for key, links in layout.by_key.items():
        if key in base:
            if (found := base[key].shape) != links[0].torch_shape:
                raise WeightsError(f"{key!r}: the base has shape {found}, the layout makes {links[0].torch_shape}")
            yield key
        elif not any(other in base for other in _tied(layout, key)):
            raise WeightsError(f"the layout makes {key!r}, and the base has no such tensor: is it another model's?")


def _tied(layout: Layout, key: str) -> Iterator[str]:
    """The other names of what a tensor holds."""
    for link in layout.by_key[key]:
        for other in layout.links[link.path]:
            if other.key != key and (other.leaf, other.index) == (link.leaf, link.index):
                yield other.key


def _merging(flat: Mapping[str, Any], adapter: Adapter | None) -> Merging:
    """`module -> its leaves by path`, adapted."""
    modules: dict[str, list[str]] = {}
    for path in flat:
        modules.setdefault(module_of(path), []).append(path)

    @lru_cache(KEPT)
    def merged(module: str) -> Mapping[str, Any]:
        leaves = {path: flat[path] for path in modules[module]}
        part = None if adapter is None else _part(adapter, leaves)
        return leaves if part is None else flatten(jpeft.merge(nest(leaves), part))

    return merged


def _part(adapter: Adapter, leaves: Mapping[str, Any]) -> Adapter | None:
    """The adapter on these leaves alone."""
    sites = tuple(site for site in adapter.sites if site.path in leaves)
    only = lambda part: {site.path: part[site.path] for site in sites if site.path in part}
    return Adapter(only(adapter.trained), only(adapter.constant), Meta(adapter.spec, sites)) if sites else None


def _tensors(
    keys: list[str], layout: Layout, flat: Mapping[str, Any], merged: Merging, base: Mapping[str, Stored]
) -> Iterator[tuple[str, LazyArray]]:
    @lru_cache(2)  # the parts of a layer's two stacks are asked for one by one
    def made(key: str) -> np.ndarray:
        return _made(key, layout, merged)

    for key in keys:
        first = layout.by_key[key][0]
        shape, dtype, stored = first.torch_shape, np.dtype(flat[first.path].dtype), base[key]
        parts = split_stack(stored.name, shape, stored.stacks)
        for part, part_shape, piece in parts:
            yield part, LazyArray(part_shape, dtype, lambda key=key, piece=piece: made(key)[piece])
        if not parts:
            yield stored.name, LazyArray(shape, dtype, partial(_made, key, layout, merged))


def _made(key: str, layout: Layout, merged: Merging) -> np.ndarray:
    paths = {link.path for link in layout.by_key[key]}
    made = layout.tensor(key, {path: merged(module_of(path))[path] for path in paths})
    if not is_finite(made):
        raise WeightsError(f"{key!r} holds values that are not finite; nothing was written")
    return made
