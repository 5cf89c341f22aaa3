"""How the names and shapes of torch parameters correspond to paths and leaves: one table, read in both directions.

A path is the torch name with `/` for `.`; the leaf alone is renamed, where JAX has a custom of its own:

| kind        | torch                                  | here                                             |
|-------------|----------------------------------------|--------------------------------------------------|
| `linear`    | `weight` (out, in)                     | `kernel` (in, out)                               |
| `conv1d`    | `weight` (in, out), of transformers    | `kernel` (in, out)                               |
| `conv`      | `weight` (out, in/groups, k...)        | `kernel` (k..., in/groups, out)                  |
| `embedding` | `weight` (rows, columns)               | `embedding` (rows, columns)                      |
| `other`     | any                                    | the same name, the same shape                    |

Tied parameters are one row: the first of their names is the key, the others are its `ties`. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jpeft.errors import WeightsError

Kind = Literal["linear", "conv1d", "conv", "embedding", "other"]
LEAF: Mapping[str, str] = {"linear": "kernel", "conv1d": "kernel", "conv": "kernel", "embedding": "embedding"}


@dataclass(frozen=True, slots=True)
class TorchKey:
    """Where one leaf lies in torch.

    Attributes:
      key: the torch name, the first one where several are tied.
      kind: which row of the table above holds, and with it how the axes are ordered.
      ties: the other torch names of the same parameter.
    """

    key: str
    kind: Kind = "other"
    ties: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """The path of the leaf.

        Example:
          >>> TorchKey("layers.0.q_proj.weight", "linear").path
          'layers/0/q_proj/kernel'
        """
        *module, leaf = self.key.split(".")
        return "/".join([*module, LEAF.get(self.kind, leaf)])

    @property
    def names(self) -> tuple[str, ...]:
        """All torch names, the key first."""
        return (self.key, *self.ties)


Table = Mapping[str, TorchKey]


def to_jax_axes(kind: Kind, ndim: int) -> tuple[int, ...]:
    """The permutation that takes a torch array of this kind to its leaf."""
    if kind in ("linear", "conv"):
        return (*range(2, ndim), 1, 0)
    return tuple(range(ndim))


def to_torch_axes(kind: Kind, ndim: int) -> tuple[int, ...]:
    """The inverse of `to_jax_axes`."""
    if kind in ("linear", "conv"):
        return (ndim - 1, ndim - 2, *range(ndim - 2))
    return tuple(range(ndim))


def to_jax(array: np.ndarray, entry: TorchKey) -> np.ndarray:
    """A torch array in the leaf's axes: a view, nothing is copied."""
    return array.transpose(to_jax_axes(entry.kind, array.ndim))


def to_torch(leaf: np.ndarray, entry: TorchKey) -> np.ndarray:
    """A leaf in torch's axes: a view, nothing is copied."""
    return leaf.transpose(to_torch_axes(entry.kind, leaf.ndim))


def to_torch_shape(shape: tuple[int, ...], entry: TorchKey) -> tuple[int, ...]:
    """The shape in torch of a leaf of this shape."""
    return tuple(shape[axis] for axis in to_torch_axes(entry.kind, len(shape)))


def to_jax_shape(shape: tuple[int, ...], entry: TorchKey) -> tuple[int, ...]:
    """The shape of the leaf of a torch array of this shape."""
    return tuple(shape[axis] for axis in to_jax_axes(entry.kind, len(shape)))


def make_table(entries: list[TorchKey]) -> dict[str, TorchKey]:
    """The rows by path, checked to be invertible.

    Raises:
      WeightsError: two parameters would have one path, a torch name would lie in two rows, or a name holds a `/`.
    """
    table: dict[str, TorchKey] = {}
    for entry in entries:
        if any("/" in name for name in entry.names):
            raise WeightsError(f"{entry.key!r}: a parameter's name can't hold '/', which separates a path; rename it")
        if entry.path in table:
            raise WeightsError(
                f"{entry.key!r} and {table[entry.path].key!r} would both be the leaf {entry.path!r}; rename one of them"
            )
        table[entry.path] = entry
    by_key(table)
    return table


def by_key(table: Table) -> dict[str, str]:
    """The inverse: the path of every torch name, ties included.

    Raises:
      WeightsError: a name lies in two rows.
    """
    paths: dict[str, str] = {}
    for path, entry in table.items():
        for name in entry.names:
            if name in paths:
                raise WeightsError(f"the torch name {name!r} belongs to {paths[name]!r} and to {path!r}")
            paths[name] = path
    return paths


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by path as a nested dict with string keys.

    Raises:
      WeightsError: a path is both a leaf and a module.

    Example:
      >>> nest({"a/kernel": 1, "a/bias": 2})
      {'a': {'kernel': 1, 'bias': 2}}
    """
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *modules, name = path.split("/")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
            if not isinstance(node, dict):
                raise WeightsError(f"{path!r} lies below another leaf; rename one of them")
        if name in node:
            raise WeightsError(f"{path!r} is a leaf, and other leaves lie below it; rename one of them")
        node[name] = leaf
    return tree
