"""Vectors placed like the weight beside them: a bias lies as its kernel's outputs do."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jpeft_interop.infer.names import last, likeness, module
from jpeft_interop.infer.piece import Piece, is_in
from jpeft_interop.infer.seen import Seen


def beside(
    tensors: Mapping[str, Seen], leaves: Mapping[str, Seen], pieces: Sequence[Piece], dtype: np.dtype
) -> list[Piece]:
    """The pieces of vectors that lie, value for value, as those of the weight of the same module do."""
    of_module: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        of_module[module(piece.key)].append(piece)
    near: dict[str, list[Seen]] = defaultdict(list)
    for leaf in leaves.values():
        near[module(leaf.name)].append(leaf)
    made: list[Piece] = []
    for tensor in tensors.values():
        for weight in of_module[module(tensor.name)] if len(tensor.full) == 1 else ():
            candidates = [leaf for leaf in near[module(weight.path)] if leaf.name != weight.path]
            fitting = [piece for leaf in candidates for piece in _like(weight, tensor, leaf, leaves, dtype)]
            if found := _one(fitting):
                made.append(found)
    return made


def _one(pieces: list[Piece]) -> Piece | None:
    """The only one, or the only one of that name."""
    named = [piece for piece in pieces if last(piece.path) == last(piece.key) or likeness(piece.path, piece.key) == 2]
    chosen = pieces if len({piece.path for piece in pieces}) == 1 else named
    return chosen[0] if chosen and len({piece.path for piece in chosen}) == 1 else None


def _like(weight: Piece, tensor: Seen, leaf: Seen, leaves: Mapping[str, Seen], dtype: np.dtype) -> Iterator[Piece]:
    """The vector where the weight's outputs are, along those of the weight's axes that the leaf has as well."""
    shape = leaves[weight.path].full
    if weight.box[0][1] > tensor.full[0]:
        return
    digits = [digit for digit in weight.digits if digit.torch_axis == 0]
    for axes in itertools.permutations(range(len(shape)), len(leaf.full)):
        if tuple(shape[axis] for axis in axes) != leaf.full or not {d.leaf_axis for d in digits} <= set(axes):
            continue
        turned = tuple(digit._replace(leaf_axis=axes.index(digit.leaf_axis)) for digit in digits)
        start = tuple(weight.start[axis] for axis in axes)
        piece = Piece(leaf.name, tensor.name, turned, weight.box[:1], start, tensor.full)
        if is_in(piece, leaf.read(), tensor.read(), dtype):
            yield piece
            return
