"""Keeping a value in memory, where XLA's CPU compiler would rather compute it again in each of its readers.

That compiler merges an elementwise result into all that read it: fine for what is cheap to have twice, but it keeps
every operand alive until the last reader, and computes a cosine once for each layer that turns by it. Its barrier is
gone by the time that it fuses; a call that it is told not to inline is not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import jax
from jax.experimental.xla_metadata import set_xla_metadata

F = TypeVar("F", bound=Callable)


def for_cpu() -> bool:
    """Whether what is traced now will run on CPUs: on the devices of the mesh that is set, or else JAX's own.

    A program compiled here for a pod that is elsewhere is not for the CPU: `with jax.set_mesh(mesh)` says so.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (jax.default_backend() if device is None else device.device_kind) == "cpu"


def whole(fn: F) -> F:
    """`fn`, a pure function of arrays, whose results are each one array in memory for whoever reads them.

    On other backends than the CPU's it is `fn` itself: what pays there has not been measured.

    Example:
      >>> import jax.numpy as jnp
      >>> whole(jnp.add)(jnp.ones(2), jnp.ones(2))
      Array([2., 2.], dtype=float32)
    """
    call = jax.jit(fn)

    @wraps(fn)
    def kept(*args):
        if not for_cpu():
            return fn(*args)
        with set_xla_metadata(inlineable="false"):
            return call(*args)

    return kept  # pyright: ignore[reportReturnType]
