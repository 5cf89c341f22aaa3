"""What a method is: a record of pure functions on one weight, seen as matrices `(*batch, in, out)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from jax import Array

from jpeft.kernel import Kernel

Leaves = dict[str, Array]


class Product(Protocol):
    """The method inside a product of the model, without forming the adapted weight.

    `x` (*batch, rows, in) is the product's input, after dropout where there is some, and `y` (*batch, rows, out) the
    frozen product's result. Returns the adapted result.
    """

    def __call__(self, x: Array, y: Array, leaves: Leaves, *, forward_mode: bool) -> Array:
        """The adapted result."""
        ...


class Method(NamedTuple):
    """A way to adapt a weight.

    Attributes:
      transform: `(W, leaves) -> W'`: the definition, dense, on matrices `(*batch, in, out)`.
      matrices: `(leaves, kernel) -> leaves`, each leaf's own axes joined: A `(*batch, *contracted, r)` becomes
        `(*batch, in, r)`.
      delta: `leaves -> ΔW` where `W' = W + ΔW`; None for methods that do not add. Only these can be weighted.
      weighted: `(leaves, weight) -> leaves` with `weight * ΔW`; goes with `delta`.
      product: the fast path through a product; None leaves the dense weight.
      transposed: the leaves of the same adapter on `Wᵀ`; None where such a product has to be dense.
      lookup: the fast path through an embedding's lookup or a convolution, `(take, leaves) -> what to add`: `take(A)`
        are the rows of A (in, r) that the model takes of its table, or A convolved with the input, (..., r).
      bias: `leaves -> (*batch, out)`, what is added to the layer's result, or None.
    """

    transform: Callable[[Array, Leaves], Array]
    matrices: Callable[[Leaves, Kernel], Leaves]
    delta: Callable[[Leaves], Array] | None = None
    weighted: Callable[[Leaves, Array], Leaves] | None = None
    product: Product | None = None
    transposed: Callable[[Leaves], Leaves] | None = None
    lookup: Callable[[Callable[[Array], Array], Leaves], Array] | None = None
    bias: Callable[[Leaves], Array | None] = lambda leaves: None
