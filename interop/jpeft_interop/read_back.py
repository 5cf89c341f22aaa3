"""What is about to be written, read by the loader first: what would come back as something else is never written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jpeft.adapter import Adapter
from jpeft.errors import AdapterError
from jpeft_interop.layout import Layout
from jpeft_interop.load_peft import parse_peft
from jpeft_interop.split import Matrix, matrices

NEAR = 1e-6  # of a scaling, which a file holds as alpha
EPS = float(np.finfo(np.float32).eps)
SAVED = "Nothing was written; jpeft.save keeps the adapter as it is"


def check_reads_back(
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    flat: Mapping[str, Any],
    layout: Layout,
    written: Sequence[Matrix],
    adapter: Adapter,
) -> Adapter:
    """Read what a folder is to hold, and compare it with what is meant.

    Args:
      config: the object of `adapter_config.json`.
      tensors: those of the file, by its keys.
      metadata: the file's.
      flat: the base, by path.
      layout: where its leaves lie in torch.
      written: the factors of each torch matrix.
      adapter: whose leaves trained whole are meant.

    Returns:
      what the loader makes of it.

    Raises:
      AdapterError: the loader refuses it, or methods, scalings or leaves are not the same to the bit.
    """
    stored = json.loads(json.dumps(config, sort_keys=True))
    options: Any = {"check_digest": False, "check_base": False, "warn": False}
    try:
        read = parse_peft(Path("the folder"), stored, tensors, metadata, flat, layout, **options)
    except AdapterError as error:
        raise AdapterError(f"what would be written can't be read back: {error}. {SAVED}") from error
    _check_factors({one.spot.module: one for one in matrices(read, layout)}, {m.spot.module: m for m in written})
    _check_whole(_whole(read), _whole(adapter))
    return read


def _check_factors(read: Mapping[str, Matrix], meant: Mapping[str, Matrix]) -> None:
    if read.keys() != meant.keys():
        raise _differs(f"the modules {sorted(read.keys() ^ meant.keys())[:3]} are adapted in one of the two alone")
    for module, one in meant.items():
        other = read[module]
        if other.site.method != one.site.method:
            raise _differs(f"{module!r} would be {other.site.method!r} and is {one.site.method!r}")
        if abs(other.scaling - one.scaling) > NEAR * abs(one.scaling):
            raise _differs(f"{module!r} would be scaled by {other.scaling:g} and is scaled by {one.scaling:g}")
        _check_leaves(module, other.leaves, one.leaves)


def _whole(adapter: Adapter) -> dict[str, Mapping[str, Any]]:
    return {site.path: adapter.trained[site.path] for site in adapter.sites if site.method == "replacement"}


def _check_whole(read: Mapping[str, Mapping[str, Any]], meant: Mapping[str, Mapping[str, Any]]) -> None:
    if read.keys() != meant.keys():
        raise _differs(f"{sorted(read.keys() ^ meant.keys())[:3]} are trained whole in one of the two alone")
    for path, leaves in meant.items():
        _check_leaves(path, read[path], leaves)


def _check_leaves(name: str, read: Mapping[str, Any], meant: Mapping[str, Any]) -> None:
    if read.keys() != meant.keys():
        raise _differs(f"{name!r} would have the leaves {sorted(read)} and has {sorted(meant)}")
    for leaf, value in meant.items():
        one, other = np.asarray(read[leaf]), np.asarray(value)
        if one.dtype != other.dtype or one.shape != other.shape or not np.array_equal(one, other):
            raise _differs(f"the leaf {leaf!r} of {name!r} would not be the same")


def check_same_changes(read: Adapter, meant: Adapter, layout: Layout) -> None:
    """Compare what two adapters add to each torch matrix, on a few vectors.

    Args:
      read: one in another form than the other: of one rank, its scaling folded into its factors.
      meant: that other.
      layout: where the leaves lie in torch.

    Raises:
      AdapterError: they differ by more than rounding in float32.
    """
    found = {one.spot.module: one for one in matrices(read, layout)}
    for one in matrices(meant, layout):
        other = found[one.spot.module]
        x = np.random.default_rng(0).standard_normal((4, one.leaves["a"].shape[-2]))
        if np.any(np.abs(_change(one, x) - _change(other, x)) > 8 * EPS * _change(one, x, np.abs)):
            raise _differs(f"{one.spot.module!r} would be changed in another way")


def _change(matrix: Matrix, x: np.ndarray, of: Any = np.asarray) -> np.ndarray:
    """x (s A E B), or a bound of it with `of` the absolute value."""
    a, b = (of(np.asarray(matrix.leaves[name], np.float64)) for name in ("a", "b"))
    e = of(np.asarray(matrix.leaves.get("e", 1.0), np.float64))
    return of(matrix.scaling) * ((of(x) @ a) * e) @ b


def _differs(why: str) -> AdapterError:
    return AdapterError(f"PEFT's folder would read back as another adapter: {why}. {SAVED}; please report this")
