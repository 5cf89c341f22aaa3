"""The geometry of a leaf, as torch's use of the tensors that it lies in implies it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from jpeft.errors import WeightsError
from jpeft.kernel import Kernel
from jpeft_interop.layout.link import Kind, Link
from jpeft_interop.layout.place import Place

# Of a torch tensor, the axes that its module contracts (looks up, for an embedding), in the order that a kernel here
# has them, and those that come out.
CONTRACTED = {"linear": (1,), "matrix": (1,), "conv1d": (0,), "embedding": (0,), "experts": (2,), "experts_io": (1,)}
OUTPUT = {
    "linear": (0,),
    "matrix": (0,),
    "conv": (0,),
    "conv1d": (1,),
    "embedding": (1,),
    "experts": (1,),
    "experts_io": (2,),
}
EXPERT = re.compile(r"(?:^|\.)experts\.\{(\w+)")
BATCH = {"experts": (0,), "experts_io": (0,)}
PARAMETERS = (*BATCH, "matrix")  # what PEFT adapts as parameters, not as modules


def contracted_axes(kind: Kind, ndim: int) -> tuple[int, ...]:
    """Torch's contracted axes: of a convolution, the taps and then the channels."""
    return (*range(2, ndim), 1) if kind == "conv" else CONTRACTED[kind]


def kernel_of(place: Place, links: Sequence[Link]) -> Kernel | None:
    """The leaf's geometry: an axis whose index is in torch's key is a batch axis. None for the weight of no product.

    A leaf that is an embedding and a head is an embedding.

    Raises:
      WeightsError: an axis of the leaf would have two roles.
    """
    weights = [link for link in links if link.kind != "plain"]
    if not weights:
        return None
    link = next((link for link in weights if link.kind == "embedding"), weights[0])
    roles = [_roles(link, axis.names) for axis in link.leaf]
    for axis, found in enumerate(roles):
        if len(found) > 1:
            raise WeightsError(f"{link.path!r} ({place.axes}): axis {axis} would be {' and '.join(sorted(found))}")
    of = lambda role: tuple(axis for axis, found in enumerate(roles) if role in found)
    kind = link.kind if link.kind in ("embedding", "conv") else "product"
    named = _experts(place, link)
    experts = tuple(axis for axis in of("batch") if named & set(link.leaf[axis].names))
    return Kernel(place.shape, of("contracted"), of("output"), of("batch"), kind=kind, experts=experts)


def _experts(place: Place, link: Link) -> set[str]:
    """The names of the axes that go over experts: stacked in torch, or numbered behind `experts.` in its names."""
    stacked = {name for axis in BATCH.get(link.kind, ()) for name in link.torch[axis].names}
    return stacked | {found[1] for tensor in place.torch for found in EXPERT.finditer(tensor.key)}


def _roles(link: Link, names: Sequence[str]) -> set[str]:
    return {_role(link, name) for name in names} or {"contracted"}  # an axis of length 1 may be either


def _role(link: Link, name: str) -> str:
    of = lambda axes: {name for axis in axes for name in link.torch[axis].names}
    if name in dict(link.index) or name in of(BATCH.get(link.kind, ())):
        return "batch"
    return "output" if name in of(OUTPUT[link.kind]) else "contracted"


def canonical_kernel(link: Link, *, as_head: bool = False, groups: int = 1) -> Kernel:
    """The kernel of the torch tensor on its own, its axes as `params_from_torch` has them.

    An embedding that a head shares is an embedding for both.
    """
    shape = link.torch_shape
    if as_head:
        return Kernel(shape, (0,), (1,), kind="embedding")
    if link.kind == "conv":
        whole = (*shape[2:], shape[1], shape[0])
        return Kernel(whole, tuple(range(len(whole) - 1)), (len(whole) - 1,), kind="conv", groups=groups)
    if link.kind in BATCH:
        whole = (shape[0], shape[2], shape[1]) if link.kind == "experts" else shape
        return Kernel(whole, (1,), (2,), (0,))
    matrix = shape[::-1] if link.kind in ("linear", "matrix") else shape
    return Kernel(matrix, (0,), (1,), kind="embedding" if link.kind == "embedding" else "product")
