"""What a method is: a record of pure functions on one weight, seen as matrices `(*batch, in, out)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array

from jpeft.kernel import Kernel
from jpeft.site import Site

Leaves = dict[str, Array]
Shapes = dict[str, tuple[int, ...]]
Axes = tuple[int | None, ...]  # of a leaf: the axis of the weight that each of its axes is, None for the rank
Weights = Callable[[], Array]


class Product(Protocol):
    """The method inside a product of the model, without forming the adapted weight.

    `x` (*batch, rows, in) is the product's input, after dropout where there is some, `y` (*batch, rows, out) the frozen
    product's result, and `w()` the frozen weight (*batch, in, out) as this product has it: transposed for a tied head,
    as the leaves are then. Without batch axes there may be several axes of rows. Returns the adapted result.
    """

    def __call__(self, x: Array, y: Array, w: Weights, leaves: Leaves, *, forward_mode: bool) -> Array:
        """The adapted result."""
        ...


def for_rows(v: Array, rows: Array) -> Array:
    """`v` (*batch, n) with an axis for each of the axes of `rows` (*batch, *rows, n)."""
    return v.reshape(*v.shape[:-1], *[1] * (rows.ndim - v.ndim), v.shape[-1])


class Meeting(NamedTuple):
    """How a use of a weight that is no product of matrices takes what stands in the weight's place.

    Attributes:
      take: `A (*batch, in, r) -> (..., r)`: the rows of A that the model looks up in its table, A convolved with the
        input, or each row of the input times the A of its own expert.
      then: `h (..., r), B (*batch, r, out) -> (..., out)`: each row times its own B.
      each: `v (*batch, n) -> ` each row's own v, which multiplies (..., n).
    """

    take: Callable[[Array], Array]
    then: Callable[[Array, Array], Array]
    each: Callable[[Array], Array]


class Lookup(Protocol):
    """The method inside an embedding's lookup, a convolution, or a product whose rows are sorted by expert.

    `y` (..., out) is what the frozen weight gives, and `w()` the weight itself (*batch, in, out); only experts have
    batch axes here. Returns the adapted result.
    """

    def __call__(self, meeting: Meeting, y: Array, w: Weights, leaves: Leaves) -> Array:
        """The adapted result."""
        ...


class Init(Protocol):
    """The trained leaves of a new adapter at one weight, whose value may matter; they change nothing yet."""

    def __call__(self, key: Array, site: Site, spec: Any, weight: Any, dtype: jnp.dtype) -> Leaves:
        """The leaves, in the weight's own axes."""
        ...


class Scales(NamedTuple):
    """Factors on a product's input and result: `in_` (*batch, in) and `out` (*batch, out), None for 1."""

    in_: Array | None = None
    out: Array | None = None


class Method(NamedTuple):
    """A way to adapt a weight.

    Methods that add act on the base, each for itself, and their changes add up. Methods with `scales` act on what came
    of that; they commute. So the order of several adapters means nothing.

    Attributes:
      transform: `(W, leaves) -> W'`: the definition, dense, on matrices `(*batch, in, out)`.
      matrices: `(leaves, kernel) -> leaves`, each leaf's own axes joined: A `(*batch, *contracted, r)` becomes
        `(*batch, in, r)`.
      init: the trained leaves of a new adapter.
      shapes: `(spec, site) -> {leaf: shape}` of the leaves there are, trained and constant, all but a `mask`.
      axes: `kernel -> {leaf: axes}`, for every leaf there may be: where each of its axes comes from, in the weight.
      constant: `(spec, site) -> leaves` that are not trained.
      delta: `leaves -> ΔW` where `W' = W + ΔW` whatever W is; None for other methods. Only these can be weighted.
      weighted: `(leaves, weight) -> leaves` with `weight * ΔW`; goes with `delta`.
      product: the fast path through a product; None (without `scales`) leaves the dense weight.
      transposed: the leaves of the same adapter on `Wᵀ`; None, or for such leaves None, where such a product has to be
        dense. It never is where there is a `bias`.
      lookup: the fast path through an embedding's lookup, a convolution, or a product of rows sorted by expert.
      bias: `leaves -> (*batch, out)`, what is added to the layer's result, or None. Whatever its leaf is called.
      scales: of a method that only scales the input and the result, the layer's bias included.
      penalty: `[leaves of each site] -> scalar`, what the method adds to the loss, or None.
      alone: the method can't share a weight with another adapter.
    """

    transform: Callable[[Array, Leaves], Array]
    matrices: Callable[[Leaves, Kernel], Leaves]
    init: Init
    shapes: Callable[[Any, Site], Shapes]
    axes: Callable[[Kernel], dict[str, Axes]] = lambda kernel: {}
    constant: Callable[[Any, Site], Leaves] = lambda spec, site: {}
    delta: Callable[[Leaves], Array] | None = None
    weighted: Callable[[Leaves, Array], Leaves] | None = None
    product: Product | None = None
    transposed: Callable[[Leaves], Leaves | None] | None = None
    lookup: Lookup | None = None
    bias: Callable[[Leaves], Array | None] = lambda leaves: None
    scales: Callable[[Leaves], Scales] | None = None
    penalty: Callable[[Sequence[Leaves]], Array] | None = None
    alone: bool = False
