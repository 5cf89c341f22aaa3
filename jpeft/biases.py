"""The bias beside an adapted weight, where a method changes that too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jpeft.adapter import Adapter
from jpeft.effects import Effect, acting
from jpeft.errors import KernelError
from jpeft.kernel import wide
from jpeft.methods import METHODS
from jpeft.site import Site
from jpeft.tree import beside


def added(path: str, flat: Mapping[str, Any], effects: Sequence[Effect]) -> dict[str, Array]:
    """The bias beside a weight with what its adapters add, under its path; empty if they add nothing.

    Raises:
      KernelError: there is no bias to add to.
    """
    widened = [(method, {name: wide(leaf) for name, leaf in leaves.items()}) for method, leaves in acting(effects)]
    changes = [change for method, leaves in widened if (change := method.bias(leaves)) is not None]
    bias = beside(path, "bias")
    if changes and bias not in flat:
        raise KernelError(
            f"the adapter changes the bias of {path!r}, and there is no {bias!r} to hold it; run it with jpeft.lift"
        )
    total = sum(_in_place(change, effects[0].site, flat[bias].shape) for change in changes)
    return {bias: (wide(flat[bias]) + total).astype(flat[bias].dtype)} if changes else {}


def scaled(path: str, flat: Mapping[str, Any], effects: Sequence[Effect]) -> dict[str, Array]:
    """The bias beside a weight whose result is scaled, scaled likewise; empty if there is none, or no scale."""
    found = [method.scales(leaves).out for method, leaves in acting(effects) if method.scales is not None]
    outs = [out for out in found if out is not None]
    bias = beside(path, "bias")
    if not outs or bias not in flat:
        return {}
    new = wide(flat[bias])
    for out in outs:
        new = new * _in_place(wide(out), effects[0].site, new.shape)
    return {bias: new.astype(flat[bias].dtype)}


def adds(adapter: Adapter, site: Site) -> bool:
    """Whether an adapter adds to the layer's result at a site, and so to its bias: told by shapes, nothing computed."""
    method = METHODS[site.method]
    find = lambda leaves: method.bias(method.matrices(leaves, site.kernel))
    return jax.eval_shape(find, adapter.leaves(site.path)) is not None


def scales(adapter: Adapter, site: Site) -> bool:
    """Whether an adapter scales the layer's result at a site, its bias included: told by shapes."""
    method = METHODS[site.method]
    if (scales := method.scales) is None:
        return False
    return (
        jax.eval_shape(lambda leaves: scales(method.matrices(leaves, site.kernel)).out, adapter.leaves(site.path))
        is not None
    )


def _in_place(change: Array, site: Site, shape: tuple[int, ...]) -> Array:
    """(*batch, out) as the bias has it: batch axes where the kernel has them (so Flax's scan stacks both)."""
    kernel = site.kernel
    own = tuple(size for axis, size in enumerate(shape) if axis not in kernel.batch)
    if math.prod(own) != kernel.fan_out or len(own) + len(kernel.batch) != len(shape):
        raise KernelError(
            f"the bias beside {site.path!r} has shape {shape}; expected axes for the kernel's output "
            f"{kernel.sizes(kernel.output)} and batch {kernel.batch_shape}; run it with jpeft.lift"
        )
    return jnp.moveaxis(change.reshape(*kernel.batch_shape, *own), range(len(kernel.batch)), kernel.batch)
