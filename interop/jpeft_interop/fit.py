"""Whether params fit what a model expects: every path, every shape, and the dtypes where they matter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jpeft.errors import WeightsError
from jpeft.tree import nearest

SHOWN = 3


class ArraySpec(NamedTuple):
    """A shape and a dtype, 64-bit dtypes included (`jax.ShapeDtypeStruct` halves those without x64)."""

    shape: tuple[int, ...]
    dtype: np.dtype


def some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    rest = len(names) - SHOWN
    return ", ".join(map(repr, names[:SHOWN])) + (f" and {rest} more" if rest > 0 else "")


def require_same_paths(found: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    """Refuse missing and unexpected paths.

    Raises:
      WeightsError: names them, and what lies nearest.
    """
    missing = [path for path in expected if path not in found]
    unexpected = [path for path in found if path not in expected]
    if missing:
        near = nearest(missing[0], unexpected or found)
        raise WeightsError(f"the params lack {some(missing)}, which {where} has; nearest in the params: {near}")
    if unexpected:
        near = nearest(unexpected[0], expected)
        raise WeightsError(f"the params hold {some(unexpected)}, which {where} lacks; nearest there: {near}")


def require_same_shapes(found: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    """Refuse a leaf whose shape is not the expected one. Both mappings have the same paths.

    Raises:
      WeightsError: names the path, the expected and the found shape.
    """
    for path, leaf in found.items():
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise WeightsError(f"{path!r}: expected an array, found a {type(leaf).__name__}")
        if tuple(leaf.shape) != tuple(expected[path].shape):
            raise WeightsError(
                f"{path!r} has the wrong shape for {where}: expected {tuple(expected[path].shape)}, "
                f"found {tuple(leaf.shape)}"
            )


def require_same_dtypes(found: Mapping[str, Any], expected: Mapping[str, Any], where: str, fix: str) -> None:
    """Refuse a leaf whose dtype is not the expected one: nothing is cast in passing.

    Raises:
      WeightsError: names the path, the expected and the found dtype, and `fix`.
    """
    for path, leaf in found.items():
        if np.dtype(leaf.dtype) != np.dtype(expected[path].dtype):
            raise WeightsError(
                f"{path!r} has the wrong dtype for {where}: expected {np.dtype(expected[path].dtype).name}, "
                f"found {np.dtype(leaf.dtype).name}; {fix}"
            )
