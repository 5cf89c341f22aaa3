"""Where one leaf lies in torch: its axes, the torch tensors that hold it, and theirs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from jpeft.errors import WeightsError
from jpeft_interop.layout.axes import Notation, names, parse, shape_of, side, solve
from jpeft_interop.layout.link import Kind, Link

NUMBER = re.compile(r"\{(\w+)(?:\*(\d+))?(?:\+(\d+))?\}")  # {l}, {l*2}, {l+1}, {l*2+1}


class Tensor(NamedTuple):
    """A torch tensor, or with `{name}` in its key, one for each index along that axis of the leaf.

    Attributes:
      key: the torch name.
      axes: its axes, in the notation of `jpeft_interop.layout.axes`.
      kind: what it is to its module: `linear` (out, in), `conv` (out, in, k...), `conv1d` (in, out), `embedding` (rows,
        features), `experts` (experts, out, in), `experts_io` (experts, in, out), `matrix` (out, in) of a module of
        another kind than Linear (a router), `plain`: the weight of no product.
    """

    key: str
    axes: str
    kind: Kind


@dataclass(frozen=True)
class Place:
    """Where one leaf lies in torch.

    Attributes:
      axes: the leaf's axes.
      torch: the tensors that hold it: several, where it is fused of them, or where torch has two names for it.
      sizes: of every name in `axes` that the leaf's shape leaves open, or of all.
      scale: the leaf holds `scale` times what torch has (a query kernel with 1/√h folded in), and
      offset: this more (the scale of a norm that torch keeps as its distance from 1).

    Example: a stack of query kernels (layers, d, heads, head), its rotary halves interleaved.
      >>> place = Place.of("l d n (half two)", {"layers.{l}.q_proj.weight": "(n two half) d"}, two=2)
      >>> place.fit((2, 4, 1, 6), "q").sizes
      (('d', 4), ('half', 3), ('l', 2), ('n', 1), ('two', 2))
    """

    axes: str
    torch: tuple[Tensor, ...]
    sizes: tuple[tuple[str, int], ...] = ()
    scale: float = 1.0
    offset: float = 0.0

    @classmethod
    def of(
        cls,
        axes: str,
        torch: Mapping[str, str | tuple[str, Kind]],
        *,
        scale: float = 1.0,
        offset: float = 0.0,
        **sizes: int,
    ) -> Place:
        """A place from torch's axes by torch's names.

        Args:
          axes: the leaf's.
          torch: by torch's name, its axes, or those and its kind: told by the name and the number of axes otherwise, of
            which an embedding must be told apart, `{"embed_tokens.weight": ("v d", "embedding")}`.
          scale: the leaf holds `scale` times what torch has, and
          offset: this more.
          **sizes: of the names that the leaf's shape leaves open.
        """
        tensors = (
            Tensor(key, s, kind_of(key, s)) if isinstance(s, str) else Tensor(key, *s) for key, s in torch.items()
        )
        return cls(axes, tuple(tensors), tuple(sorted(sizes.items())), scale, offset)

    @property
    def notation(self) -> Notation:
        """The leaf's axes, parsed."""
        return parse(self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """The leaf's shape; of a place that was fitted."""
        return shape_of(self.notation, dict(self.sizes))

    def fit(self, shape: tuple[int, ...], path: str) -> Place:
        """The same for a leaf of this shape, every size known.

        Raises:
          WeightsError: the shape does not fit the axes, or leaves a size open.
        """
        sizes = solve(self.notation, shape, dict(self.sizes), repr(path))
        return Place(self.axes, self.torch, tuple(sorted(sizes.items())), self.scale, self.offset)

    def links(self, path: str) -> Iterator[Link]:
        """Each region of the leaf with the torch tensor's region that it equals; of a place that was fitted.

        Raises:
          WeightsError: the two sides do not name the same axes.
        """
        sizes = dict(self.sizes)
        for tensor in self.torch:
            numbered = [found[1] for found in NUMBER.finditer(tensor.key)]
            written, told = parse(tensor.axes), f"{path!r} and {tensor.key!r}"
            used = [*names(written), *dict.fromkeys(numbered)]
            if unknown := [name for name in used if name not in sizes]:
                raise WeightsError(f"{told}: {unknown[0]!r} is no axis of the leaf, {self.axes!r}")
            leaf, torch = side(self.notation, used, sizes, told), side(written, used, sizes, told)
            here = [name for axis in leaf for name in axis.names]
            if sorted(here) != sorted(used):
                raise WeightsError(f"{told}: {self.axes!r} and {tensor.axes!r} do not name the same axes, each once")
            for numbers in itertools.product(*(range(sizes[name]) for name in dict.fromkeys(numbered))):
                index = dict(zip(dict.fromkeys(numbered), numbers, strict=True))
                key = numbered_key(tensor.key, index)
                numbers_of = tuple(index.items())
                yield Link(path, key, tensor.kind, leaf, torch, numbers_of, sizes, self.scale, self.offset)


def numbered_key(key: str, index: Mapping[str, int]) -> str:
    """The key with its numbers filled in.

    Example:
      >>> numbered_key("layers.{l*2+1}.weight", {"l": 3})
      'layers.7.weight'
    """
    return NUMBER.sub(lambda found: str(index[found[1]] * int(found[2] or 1) + int(found[3] or 0)), key)


def kind_of(key: str, axes: str) -> Kind:
    """What a torch tensor is taken for where nothing says: a `weight` of two axes is linear, of more a convolution."""
    count = len(parse(axes))
    if key.rpartition(".")[2] != "weight" or count < 2:
        return "plain"
    return "linear" if count == 2 else "conv"
