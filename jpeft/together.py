"""Several adapters at one weight: what adds is taken of the base and added up; what scales acts on what came of that.

So their order means nothing, for weights and for the results of products alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from jax import Array

from jpeft.method import Leaves, Method

Acting = Sequence[tuple[Method, Leaves]]
Act = Callable[[Array], Array]


def summed(base: Array, acts: Iterable[tuple[Method, Act]]) -> Array:
    """`base` (a weight, or a product's result) with each act's change added to it."""
    total = base
    for method, act in acts:
        same_anywhere = method.delta is not None or total is base
        total = act(total) if same_anywhere else total + (act(base) - base)
    return total


def adapted_matrix(w: Array, acting: Acting) -> Array:
    """W' of matrices (*batch, in, out), in the dtype of `w`."""
    cast = [(method, {name: leaf.astype(w.dtype) for name, leaf in leaves.items()}) for method, leaves in acting]
    act = lambda method, leaves: lambda w: method.transform(w, leaves)
    w = summed(w, ((method, act(method, leaves)) for method, leaves in cast if method.scales is None))
    for method, leaves in cast:
        w = method.transform(w, leaves) if method.scales is not None else w
    return w
