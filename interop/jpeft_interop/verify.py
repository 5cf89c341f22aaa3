"""Whether JAX and torch make the same of a model folder and an adapter folder: logits against logits, in fp32."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import jpeft
from jpeft.errors import AdapterError
from jpeft_interop.base import CAUSAL_LM, Base, load_adapted
from jpeft_interop.load_model import hf_folder, load_model, read_config
from jpeft_interop.load_peft import load_peft, read_peft_config
from jpeft_interop.models import ModelError
from jpeft_interop.torch_check import Difference, differences, jax_logits, torch_logits


def verify(
    model: str | os.PathLike[str], adapter: str | os.PathLike[str] | None, ids: Sequence[np.ndarray]
) -> list[Difference]:
    """Runs texts through transformers (and PEFT) and through JAX, the adapter attached in both, not merged.

    Args:
      model: a Hugging Face folder, or a GGUF file.
      adapter: a PEFT folder, or None for the model alone.
      ids: the texts' tokens, each (tokens,).

    Returns:
      a record for each text, in their order.

    Raises:
      TorchMissing: torch, transformers or PEFT is not installed.
      ModelError: the model has no logits.
      WeightsError: the model's folder is broken.
      AdapterError: the adapter's folder is broken, or for another base.
    """
    if adapter is not None and Path(adapter).is_file():
        raise AdapterError(
            f"{adapter} is a file, and torch reads folders; write one: jpeft_interop.save_peft(folder, …)"
        )
    folder = hf_folder(model)
    base, found = _load(folder, adapter)
    ours = jax_logits(base.forward, base.params, found, ids)
    there = None if adapter is None else Path(adapter)
    theirs = torch_logits(folder, there, ids, architecture=base.architecture, labels=base.labels)
    return differences(ours, theirs, ids)


def largest_logit_difference(found: Sequence[Difference]) -> float:
    """The largest difference in any of the texts."""
    return max((one.largest for one in found), default=0.0)


def _load(folder: Path, adapter: str | os.PathLike[str] | None) -> tuple[Base, jpeft.Adapter | None]:
    """The base under the head that the adapter's config tells of; the base's own where it tells of none."""
    if adapter is not None and read_peft_config(adapter).task_type is not None:
        return load_adapted(folder, Path(adapter), dtype="float32")
    name = _architecture(read_config(folder), folder)
    base = Base(folder, CAUSAL_LM, name, *load_model(folder, "float32"))
    return base, None if adapter is None else load_peft(adapter, base.params)


def _architecture(config: dict[str, Any], folder: Path) -> str:
    name = next(iter(config.get("architectures") or [""]))
    if not name or (name.endswith("Model") and not name.endswith("LMHeadModel")):
        raise ModelError(f"{folder}: {name or 'a model without a named architecture'} has no logits to compare")
    return name
