"""A folder of Hugging Face PEFT, read into an adapter for the params at hand: exactly, or with the reason why not."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jpeft.adapter import Adapter
from jpeft.errors import AdapterError, JpeftError
from jpeft.kernel import Kernels
from jpeft.safetensors_header import ADAPTER_HEADER_BYTES
from jpeft.save import check_base as require_base
from jpeft.save import check_tensor
from jpeft.tree import flatten
from jpeft_interop.adapter_files import adapter_file
from jpeft_interop.config_notes import tell_of_config
from jpeft_interop.layout import Layout, default_layout
from jpeft_interop.load_assembly import assembled
from jpeft_interop.load_checks import checked_pieces
from jpeft_interop.load_names import Source, named
from jpeft_interop.peft_config import PeftConfig, read_config
from jpeft_interop.provenance import (
    CONFIG,
    WEIGHTS,
    adapted_keys,
    base_fingerprint,
    read_config_object,
    read_stated,
)
from jpeft_interop.safetensors_file import Tensors, read_safetensors
from jpeft_interop.saved_modules import copied_keys
from jpeft_interop.uses import check_uses

PICKLE = "adapter_model.bin"
LONGEST = 2_000  # characters of an error
MOST_KEYS = 10  # of a file, for each of the base's tensors


def load_peft(
    folder: str | os.PathLike[str],
    params: Any,
    *,
    layout: Layout | None = None,
    kernels: Kernels | None = None,
    blocks: bool = True,
    check_digest: bool = True,
    check_base: bool = True,
) -> Adapter:
    """An adapter from a folder that PEFT wrote (or `save_peft`).

    Args:
      folder: holds `adapter_config.json` and `adapter_model.safetensors`.
      params: the base it is for: as `load_model` or `params_from_torch` give them, or any with a `layout`.
      layout: where each path of the params lies in torch, for params with other names or shapes.
      kernels: the weights' geometry, from `jpeft.kernels`, where the layout does not tell it all: which axes of a stack
        are the model's own batch axes. The layout's by default.
      blocks: False refuses what would need a mask: parts of a fused weight with factors of their own, and stacked
        layers of different ranks.
      check_digest: where the file carries a digest (as those of `save_peft`), what is there must have it.
      check_base: where the file carries its base's fingerprint, the params must have it. False loads it onto another.

    Returns:
      the adapter: its spec is the folder's config, its arrays are in the file's dtypes. A fused weight's has a block of
      directions for each torch module that has factors of its own, held apart by a constant mask; so have stacked
      layers of different ranks.

    Raises:
      AdapterError: a file missing, broken or foreign, an option not done here, a key or shape that does not fit the
        params; or the files have changed since they were written, or are for another base. Nothing is applied or
        kept. `provenance` tells whether that was known.
    """
    folder, flat, is_told = Path(folder), flatten(params), layout is not None
    layout = default_layout(flat) if layout is None else layout
    layout.check(flat)
    config = _config_object(folder)
    tensors, metadata = _read_tensors(folder, MOST_KEYS * (1 + len(layout.by_key)))
    adapter = parse_peft(
        folder,
        config,
        tensors,
        metadata,
        flat,
        layout,
        kernels=kernels,
        blocks=blocks,
        check_digest=check_digest,
        check_base=check_base,
    )
    if not is_told:
        check_uses(adapter, layout)
    return adapter


def parse_peft(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    flat: Mapping[str, Any],
    layout: Layout,
    *,
    kernels: Kernels | None = None,
    blocks: bool = True,
    check_digest: bool = True,
    check_base: bool = True,
    warn: bool = True,
) -> Adapter:
    """`load_peft`, of what is in the files of a folder; `folder` names them in errors.

    Args:
      folder: as for `load_peft`, and the rest.
      config: the object of `adapter_config.json`.
      tensors: those of `adapter_model.safetensors`, or arrays by the same keys.
      metadata: the file's.
      flat: the base, by path.
      layout: where its leaves lie in torch.
      kernels: as for `load_peft`.
      blocks: as for `load_peft`.
      check_digest: as for `load_peft`.
      check_base: as for `load_peft`.
      warn: warn of what the config says without effect, or leaves out.

    Raises:
      AdapterError: as `load_peft`.
    """
    file = str(folder / WEIGHTS)
    checked = read_config(config, str(folder / CONFIG))
    copies = copied_keys(metadata, file)
    source = Source(file, checked, flat, layout, kernels or layout.kernels, tensors, blocks, copies)
    try:
        names = named(source)
        check_kinds(file, tensors, frozenset(names.others.values()))
        stated = read_stated(file, metadata)
        pieces = checked_pieces(source, names)
        for key, tensor in tensors.items():
            check_tensor(key, tensor, file)
        if stated is not None and check_digest:
            stated.check_digest(tensors, config)
        if stated is not None and stated.base is not None and check_base:
            found = base_fingerprint(adapted_keys(tensors, layout), layout, flat)
            require_base(file, stated.base, found, "load_peft(..., check_base=False)")
        adapter = assembled(source, names, pieces)
    except JpeftError as error:  # any other is a fault of ours, and keeps its traceback
        if type(error) is AdapterError and len(str(error)) <= LONGEST:
            raise
        where = "" if isinstance(error, AdapterError) else f"{file}: "
        raise AdapterError(f"{where}{str(error)[:LONGEST]}") from error
    if warn:
        tell_of_config(checked, config, layout, str(folder / CONFIG))
    return adapter


def read_peft_config(folder: str | os.PathLike[str]) -> PeftConfig:
    """The `adapter_config.json` of a folder, checked.

    Raises:
      AdapterError: it is not there, or not one that can be done here.
    """
    return read_config(_config_object(Path(folder)), str(Path(folder) / CONFIG))


def _config_object(folder: Path) -> dict[str, Any]:
    if not os.path.lexists(folder / CONFIG):
        raise AdapterError(f"{folder}: no {CONFIG} there; is it an adapter's folder?")
    return read_config_object(folder)


def _read_tensors(folder: Path, most: int) -> tuple[Tensors, dict[str, str]]:
    file = adapter_file(folder, WEIGHTS)
    if not os.path.lexists(file):
        hint = f"; {PICKLE} is a pickle, which is never read: save it again with safe_serialization=True"
        raise AdapterError(f"{folder}: no {WEIGHTS} there{hint if (folder / PICKLE).exists() else ''}")
    return read_safetensors(file, AdapterError, ADAPTER_HEADER_BYTES, most)


def check_kinds(file: str, tensors: Mapping[str, np.ndarray], scalars: frozenset[str] = frozenset()) -> None:
    """Raise AdapterError for what is no array of floats; no value is looked at.

    Args:
      file: for errors.
      tensors: the file's, by key.
      scalars: the keys that may have no axes: params of the base, which are compared with it later.
    """
    for key, tensor in tensors.items():
        if not jnp.issubdtype(tensor.dtype, jnp.floating) or not (tensor.shape or key in scalars):
            raise AdapterError(
                f"{file}: key {key!r:.200}: expected an array of floats, found {tensor.dtype} {tensor.shape}"
            )
