"""The same tokens through torch and through JAX: how far the logits lie apart."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jpeft
from jpeft.errors import JpeftError


class TorchMissing(JpeftError):
    """What needs torch was asked for, and torch, transformers or PEFT is not installed."""


@dataclass(frozen=True)
class Difference:
    """How far two sets of logits lie apart.

    Attributes:
      tokens: how many the text has.
      largest: max |d|, the largest difference.
      mean: the mean of |d|.
      scale: the largest absolute logit of torch's.
      agree: the share of places where both find the same entry likeliest.
    """

    tokens: int
    largest: float
    mean: float
    scale: float
    agree: float


def torch_logits(
    folder: str | Path,
    adapter_folder: str | Path | None,
    ids: Sequence[np.ndarray],
    *,
    architecture: str = "AutoModelForCausalLM",
    labels: int | None = None,
) -> list[np.ndarray]:
    """What transformers and PEFT make of some ids, in fp32.

    Args:
      folder: the base model's.
      adapter_folder: PEFT's, or None for the base alone.
      ids: each (tokens,).
      architecture: transformers' class name.
      labels: of a classifier, how many classes.

    Raises:
      TorchMissing: torch, transformers or PEFT is not installed.
    """
    try:
        import torch
        import transformers
        from peft import PeftModel
    except ImportError as error:
        raise TorchMissing(f"comparing with torch needs {error.name}: pip install 'jpeft[torch]'") from None
    options: dict[str, Any] = {} if labels is None else {"num_labels": labels}
    with _quiet():
        kind = getattr(transformers, architecture)
        model = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True, **options)
        if adapter_folder is not None:
            model = PeftModel.from_pretrained(model, str(adapter_folder))
    model.eval()
    with torch.no_grad():
        return [model(input_ids=torch.as_tensor(row[None].astype(np.int64))).logits[0].numpy() for row in ids]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars, and without what PEFT 0.21 and transformers 5.23 say to each other."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # a head that the base lacks is new on purpose: the adapter brings it
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def jax_logits(
    forward: Callable[..., Any], params: Any, adapter: jpeft.Adapter | None, ids: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """What JAX makes of the same ids, the adapter attached and not merged."""
    attached = params if adapter is None else jpeft.attach(params, adapter)
    run = jax.jit(lambda params, row: jpeft.lift(forward)(params, row).logits[0])
    return [np.asarray(run(attached, row[None]), np.float32) for row in ids]


def differences(
    ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], ids: Sequence[np.ndarray]
) -> list[Difference]:
    """How far the logits lie apart, text by text; not a number in either is infinitely far."""
    return [_difference(*pair) for pair in zip(ours, theirs, ids, strict=True)]


def _difference(mine: np.ndarray, torchs: np.ndarray, ids: np.ndarray) -> Difference:
    apart = np.abs(mine - torchs)
    finite = lambda value: float(value) if np.isfinite(value) else float("inf")
    agree = float(np.mean(np.argmax(mine, -1) == np.argmax(torchs, -1)))
    return Difference(len(ids), finite(apart.max()), finite(apart.mean()), float(np.max(np.abs(torchs))), agree)
