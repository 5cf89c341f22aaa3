"""Replacement: a leaf of the base, copied and trained whole.

    W' = V

What `modules_to_save` and the trained biases of a LoRA are: no method to choose, but a part of others.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jpeft.errors import KernelError
from jpeft.kernel import Kernel
from jpeft.method import Leaves, Method, Shapes
from jpeft.site import Site


def init(key: Array, site: Site, spec: Any, weight: Any, dtype: jnp.dtype) -> Leaves:
    """`value`: a copy of the leaf, in float32 where it has half of that."""
    if isinstance(weight, jax.ShapeDtypeStruct):
        raise KernelError(
            f"{site.path!r} is trained whole, which starts from its value; found a ShapeDtypeStruct, give arrays"
        )
    half = weight.dtype in (jnp.bfloat16, jnp.float16)
    return {"value": jnp.array(weight, jnp.float32 if half else weight.dtype)}


def shapes(spec: Any, site: Site) -> Shapes:
    """The leaf's own."""
    del spec
    return {"value": site.kernel.shape}


def matrices(leaves: Leaves, kernel: Kernel) -> Leaves:
    """V has the leaf's own shape, all of it output: a matrix of one row."""
    return {"value": leaves["value"].reshape(kernel.fan_in, kernel.fan_out)}


def transform(w: Array, leaves: Leaves) -> Array:
    """W' = V, in the dtype it is trained in; the base plays no part."""
    del w
    return leaves["value"]


METHOD = Method(transform, matrices, init, shapes, lambda kernel: {"value": kernel.output}, alone=True)
