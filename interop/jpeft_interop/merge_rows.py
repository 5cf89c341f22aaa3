"""An adapter's change to a matrix as it lies in a file, some rows at a time: torch's orientation, no transpose.

`jpeft.apply` is the definition. What it does to W (in, out) one does here to Wᵀ (out, in), in NumPy and in cache:

    (W + s A B)ᵀ = Wᵀ + s Bᵀ Aᵀ        rows of it from the same rows of Wᵀ and of Bᵀ

The same sums and the same roundings, in fp32: a LoRA's result is the same to the bit where the BLAS of NumPy and XLA
sum over the rank in the same order, and DoRA's norms are summed in another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from jpeft.adapter import Adapter
from jpeft.methods import METHODS
from jpeft.site import Site

Change = Callable[[np.ndarray, slice, np.ndarray], None]
Leaves = Mapping[str, np.ndarray]
ROWS, SMALL = 16, 1 << 18


def goes_by_rows(adapter: Adapter, site: Site, file_axes: tuple[int, ...]) -> bool:
    """Whether a site's change is one to rows of a single matrix: no stack, no mask, no norm over the rows themselves.

    Args:
      adapter: whose leaves act.
      site: the only one at this weight.
      file_axes: which axis of the leaf is each of the file's.
    """
    kernel = site.kernel
    one_matrix = len(kernel.contracted) == len(kernel.output) == 1 and not kernel.batch and kernel.kind != "conv"
    plain = one_matrix and site.layers is None and "mask" not in adapter.leaves(site.path)
    return plain and site.method in CHANGES and (site.method != "dora" or file_axes[0] in kernel.output)


def row_change(adapter: Adapter, site: Site, file_axes: tuple[int, ...]) -> Change:
    """What such a site does to `(some rows in fp32, which rows, room for as many)`; the first are overwritten."""
    leaves = METHODS[site.method].matrices(adapter.leaves(site.path), site.kernel)
    wide = {name: np.asarray(leaf, np.float32) for name, leaf in leaves.items()}
    return CHANGES[site.method](wide, file_axes[0] in site.kernel.output)


def _lora(leaves: Leaves, rows_are_output: bool) -> Change:
    """W' = W + s A B."""
    a, b = leaves["a"] * leaves["scaling"], leaves["b"]
    left, right = map(np.ascontiguousarray, (b.T, a.T) if rows_are_output else (a, b))

    def change(w: np.ndarray, rows: slice, room: np.ndarray) -> None:
        _multiply(left[rows], right, room)
        w += room

    return change


def _multiply(left: np.ndarray, right: np.ndarray, out: np.ndarray) -> None:
    """A skinny product in this thread, as many that are too small for OpenBLAS to wake its own: ours are busy already.

    Its threads wait for work in a loop: with two of ours on two cores, a merge took twice to twenty times as long.
    """
    groups, rank = len(left) // ROWS, len(right)
    whole = groups * ROWS
    step = max(1, SMALL // (ROWS * max(1, rank)))
    for start in range(0, right.shape[1], step):
        columns = slice(start, start + step)
        part, of = right[:, columns], out[:, columns]
        if whole:
            np.matmul(left[:whole].reshape(groups, ROWS, rank), part, out=of[:whole].reshape(groups, ROWS, -1))
        np.matmul(left[whole:], part, out=of[whole:])


def _adalora(leaves: Leaves, rows_are_output: bool) -> Change:
    """W' = W + s A diag(E) B."""
    return _lora({**leaves, "a": leaves["a"] * leaves["e"]}, rows_are_output)


def _dora(leaves: Leaves, rows_are_output: bool) -> Change:
    """W' = m V / ‖V‖ with V = W + s A B: what is contracted is a row here, and a row's norm is all in it."""
    m, lora = leaves["m"], _lora(leaves, rows_are_output)

    def change(w: np.ndarray, rows: slice, room: np.ndarray) -> None:
        lora(w, rows, room)
        norms = np.sqrt(np.einsum("ij,ij->i", w, w))
        w *= (m[rows] / np.where(norms > 0, norms, 1))[:, None]

    return change


def _ia3(leaves: Leaves, rows_are_output: bool) -> Change:
    """W' = diag(l_in) W diag(l)."""
    by_row, by_column = ("l", "l_in") if rows_are_output else ("l_in", "l")

    def change(w: np.ndarray, rows: slice, room: np.ndarray) -> None:
        if by_row in leaves:
            w *= leaves[by_row][rows, None]
        if by_column in leaves:
            w *= leaves[by_column]

    return change


CHANGES: Mapping[str, Callable[[Leaves, bool], Change]] = {
    "lora": _lora,
    "adalora": _adalora,
    "dora": _dora,
    "ia3": _ia3,
}
