"""The geometry of a weight: which of its axes are contracted, which come out, which only repeat it.

`y[batch, output] = sum over contracted of x[batch, contracted] * W[contracted, output, batch]`, in any order of axes. A
method sees every weight as matrices `(*batch, in, out)`: this file is the one place where that is done and undone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import jax.numpy as jnp
from jax import Array

from jpeft.errors import KernelError


@dataclass(frozen=True)
class Kernel:
    """The geometry of one weight. Axes are positions in `shape`; every axis has exactly one role.

    Attributes:
      shape: the weight's shape.
      contracted: axes summed over against the input (the vocabulary, for an embedding that is looked up).
      output: axes of the result.
      batch: axes that only repeat the weight: stacked layers, experts.
      kind: `product`, `embedding` (a lookup) or `conv`.
      groups: `feature_group_count` of a convolution.
      head: the product is the model's output: `all-linear` leaves it alone.
      uses: what the weight meets in the program, one word a use, in the order met.
      experts: those of the batch axes that a single product goes over, other rows for each index; the rest are layers,
        one index at a time.
    """

    shape: tuple[int, ...]
    contracted: tuple[int, ...]
    output: tuple[int, ...]
    batch: tuple[int, ...] = ()
    kind: str = "product"
    groups: int = 1
    head: bool = False
    uses: tuple[str, ...] = ()
    experts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        groups = (self.batch, self.contracted, self.output)
        each_once = sorted(axis for group in groups for axis in group) == list(range(len(self.shape)))
        if not each_once or any(list(group) != sorted(group) for group in groups):
            raise KernelError(
                f"axes of a weight of shape {self.shape}: each must be contracted, output or batch, exactly once, in "
                f"ascending order; found contracted {self.contracted}, output {self.output}, batch {self.batch}"
            )
        if not set(self.experts) <= set(self.batch):
            raise KernelError(f"experts {self.experts} must be some of the batch axes; found {self.batch}")

    def sizes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        """How long these axes are."""
        return tuple(self.shape[axis] for axis in axes)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The shape of the batch axes: how many matrices there are."""
        return self.sizes(self.batch)

    @property
    def stack(self) -> int | None:
        """Which of the batch axes, by its place among them, counts the stacked layers; None if all are experts."""
        return next((i for i, axis in enumerate(self.batch) if axis not in self.experts), None)

    @property
    def depth(self) -> int:
        """How many layers are stacked; 1 where none are."""
        return 1 if self.stack is None else self.batch_shape[self.stack]

    @property
    def fan_in(self) -> int:
        """The rows of each matrix: the product of the contracted axes."""
        return math.prod(self.sizes(self.contracted))

    @property
    def fan_out(self) -> int:
        """The columns of each matrix: the product of the output axes."""
        return math.prod(self.sizes(self.output))


def to_matrix(weight: Array, kernel: Kernel) -> Array:
    """`weight` in its own axes as matrices `(*batch, in, out)`."""
    order = (*kernel.batch, *kernel.contracted, *kernel.output)
    return weight.transpose(order).reshape(*kernel.batch_shape, kernel.fan_in, kernel.fan_out)


def from_matrix(matrix: Array, kernel: Kernel) -> Array:
    """The inverse of `to_matrix`."""
    order = (*kernel.batch, *kernel.contracted, *kernel.output)
    back = tuple(order.index(axis) for axis in range(len(order)))
    return matrix.reshape(kernel.sizes(order)).transpose(back)


def wide(array: Array) -> Array:
    """In the precision that adapted weights are computed in: float32, or float64 where it is that."""
    return array if array.dtype == jnp.float64 else array.astype(jnp.float32)


@dataclass(frozen=True)
class Kernels(Mapping[str, Kernel]):
    """Paths and the geometry of the weights there; what `jpeft.kernels` returns and `init` takes as `kernels=`.

    `unknown` holds the leaves that are no weight of a product, and why: a targeted one is an error that says so.
    """

    entries: tuple[tuple[str, Kernel], ...]
    unknown: tuple[tuple[str, str], ...] = ()

    @cached_property
    def _by_path(self) -> dict[str, Kernel]:
        return dict(self.entries)

    def __getitem__(self, path: str) -> Kernel:
        return self._by_path[path]

    def __iter__(self) -> Iterator[str]:
        return iter(path for path, _ in self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __str__(self) -> str:
        width = max((len(path) for path in self), default=0)
        rows = [f"{path:{width}}  {k.kind}{' (head)' if k.head else ''} {_describe(k)}" for path, k in self.entries]
        return "\n".join([*rows, *(f"{path:{width}}  -  {why}" for path, why in self.unknown)])


def _describe(kernel: Kernel) -> str:
    parts = (("contracted", kernel.contracted), ("output", kernel.output), ("batch", kernel.batch))
    return f"{kernel.shape} " + " ".join(f"{name}={axes}" for name, axes in parts if axes)
