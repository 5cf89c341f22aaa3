"""Stacked parameters of a module, joined of the parts that files hold, and taken apart for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jpeft.errors import WeightsError
from jpeft_interop.fit import ArraySpec
from jpeft_interop.models.stack import Stack
from jpeft_interop.weights import Weights


class Stacked:
    """One stacked tensor, copied together from its parts each time it is asked for."""

    def __init__(self, weights: Weights, keys: Sequence[Sequence[str]]):
        """Of `keys`, each expert's parts, all of one shape and dtype."""
        self._weights, self._keys = weights, keys
        self.path = weights.file(keys[0][0])

    def spec(self, key: str) -> ArraySpec:
        """Shape and dtype, without touching the data."""
        (rows, columns), dtype = self._weights.spec(self._keys[0][0])
        return ArraySpec((len(self._keys), rows * len(self._keys[0]), columns), dtype)

    def __getitem__(self, key: str) -> np.ndarray:
        shape, dtype = self.spec(key)
        joined = np.empty(shape, dtype)
        for expert, names in enumerate(self._keys):
            for part, rows in zip(names, np.split(joined[expert], len(names)), strict=True):
                rows[...] = self._weights[part]
                self._weights.release(part)
        return joined

    def release(self, key: str, begin: int = 0, end: int | None = None) -> None:
        """Its parts are given back as soon as they are copied."""


def join_stacks(weights: Weights, stacks: Sequence[Stack]) -> Weights:
    """The tensors of a folder, the parts of stacks joined; a stack that the files hold whole is one already.

    Raises:
      WeightsError: a part is missing, is not shaped as the others, or the files hold both parts and whole.
    """
    found: dict[str, dict[tuple[int, int], str]] = {}
    widths: dict[str, int] = {}
    for key in weights:
        for stack in stacks:
            if place := stack.find(key):
                name, expert, part = place
                found.setdefault(name, {})[expert, part] = key
                widths[name] = len(stack.parts)
    joined = {name: _joined(weights, name, parts, widths[name]) for name, parts in found.items()}
    return weights.with_sources({key for parts in found.values() for key in parts.values()}, joined)


def _joined(weights: Weights, name: str, parts: dict[tuple[int, int], str], width: int) -> Stacked:
    first = next(iter(parts.values()))
    if name in weights:
        raise WeightsError(f"{weights.file(first)}: {first!r} is a part of {name!r}, which is there, too")
    experts = max(expert for expert, _ in parts) + 1
    missing = [(expert, part) for expert in range(experts) for part in range(width) if (expert, part) not in parts]
    if missing:
        expert, part = missing[0]
        raise WeightsError(
            f"{weights.file(first)}: {name!r} lacks matrix {part + 1} of {width} of expert {expert}; {len(parts)} of "
            f"{experts * width} matrices found, {first!r} the first"
        )
    for key in parts.values():
        _require_like(weights, first, key)
    return Stacked(weights, [[parts[expert, part] for part in range(width)] for expert in range(experts)])


def _require_like(weights: Weights, first: str, key: str) -> None:
    expected, found = weights.spec(first), weights.spec(key)
    if len(found.shape) != 2 or found != expected:
        raise WeightsError(
            f"{weights.file(key)}: {key!r}: expected {expected.dtype.name} {expected.shape} as {first!r} has, found "
            f"{found.dtype.name} {found.shape}"
        )


def split_stack(
    name: str, shape: tuple[int, ...], stacks: Sequence[Stack]
) -> list[tuple[str, tuple[int, ...], tuple[int, slice]]]:
    """The parts that files hold of a stacked parameter: key, shape, and where it lies in the stack; [] of any other.

    Args:
      name: the parameter's.
      shape: its shape.
      stacks: the family's.

    Example:
      >>> split_stack("experts.down", (1, 4, 6), [Stack("experts.down", ("experts.{}.w2.weight",))])
      [('experts.0.w2.weight', (4, 6), (0, slice(0, 4, None)))]
    """
    for stack in stacks:
        if keys := stack.names(name, shape[0]):
            rows = shape[1] // len(stack.parts)
            slices = [slice(part * rows, (part + 1) * rows) for part in range(len(stack.parts))]
            return [
                (key, (rows, shape[2]), (expert, piece))
                for expert, names in enumerate(keys)
                for key, piece in zip(names, slices, strict=True)
            ]
    return []
