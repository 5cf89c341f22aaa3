"""Where each leaf of the params lies in torch: a table of paths, torch names and axes, read in both directions.

Params that came from torch (`load_model`, `params_from_torch`) need none of this: their paths are the torch names. For
any other params give the places as data:

    layout = {"layers/attn/q/kernel": Place("model.layers.{}.self_attn.q_proj.weight", kernels["layers/attn/q/kernel"])}
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jpeft.errors import AdapterError
from jpeft.kernel import Kernel
from jpeft.tree import dotted, nearest
from jpeft_interop.models.families import FAMILIES

Index = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Where one leaf lies in torch.

    Attributes:
      key: the torch parameter's name; `{}` stands for the number on each batch axis (a stacked layer, an expert).
      kernel: the leaf's geometry; torch holds `(out, in)`, or `(out, in, k...)` for a convolution. None for a leaf that
        is no weight of a product: it has the same shape in both.
      transposed: torch holds `(in, out)`: an embedding, or transformers' `Conv1D`.
    """

    key: str
    kernel: Kernel | None = None
    transposed: bool = False

    def torch_keys(self) -> Iterator[tuple[Index, str]]:
        """Each index on the batch axes and the torch name there."""
        shape = self.kernel.batch_shape if self.kernel else ()
        for index in itertools.product(*map(range, shape)):
            yield index, self.key.format(*index) if shape else self.key


Layout = Mapping[str, Place]

CONV1D = re.compile(r"(?:^|/)h/\d+/(?:attn|mlp)/(?:c_attn|c_proj|c_fc)/kernel$")
# The leaf that an embedding and a head share, and the torch module of the head that then has no leaf of its own.
TIED = {
    (first, dotted(head.removesuffix("/kernel")))
    for family in FAMILIES
    for first, head in family.tied
    if head.endswith("/kernel")
}


def default_layout(flat: Mapping[str, Any]) -> dict[str, Place]:
    """The places of params whose paths are torch names, as `load_model` and `params_from_torch` give them."""
    return {path: _default_place(path, tuple(leaf.shape)) for path, leaf in flat.items()}


def _default_place(path: str, shape: tuple[int, ...]) -> Place:
    module, _, leaf = path.rpartition("/")
    weight = f"{dotted(module)}.weight" if module else "weight"
    if leaf == "embedding" and len(shape) == 2:
        return Place(weight, Kernel(shape, (0,), (1,), kind="embedding"), transposed=True)
    if leaf == "kernel" and len(shape) == 2:
        return Place(weight, Kernel(shape, (0,), (1,)), transposed=CONV1D.search(path) is not None)
    if leaf == "kernel" and len(shape) > 2:
        return Place(weight, Kernel(shape, tuple(range(len(shape) - 1)), (len(shape) - 1,), kind="conv"))
    return Place(dotted(path))


@dataclass(frozen=True)
class Entry:
    """A torch name's side of the table: the leaf it lies in and its index there."""

    path: str
    index: Index = ()
    use: str | None = None


def invert(layout: Layout) -> dict[str, Entry]:
    """The leaf of each torch name, tied heads included.

    Raises:
      AdapterError: two leaves have one torch name.
    """
    entries: dict[str, Entry] = {}
    for path, place in layout.items():
        for index, key in place.torch_keys():
            if key in entries:
                raise AdapterError(f"layout: {path!r} and {entries[key].path!r} both lie in the torch name {key!r}")
            entries[key] = Entry(path, index)
    return entries | _tied(layout)


def tied_heads(layout: Layout) -> dict[str, str]:
    """The torch module of the head that shares a leaf, by the leaf's path: where the head has no leaf of its own."""
    return {first: head for first, head in TIED if first in layout and _is_tied(first, head, layout)}


def _is_tied(first: str, head: str, layout: Layout) -> bool:
    """Whether the model has that head: other leaves of it are there, or the base model's are all that there is."""
    if any(place.key == f"{head}.weight" for place in layout.values()):
        return False
    beside = head.rpartition(".")[0].replace(".", "/")
    if beside:
        return any(path.startswith(f"{beside}/") for path in layout)
    return all(path.startswith(first.partition("/")[0] + "/") for path in layout)


def _tied(layout: Layout) -> dict[str, Entry]:
    """Each use of a shared leaf has a torch name."""
    found: dict[str, Entry] = {}
    for first, head in tied_heads(layout).items():
        found |= {f"{head}.weight": Entry(first, use="product"), layout[first].key: Entry(first, use="lookup")}
    return found


def find(entries: Mapping[str, Entry], key: str, file: str, told: str) -> Entry:
    """The leaf of a torch name; an error names the file, the key and the nearest known."""
    if key not in entries:
        raise AdapterError(
            f"{file}: key {told!r} fits no param ({key!r}); the nearest known are {nearest(key, entries)}"
        )
    return entries[key]


def leaf_to_torch(array: np.ndarray, place: Place, index: Index) -> np.ndarray:
    """One leaf, at one index of its batch axes, as torch has it."""
    if place.kernel is None:
        return array
    kernel = place.kernel
    whole = array.transpose((*kernel.batch, *kernel.contracted, *kernel.output))[index]
    if kernel.kind == "conv":
        return whole.transpose((whole.ndim - 1, whole.ndim - 2, *range(whole.ndim - 2)))
    matrix = whole.reshape(kernel.fan_in, kernel.fan_out)
    return matrix if place.transposed else matrix.T


def leaf_from_torch(array: np.ndarray, place: Place) -> np.ndarray:
    """The inverse of `leaf_to_torch` for a leaf without batch axes."""
    if place.kernel is None:
        return array
    if place.kernel.kind == "conv":
        return array.transpose((*range(2, array.ndim), 1, 0))
    kernel = place.kernel
    matrix = array if place.transposed else array.T
    order = (*kernel.contracted, *kernel.output)
    return matrix.reshape(kernel.sizes(order)).transpose(tuple(order.index(axis) for axis in range(len(order))))
