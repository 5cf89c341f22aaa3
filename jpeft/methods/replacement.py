"""Replacement: a leaf of the base, copied and trained whole.

    W' = V

What `modules_to_save` and the trained biases of a LoRA are: no method to choose, but a part of others.
"""

from __future__ import annotations

from jax import Array

from jpeft.kernel import Kernel
from jpeft.method import Leaves, Method


def matrices(leaves: Leaves, kernel: Kernel) -> Leaves:
    """V has the leaf's own shape, all of it output: a matrix of one row."""
    return {"value": leaves["value"].reshape(kernel.fan_in, kernel.fan_out)}


def transform(w: Array, leaves: Leaves) -> Array:
    """W' = V, in the dtype it is trained in; the base plays no part."""
    del w
    return leaves["value"]


METHOD = Method(transform, matrices)
