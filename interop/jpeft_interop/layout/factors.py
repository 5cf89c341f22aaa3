"""A method's leaves of one weight here, and those of each torch matrix that the weight holds.

The same links carry them as carry the weight: `a` has the weight's batch and contracted axes, `b` its batch and output
axes, and of a link each takes the axes that it has. So what is done to a weight's outputs (a rotary order, heads, a
part of a fused kernel) is done to B alone, what is done to its inputs to A alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jpeft.errors import AdapterError
from jpeft.kernel import Kernel
from jpeft.site import Site
from jpeft_interop.layout.axes import Axis
from jpeft_interop.layout.geometry import BATCH, OUTPUT, contracted_axes
from jpeft_interop.layout.link import Link, Side, assign, named, whole

# The axes of each leaf, after the batch axes.
AXES: Mapping[str, tuple[str, ...]] = {
    "a": ("contracted", "rank"),
    "b": ("rank", "output"),
    "bias": ("output",),
    "m": ("output",),
    "e": ("rank",),
    "l": ("output",),
    "l_in": ("contracted",),
}


def is_head(link: Link, kernel: Kernel) -> bool:
    """Whether torch uses the leaf as a tied head: it puts out what the leaf's geometry contracts (the vocabulary)."""
    rows = {name for axis in kernel.contracted for name in link.leaf[axis].names}
    return link.kind == "linear" and kernel.kind == "embedding" and set(link.torch[0].names) <= rows


def is_as_in_torch(link: Link, kernel: Kernel) -> bool:
    """Whether a weight is one of torch's matrices: all of it, alone, unscaled, its inputs and outputs in that order."""
    sides = [_sides(leaf, link, kernel, 1) for leaf in ("a", "b")]
    every = [axis for axis in (*link.leaf, *link.torch) if axis.length(link.sizes) != axis.size]
    long = lambda side: [name for axis in side for name in axis.names if link.sizes.get(name, 1) > 1]
    alone = all(size == 1 for size in kernel.batch_shape) and link.kind not in BATCH
    return alone and not every and link.scale == 1 and all(long(here) == long(there) for here, there in sides)


def axes_of(leaf: str) -> tuple[str, ...]:
    """The axes of a leaf, after the batch axes.

    Raises:
      AdapterError: they are not in the table.
    """
    if leaf not in AXES:
        raise AdapterError(
            f"the axes of a leaf {leaf!r} are not known; those of {sorted(AXES)} are (layout/factors.py)"
        )
    return AXES[leaf]


def matrix_of(array: np.ndarray, leaf: str, link: Link, kernel: Kernel) -> np.ndarray:
    """The part of a leaf that is for one torch matrix; zero where the matrix holds other weights than this.

    Args:
      array: the leaf `leaf` of a weight of geometry `kernel`, `(*batch, …)`.
      leaf: `a`, `b`, …
      link: where the weight and the matrix are the same.
      kernel: the weight's geometry.

    Returns:
      Of `a` `(*contracted, r)`, of `b` `(r, *output)`, …, the axes as `canonical_kernel(link)` has them; before them
      the experts, where torch stacks them.

    Raises:
      AdapterError: torch's inputs are not the weight's inputs.
    """
    rank = _rank_of(array, leaf, len(kernel.batch))
    here, there = _sides(leaf, link, kernel, rank)
    made = np.zeros(whole(there), array.dtype)
    _assign(made, there, array, here, link, rank)
    return made


def put_matrix(target: np.ndarray, leaf: str, array: np.ndarray, link: Link, kernel: Kernel, start: int = 0) -> None:
    """The inverse of `matrix_of`: writes a matrix's part into a leaf, its directions from `start` on."""
    rank = _rank_of(array, leaf, len(BATCH.get(link.kind, ())))
    here, there = _sides(leaf, link, kernel, rank)
    size = _rank_of(target, leaf, len(kernel.batch))
    here = tuple(Axis(axis.names, start, size) if axis.names == ("rank",) else axis for axis in here)
    _assign(target, here, array, there, link, rank)


def at_batch(array: np.ndarray, link: Link, kernel: Kernel) -> np.ndarray:
    """Of an array over the batch axes (a scaling), a writable view of what is for one torch matrix."""
    axes = tuple(link.leaf[axis] for axis in kernel.batch)
    return named(array, axes, link.sizes, dict(link.index))[0] if axes else array


def batch_index(link: Link, kernel: Kernel) -> tuple[int, ...]:
    """Where on the batch axes the first of a torch matrix's weights is."""
    places = at_batch(np.arange(int(np.prod(kernel.batch_shape))).reshape(kernel.batch_shape), link, kernel)
    return tuple(int(i) for i in np.unravel_index(int(np.min(places)), kernel.batch_shape))


def is_adapted(site: Site, link: Link) -> bool:
    """Whether an adapter acts on a torch matrix: of a stack, those of some layers may be left alone."""
    return bool(np.any(at_batch(site.chosen, link, site.kernel)))


def _rank_of(array: np.ndarray, leaf: str, batch: int) -> int:
    axes = axes_of(leaf)
    if "rank" not in axes:
        return 1
    return array.shape[-1] if axes[-1] == "rank" else array.shape[batch]


def _sides(leaf: str, link: Link, kernel: Kernel, rank: int) -> tuple[Side, Side]:
    groups = {"rank": (Axis(("rank",), 0, rank),)}
    here = groups | {name: tuple(link.leaf[i] for i in getattr(kernel, name)) for name in ("contracted", "output")}
    contracted, output = contracted_axes(link.kind, len(link.torch)), OUTPUT[link.kind]
    if is_head(link, kernel):
        contracted, output = output, contracted
    there = groups | {
        "contracted": tuple(link.torch[i] for i in contracted),
        "output": tuple(link.torch[i] for i in output),
    }
    if leaf == "l_in" and link.kind == "conv":  # one for each channel, whatever the tap
        here["contracted"], there["contracted"] = here["contracted"][-1:], there["contracted"][-1:]
    batch = tuple(link.leaf[axis] for axis in kernel.batch)
    stacked = tuple(link.torch[axis] for axis in BATCH.get(link.kind, ()))
    return (*batch, *_joined(leaf, here)), (*stacked, *_joined(leaf, there))


def _joined(leaf: str, groups: Mapping[str, Side]) -> Side:
    return tuple(axis for group in axes_of(leaf) for axis in groups[group])


def _assign(target: np.ndarray, to: Side, source: np.ndarray, of: Side, link: Link, rank: int) -> None:
    try:
        assign(target, to, source, of, {**link.sizes, "rank": rank}, dict(link.index))
    except ValueError as error:
        raise AdapterError(
            f"{link.path!r} and {link.key!r}: what the weight contracts is not what torch's contracts ({error}): "
            "is the adapter's geometry (kernels=) that of the layout?"
        ) from error
