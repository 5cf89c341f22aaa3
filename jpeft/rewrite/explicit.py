"""Where shardings are a part of types (`AxisType.Explicit`): the compiler decides how a method's own products are.

There every product that sums over a split axis has to be told how its result is split. The model's own product has been
told; a method's products, whatever they are, only have to end up where that one does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import Array


def ending_where(frozen: Callable[..., Array], adapted: Callable[..., Array], *args: Any) -> Array:
    """`adapted(*args)`, split as the model's own `frozen(*args)` is; outside of such types just that."""
    if not jax.sharding.get_abstract_mesh().explicit_axes:
        return adapted(*args)
    there = jax.eval_shape(frozen, *args).sharding
    by_compiler: Callable[..., Array] = jax.sharding.auto_axes(adapted, out_sharding=there)  # pyright: ignore[reportAssignmentType]  (of two forms)
    return by_compiler(*args)
