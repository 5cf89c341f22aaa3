"""A digest of what is in a file, and a fingerprint of the base that an adapter is for.

Neither is a signature: they find accidents, a flipped bit or the wrong base, and not who means harm.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

SAMPLE = 64  # entries of each tensor


def digest(tensors: Mapping[str, np.ndarray], described: Any) -> str:
    """SHA-256 of every tensor's name, dtype, shape and bytes, and of what JSON describes them.

    Example:
      >>> digest({}, {"r": 1}) == digest({}, {"r": 2})
      False
    """
    found = hashlib.sha256(canonical(described))
    for key in sorted(tensors):
        array = np.asarray(tensors[key], order="C")
        found.update(canonical([key, array.dtype.name, list(array.shape)]))
        found.update(array.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def canonical(value: Any) -> bytes:
    """The one JSON text of a value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sampled(size: int) -> np.ndarray:
    """Which entries of a tensor of so many are looked at: spread over it, the same ones each time."""
    return np.unique(np.arange(min(size, SAMPLE), dtype=np.uint64) * np.uint64(2654435761) % np.uint64(max(size, 1)))


def fingerprint(samples: Iterable[tuple[str, tuple[int, ...], np.ndarray]]) -> str:
    """A short name for a base, of its tensors' names, shapes and some entries, as bf16 has them.

    So a base cast to bf16 is the base, and one cast to fp16 is another.
    """
    found = hashlib.sha256()
    for name, shape, entries in samples:
        found.update(canonical([name, list(shape)]))
        with np.errstate(all="ignore"):
            found.update(np.asarray(entries).astype(np.float32).astype(ml_dtypes.bfloat16).tobytes())
    return found.hexdigest()[:32]
