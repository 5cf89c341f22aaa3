"""The names and shapes of a LoRA's tensors in PEFT's files: one table, read in both directions.

| leaf here                      | key in the file, after the module's name | shape in the file              |
|--------------------------------|------------------------------------------|--------------------------------|
| `a` (in, r)                    | `lora_A.weight`                          | (r, in); conv (r, in, k...)    |
| `b` (r, out)                   | `lora_B.weight`                          | (out, r); conv (out, r, 1...)  |
| `bias` (out)                   | `lora_B.bias`                            | (out,)                         |
| `a` (rows, r) of an embedding  | `lora_embedding_A`                       | (r, rows)                      |
| `b` (r, out) of an embedding   | `lora_embedding_B`                       | (out, r)                       |

Keys start with `base_model.model.`, exactly once. A tied head's ΔW is the transpose of its embedding's.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jpeft.errors import AdapterError
from jpeft.kernel import Kernel

PREFIX = "base_model.model."
SUFFIXES: Mapping[str, str] = {".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_B.bias": "bias"}
EMBEDDING_SUFFIXES: Mapping[str, str] = {".lora_embedding_A": "a", ".lora_embedding_B": "b"}

Leaves = dict[str, np.ndarray]


def split_key(key: str, file: str) -> tuple[str, str | None]:
    """The torch module and the leaf that a key is for; the leaf is None for a key that is a param's own name.

    Raises:
      AdapterError: the key lacks the prefix.
    """
    if not key.startswith(PREFIX):
        raise AdapterError(f"{file}: key {key!r} does not start with {PREFIX!r}, as every key of a PEFT file does")
    name = key.removeprefix(PREFIX)
    for suffix, leaf in (*SUFFIXES.items(), *EMBEDDING_SUFFIXES.items()):
        if name.endswith(suffix):
            return name.removesuffix(suffix), leaf
    return name, None


def keys_of(module: str, embedding: bool) -> dict[str, str]:
    """The file's key of each leaf of a module."""
    table = EMBEDDING_SUFFIXES if embedding else SUFFIXES
    return {leaf: f"{PREFIX}{module}{suffix}" for suffix, leaf in table.items()}


def shapes(kernel: Kernel, rank: int, as_head: bool) -> dict[str, tuple[int, ...]]:
    """The file's shape of each leaf of one matrix of `kernel`."""
    out, fan_in = kernel.fan_out, kernel.fan_in
    if kernel.kind == "conv":
        *window, channels = kernel.sizes(kernel.contracted)
        return {"a": (rank, channels, *window), "b": (out, rank, *[1] * len(window)), "bias": (out,)}
    if as_head:  # contracts what the embedding puts out
        return {"a": (rank, out), "b": (fan_in, rank), "bias": (fan_in,)}
    return {"a": (rank, fan_in), "b": (out, rank), "bias": (out,)}


def to_file(leaves: Leaves, kernel: Kernel, as_head: bool) -> Leaves:
    """The leaves of one matrix, A (in, r) and B (r, out), as the file has them."""
    rank = leaves["a"].shape[-1]
    wanted = shapes(kernel, rank, as_head)
    a, b = (leaves["b"].T, leaves["a"].T) if as_head else (leaves["a"], leaves["b"])
    if kernel.kind == "conv":
        a = a.reshape(*kernel.sizes(kernel.contracted), rank)
        turned = a.transpose((a.ndim - 1, a.ndim - 2, *range(a.ndim - 2)))
        return {name: leaf for name, leaf in (("a", turned), ("b", b.T.reshape(wanted["b"])), *_bias(leaves))}
    return {"a": a.T, "b": b.T, **dict(_bias(leaves))}


def _bias(leaves: Leaves) -> list[tuple[str, np.ndarray]]:
    return [("bias", leaves["bias"])] if "bias" in leaves else []


def from_file(leaves: Leaves, kernel: Kernel, as_head: bool) -> Leaves:
    """The inverse of `to_file`: A `(*contracted, r)`, B `(r, *output)`, bias `(*output)`."""
    rank, bias = leaves["a"].shape[0], leaves.get("bias")
    a, b = leaves["a"], leaves["b"]
    if kernel.kind == "conv":
        a = a.transpose((*range(2, a.ndim), 1, 0))
        b = b.reshape(b.shape[:2])
    else:
        a = a.T
    a, b = (b, a.T) if as_head else (a, b.T)
    shaped = {
        "a": a.reshape(*kernel.sizes(kernel.contracted), rank),
        "b": b.reshape(rank, *kernel.sizes(kernel.output)),
    }
    return shaped if bias is None else shaped | {"bias": bias.reshape(kernel.sizes(kernel.output))}
