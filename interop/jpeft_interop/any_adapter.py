"""An adapter from wherever it lies: a folder of PEFT's, or jpeft's own file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jpeft
from jpeft.effects import check_fit
from jpeft.errors import AdapterError
from jpeft.tree import flatten
from jpeft_interop.load_peft import load_peft


def load_adapter(path: str | os.PathLike[str], params: Any) -> jpeft.Adapter:
    """The adapter at `path`, known to fit `params`.

    Args:
      path: a folder with `adapter_config.json` and `adapter_model.safetensors`, or a file of `jpeft.save`.
      params: the base, as `load_model` gives it; of its leaves, shapes are looked at, some values by which a base is
        known, and those of embeddings that an adapter folder brings along.

    Raises:
      AdapterError: there is nothing, or an adapter for another base.
      KernelError: a file's adapter is for another base.
    """
    path = Path(path)
    if not path.exists():
        raise AdapterError(f"{path}: no such folder or file; expected a PEFT folder, or a file of jpeft.save")
    if path.is_dir():
        return load_peft(path, params)
    adapter = jpeft.load(path, params=params)
    check_fit(flatten(params), [(adapter, None)])
    return adapter
