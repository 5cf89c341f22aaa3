"""What an adapter's folder says of itself: whether it is as it was written, and for which base.

`save_peft` puts one string into the metadata of `adapter_model.safetensors`, where PEFT looks at nothing but "format":
a digest of tensors and config, and a fingerprint of the weights that are adapted. Other libraries' files have none:
they are `unverified`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jpeft.digest import digest, fingerprint, sampled
from jpeft.errors import AdapterError
from jpeft.safetensors_header import ADAPTER_HEADER_BYTES
from jpeft.save import check_base
from jpeft.shared import entries, has_values
from jpeft.strict_json import read_json_object
from jpeft.tree import flatten, nearest
from jpeft_interop.adapter_files import adapter_file
from jpeft_interop.layout import Layout, default_layout
from jpeft_interop.layout.link import Link
from jpeft_interop.peft_keys import KEYS, PREFIX
from jpeft_interop.safetensors_file import read_safetensors

KEY = "jpeft"
STATED = re.compile(r"1 digest=([0-9a-f]{64}) base=([0-9a-f]{32}|unknown) of=(\d{1,6})")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CONFIG_BYTES, CONFIG_DEPTH = 1_000_000, 20


@dataclass(frozen=True)
class Provenance:
    """What is known of where a folder comes from.

    Attributes:
      digest: `ok`, or `unverified` where the file carries none.
      base: `ok` where the params at hand are the base; `unverified` where the file names none, or no params were given.
    """

    digest: Literal["ok", "unverified"]
    base: Literal["ok", "unverified"]

    def __str__(self) -> str:
        if self.digest == "unverified":
            return "unverified: the file carries no digest and no base's fingerprint, as those of other libraries"
        return f"unchanged since it was written (its digest is right); base {self.base}"


def provenance(folder: str | os.PathLike[str], params: Any = None, *, layout: Layout | None = None) -> Provenance:
    """Whether a folder is as it was written, and, given params, for this base. Loads nothing.

    Args:
      folder: a PEFT folder.
      params: the base, if it is to be compared.
      layout: as for `load_peft`.

    Raises:
      AdapterError: it has changed since it was written, is for another base, or is broken.
    """
    config = read_config_object(folder)
    file = adapter_file(folder, WEIGHTS)
    tensors, metadata = read_safetensors(file, AdapterError, ADAPTER_HEADER_BYTES)
    stated = read_stated(str(file), metadata)
    if stated is None:
        return Provenance("unverified", "unverified")
    stated.check_digest(tensors, config)
    if params is None or stated.base is None:
        return Provenance("ok", "unverified")
    flat = flatten(params)
    known = default_layout(flat) if layout is None else layout
    found = base_fingerprint(adapted_keys(tensors, known), known, flat)
    check_base(str(file), stated.base, found, "load_peft(..., check_base=False)")
    return Provenance("ok", "unverified" if found is None else "ok")


def read_config_object(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a folder's `adapter_config.json`.

    Raises:
      AdapterError: it is not there, or broken.
    """
    return read_json_object(adapter_file(folder, CONFIG), AdapterError, CONFIG_BYTES, CONFIG_DEPTH)


@dataclass(frozen=True)
class Stated:
    """What a file states of itself."""

    file: str
    digest: str
    base: str | None
    format: Mapping[str, str]

    def check_digest(self, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> None:
        """Raises AdapterError where tensors, header or config are not those that were written."""
        if (found := content_digest(tensors, config, self.format, self.base)) != self.digest:
            raise AdapterError(
                f"{self.file}: it or {CONFIG} has changed since it was written: expected the digest {self.digest}, "
                f"found {found}; to load what is there all the same, load_peft(..., check_digest=False)"
            )


def read_stated(file: str, metadata: Mapping[str, str]) -> Stated | None:
    """What the metadata of a file states; None where it is no file of `save_peft`.

    Raises:
      AdapterError: it is one, and broken.
    """
    others = {name: value for name, value in metadata.items() if name != KEY}
    if KEY not in metadata and not any(map(STATED.fullmatch, others.values())):
        return None
    found = STATED.fullmatch(metadata.get(KEY, ""))
    if found is None or int(found.group(3)) != len(others):
        raise AdapterError(f"{file}: the metadata has changed since it was written: found {str(dict(metadata))!s:.300}")
    return Stated(file, found.group(1), None if found.group(2) == "unknown" else found.group(2), others)


def stating(
    tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], form: Mapping[str, str], base: str | None
) -> dict[str, str]:
    """The metadata of a file to be written: `form`, and what the file states of itself."""
    found = content_digest(tensors, config, form, base)
    return {**form, KEY: f"1 digest={found} base={base or 'unknown'} of={len(form)}"}


def content_digest(
    tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], form: Mapping[str, str], base: str | None
) -> str:
    """Of all that is in the two files."""
    return digest(tensors, {"config": dict(config), "metadata": dict(form), "base": base})


def adapted_keys(keys: Iterable[str], layout: Layout) -> set[str]:
    """Name the weights in torch that a file's keys are factors of; of PEFT's parameters, all of their module.

    Raises:
      AdapterError: no key is a factor of any method, or one is of a module that the layout does not have: a file whose
        base can't be told must not pass for one that was not asked.
    """
    modules = sorted({module for key in keys if (module := _adapted_module(key)) is not None})
    if not modules:
        raise AdapterError(f"none of the keys is an adapter's: expected a module's name and one of {_suffixes()}")
    found = {module: _weights(module, layout) for module in modules}
    for module, weights in found.items():
        if not weights:
            raise AdapterError(
                f"the file adapts {module!r}, and the layout has no such weight; the nearest are "
                f"{nearest(module, layout.by_key)}: are these the params of its base?"
            )
    return set().union(*found.values())


def _suffixes() -> tuple[str, ...]:
    """The ends of all methods' keys: a method that `peft_keys` knows is known here."""
    tables = (table for row in KEYS.values() for table in (row.suffixes, row.embedding))
    return tuple(sorted({suffix for table in tables for suffix in table.values()}))


def _adapted_module(key: str) -> str | None:
    """Name the module that a key is a factor of; None where it is the key of something else."""
    ends = [suffix for suffix in _suffixes() if key.endswith(suffix)]
    return key.removeprefix(PREFIX).removesuffix(max(ends, key=len)) if ends else None


def _weights(module: str, layout: Layout) -> set[str]:
    return {name for name in (f"{module}.weight", module) if name in layout.by_key} or _parameters(module, layout)


def _parameters(module: str, layout: Layout) -> set[str]:
    """The parameters that PEFT adapts as such: it stores them under their module's name, wrapped once for each."""
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    return {name for name in layout.parameters if name.rpartition(".")[0] == module}


def base_fingerprint(keys: Iterable[str], layout: Layout, flat: Mapping[str, Any]) -> str | None:
    """Of some entries of torch's tensors, wherever they lie here.

    None where some are mere shapes, or a layout scales or shifts one: what was rounded is not torch's any more.
    """
    links = {key: layout.by_key[key] for key in sorted(keys)}
    if not links or not all(_is_witness(link, flat) for found in links.values() for link in found):
        return None
    return fingerprint((key, found[0].torch_shape, _entries(found, flat)) for key, found in links.items())


def _is_witness(link: Link, flat: Mapping[str, Any]) -> bool:
    return has_values(flat[link.path]) and (link.scale, link.offset) == (1.0, 0.0)


def _entries(links: tuple[Link, ...], flat: Mapping[str, Any]) -> np.ndarray:
    """Sampled entries of one torch tensor; what of it lies in no leaf is zero."""
    shape = links[0].torch_shape
    at = np.unravel_index(sampled(int(np.prod(shape, dtype=np.int64))).astype(np.int64), shape)
    whole = np.zeros(len(at[0]) if at else 1, np.float32)
    for link in links:
        inside, places = _places(link, at)
        if inside.any():
            found = entries(flat[link.path], tuple(one[inside] for one in places))
            whole[inside] = found.astype(np.float32)
    return whole


def _places(link: Link, at: tuple[np.ndarray, ...]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Which places of a torch tensor lie in the link's region, and where in the leaf."""
    inside = np.ones(len(at[0]), bool)
    named: dict[str, np.ndarray] = {name: np.full(len(at[0]), value) for name, value in link.index}
    for axis, place in zip(link.torch, at, strict=True):
        within = place - axis.start
        inside &= (within >= 0) & (within < axis.length(link.sizes))
        sizes = [link.sizes[name] for name in axis.names]
        if sizes:
            split = np.unravel_index(np.where(inside, within, 0), sizes)
            named |= dict(zip(axis.names, split, strict=True))
    return inside, [_joined(axis, link, named, len(inside)) for axis in link.leaf]


def _joined(axis: Any, link: Link, named: Mapping[str, np.ndarray], count: int) -> np.ndarray:
    total = np.zeros(count, np.int64)
    for name in axis.names:
        total = total * link.sizes[name] + named[name]
    return total + axis.start
