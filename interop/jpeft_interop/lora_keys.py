"""The names and shapes of low-rank factors in PEFT's files: LoRA's, DoRA's and AdaLoRA's, read in both directions.

| leaf here                | key in the file, after the module's name     | shape in the file              |
|--------------------------|----------------------------------------------|--------------------------------|
| `a` (in, r)              | `lora_A.weight`                              | (r, in); conv (r, in, k...)    |
| `b` (r, out)             | `lora_B.weight`                              | (out, r); conv (out, r, 1...)  |
| `bias` (out)             | `lora_B.bias`                                | (out,)                         |
| `a` of an embedding      | `lora_embedding_A`                           | (r, rows)                      |
| `b` of an embedding      | `lora_embedding_B`                           | (out, r)                       |
| `a` (experts, in, r)     | `lora_A.weight`                              | (experts · r, in)              |
| `b` (experts, r, out)    | `lora_B.weight`                              | (out, r · experts)             |
| `m` (out), DoRA          | `lora_magnitude_vector`                      | (out,); conv (1, out, 1...)    |
| `a`, `b`, AdaLoRA        | `lora_A`, `lora_B`                           | (r, in · k...), (out, r)       |
| `e` (r), AdaLoRA         | `lora_E`                                     | (r, 1)                         |

A tied head's ΔW is the transpose of its embedding's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from jpeft.kernel import Kernel

LORA: Mapping[str, str] = {"a": ".lora_A.weight", "b": ".lora_B.weight", "bias": ".lora_B.bias"}
LORA_EMBEDDING: Mapping[str, str] = {"a": ".lora_embedding_A", "b": ".lora_embedding_B"}
DORA: Mapping[str, str] = {"a": LORA["a"], "b": LORA["b"], "m": ".lora_magnitude_vector"}
DORA_EMBEDDING: Mapping[str, str] = {**LORA_EMBEDDING, "m": DORA["m"]}
ADALORA: Mapping[str, str] = {"a": ".lora_A", "b": ".lora_B", "e": ".lora_E"}

Leaves = dict[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]


def shapes(kernel: Kernel, rank: int, as_head: bool) -> Shapes:
    """The file's shape of each leaf of one matrix of `kernel`, of a LoRA or DoRA."""
    out, fan_in = kernel.fan_out, kernel.fan_in
    if kernel.batch:
        rows = math.prod(kernel.batch_shape) * rank
        return {"a": (rows, fan_in), "b": (out, rows)}
    if kernel.kind == "conv":
        *window, channels = kernel.sizes(kernel.contracted)
        ones = [1] * len(window)
        return {"a": (rank, channels, *window), "b": (out, rank, *ones), "bias": (out,), "m": (1, out, *ones)}
    if as_head:  # contracts what the embedding puts out
        return {"a": (rank, out), "b": (fan_in, rank), "bias": (fan_in,)}
    return {"a": (rank, fan_in), "b": (out, rank), "bias": (out,), "m": (out,)}


def to_file(leaves: Leaves, kernel: Kernel, as_head: bool) -> Leaves:
    """The leaves of one matrix, A (in, r), B (r, out), bias and m (out), as the file has them."""
    wanted = shapes(kernel, leaves["a"].shape[-1], as_head)
    if kernel.batch:  # A with the experts outside its directions, B with them inside
        a, b = leaves["a"].mT, leaves["b"].transpose(2, 1, 0)
        return {"a": a.reshape(wanted["a"]), "b": b.reshape(wanted["b"])}
    a, b = (leaves["b"].T, leaves["a"].T) if as_head else (leaves["a"], leaves["b"])
    a = _taps_last(a, kernel) if kernel.kind == "conv" else a.T
    others = {name: leaf.reshape(wanted[name]) for name, leaf in leaves.items() if name in ("bias", "m")}
    return {"a": a, "b": b.T.reshape(wanted["b"]), **others}


def from_file(leaves: Leaves, kernel: Kernel, as_head: bool) -> Leaves:
    """The inverse of `to_file`: A `(*contracted, r)`, B `(r, *output)`, bias and m `(*output)`."""
    if kernel.batch:
        experts = kernel.batch_shape[0]
        a, b = leaves["a"].reshape(experts, -1, kernel.fan_in).mT, leaves["b"].reshape(kernel.fan_out, -1, experts)
        return {"a": a, "b": b.transpose(2, 1, 0)}
    rank = leaves["a"].shape[0]
    a = _taps_first(leaves["a"]) if kernel.kind == "conv" else leaves["a"].T
    b = leaves["b"].reshape(leaves["b"].shape[:2])
    a, b = (b, a.T) if as_head else (a, b.T)
    output = kernel.sizes(kernel.output)
    others = {name: leaf.reshape(output) for name, leaf in leaves.items() if name in ("bias", "m")}
    return {"a": a.reshape(*kernel.sizes(kernel.contracted), rank), "b": b.reshape(rank, *output), **others}


def _taps_last(a: np.ndarray, kernel: Kernel) -> np.ndarray:
    """A (k... · in, r) of a convolution as torch has it, (r, in, k...)."""
    a = a.reshape(*kernel.sizes(kernel.contracted), a.shape[-1])
    return a.transpose((a.ndim - 1, a.ndim - 2, *range(a.ndim - 2)))


def _taps_first(a: np.ndarray) -> np.ndarray:
    """torch's (r, in, k...) as (k..., in, r)."""
    return a.transpose((*range(2, a.ndim), 1, 0))


def adalora_shapes(kernel: Kernel, rank: int, as_head: bool) -> Shapes:
    """The file's shape of each leaf of one matrix of an AdaLoRA."""
    fan_in, out = (kernel.fan_out, kernel.fan_in) if as_head else (kernel.fan_in, kernel.fan_out)
    return {"a": (rank, fan_in), "b": (out, rank), "e": (rank, 1)}


def adalora_to_file(leaves: Leaves, kernel: Kernel, as_head: bool) -> Leaves:
    """The leaves of one matrix, A (in, r), B (r, out), E (r), as the file has them."""
    wanted = adalora_shapes(kernel, leaves["e"].shape[0], as_head)
    factors = to_file({"a": leaves["a"], "b": leaves["b"]}, kernel, as_head)
    return {name: leaf.reshape(wanted[name]) for name, leaf in (factors | {"e": leaves["e"]}).items()}


def adalora_from_file(leaves: Leaves, kernel: Kernel, as_head: bool) -> Leaves:
    """The inverse: A `(*contracted, r)`, B `(r, *output)`, E (r)."""
    rank = leaves["e"].shape[0]
    wanted = shapes(kernel, rank, as_head)
    factors = {name: leaves[name].reshape(wanted[name]) for name in ("a", "b")}
    return from_file(factors, kernel, as_head) | {"e": leaves["e"].reshape(rank)}
