"""A layout, found from the weights in both forms and proven on them."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np

from jpeft.errors import WeightsError
from jpeft.kernel import Kernels
from jpeft.tree import flatten, nearest
from jpeft_interop.infer.compose import compose, is_covered
from jpeft_interop.infer.kinds import kinds_of
from jpeft_interop.infer.opened import Names, Opened, open_state
from jpeft_interop.infer.piece import Piece
from jpeft_interop.infer.proof import all_wrong
from jpeft_interop.infer.search import Found, find_pieces
from jpeft_interop.infer.seen import Seen, seen_leaves, seen_tensors
from jpeft_interop.infer.watched import watched
from jpeft_interop.layout.layout import Layout

if TYPE_CHECKING:
    import torch

SHOWN = 6


def infer_layout(
    params: Any,
    state: Mapping[str, Any] | str | os.PathLike[str] | torch.nn.Module,
    *,
    kernels: Kernels | None = None,
    names: Names = "modules",
    ignore: Iterable[str] = (),
    tolerance: float | None = None,
    progress: bool = True,
) -> Layout:
    """The layout of params whose weights are also there as torch has them.

    Slices of the leaves and tensors are matched by what they hold, whatever the order; then the order is read off, and
    in the end every tensor is made from the leaves by the layout and compared, bit for bit. Where both sides have other
    dtypes, both are cast to the narrower one; where a leaf holds a multiple of a tensor, to two units in the last place
    (a power of two is exact). Tensors with equal values are told apart by names and neighbours.

    Args:
      params: a tree of arrays; mapped ones are read a piece at a time.
      state: torch tensors or arrays by torch's names; the torch module itself; or a folder or a file of safetensors,
        mapped into memory. A module, or a folder whose model transformers knows, also tells what each tensor is to it.
      kernels: the weights' geometry (`jpeft.kernels`), which tells the same.
      names: of a folder's tensors, those that the model's modules have for them, which adapters are saved under
        (transformers 5's), or those in the files, where the two differ (ViT, GPT-NeoX's head, experts). `export_model`
        takes either and writes the files'.
      ignore: patterns (`*` stands for any text) of leaves and of tensors that have no counterpart.
      tolerance: how far a tensor's values may be apart in the end, as a share of its largest. Places are found by lines
        that are equal, so that most values must be.
      progress: whether to show how far it is, once it takes a second.

    Raises:
      WeightsError: a leaf or a tensor has no counterpart and is not ignored; it has one but for some values; equal
        ones can't be told apart; the notation of layouts can't say how they lie; or nothing tells whether one is an
        embedding. Names all of them.

    Example:
      >>> kernel = np.arange(6.0).reshape(2, 3)
      >>> layout = infer_layout({"up": {"kernel": kernel}}, {"up.weight": kernel.T})
      >>> layout["up/kernel"].axes, layout["up/kernel"].torch[0].axes
      ('d o', 'o d')
    """
    ignore, opened = tuple(ignore), open_state(state, names)
    flat = {path: leaf for path, leaf in flatten(params).items() if not _matches(path, ignore)}
    leaves = seen_leaves(flat)
    every = seen_tensors(opened.tensors)
    tensors = {key: t for key, t in every.items() if t.is_float and not _matches(key, ignore)}
    total = sum(leaf.size for leaf in leaves.values()) + 2 * sum(tensor.size for tensor in tensors.values())
    with watched(total, show=progress) as tick:
        weights = {path: leaf for path, leaf in leaves.items() if leaf.is_float}
        found = find_pieces(weights, tensors, working_dtype([*weights.values(), *tensors.values()]), tick)
        _require_complete(replace(found, leaves=leaves))
        layout, padded = _layout(found, kernels, opened)
        wrong = list(all_wrong(layout, flat, leaves, tensors, opened.tensors, padded, tolerance, tick))
    if wrong:
        raise WeightsError("the params and the torch weights are not the same model's: " + _some(wrong))
    return layout


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def working_dtype(arrays: Sequence[Seen]) -> np.dtype:
    """The narrowest dtype there is: values are compared in it until they are proven in their own."""
    return min((array.dtype for array in arrays), key=lambda dtype: dtype.itemsize, default=np.dtype(np.float32))


def _require_complete(found: Found) -> None:
    """Every leaf and every tensor has a counterpart.

    Raises:
      WeightsError: one has none.
    """
    held = {piece.path for piece in found.pieces}
    placed = {piece.key for piece in found.pieces}
    mentioned = " ".join(found.unclear)
    leaves = [path for path in found.leaves if path not in held and path not in mentioned]
    tensors = [key for key in found.tensors if key not in placed and repr(key) not in mentioned]
    shapes = lambda name, among: f"{name!r} {among[name].full}"
    wrong = [
        *found.unclear,
        *(f"no tensor holds {shapes(p, found.leaves)}{_near(p, tensors, found.tensors)}" for p in leaves),
        *(f"no leaf holds {shapes(k, found.tensors)}{_near(k, leaves, found.leaves)}" for k in tensors),
    ]
    if wrong:
        raise WeightsError(
            "no layout: " + _some(wrong) + ". What has no counterpart is named in ignore=, patterns of names"
        )


def _near(name: str, left: Sequence[str], among: Mapping[str, Seen]) -> str:
    fitting = [other for other in left if among[other].size] if left else []
    return f"; of those left the nearest by name are {nearest(name, fitting)}" if fitting else ""


def _some(wrong: Sequence[str]) -> str:
    more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    return "; ".join(wrong[:SHOWN]) + more


def _layout(found: Found, kernels: Kernels | None, opened: Opened) -> tuple[Layout, list[str]]:
    """The layout, and the leaves that hold more than the tensors do."""
    kinds = kinds_of(found.pieces, found.tensors, kernels, opened.kinds)
    width = _width(found.tensors.values())
    of: dict[str, list[Piece]] = defaultdict(list)
    for piece in found.pieces:
        of[piece.path].append(piece)
    places = {path: compose(leaf, of[path], kinds, width) for path, leaf in found.leaves.items()}
    fitted = {path: place.fit(found.leaves[path].full, path) for path, place in places.items()}
    layout = Layout(fitted)
    layout.check_keys()
    return layout, [path for path, leaf in found.leaves.items() if not is_covered(leaf, of[path])]


def _width(tensors: Iterable[Seen]) -> int:
    """How wide the model is: the length that most axes have."""
    counts = Counter(length for tensor in tensors for length in set(tensor.shape))
    return counts.most_common(1)[0][0] if counts else 0
