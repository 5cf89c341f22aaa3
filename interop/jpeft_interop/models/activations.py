"""Activations by the names that configs give them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jpeft_interop.models.errors import ModelError

Activation = Callable[[Array], Array]


def _quick_gelu(x: Array) -> Array:
    return x * jax.nn.sigmoid(1.702 * x)


_gelu = partial(jax.nn.gelu, approximate=False)
_gelu_tanh = partial(jax.nn.gelu, approximate=True)

ACTIVATIONS: dict[str, Activation] = {
    "gelu": _gelu,
    "gelu_python": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def gated(name: str, gate: Array, up: Array) -> Array:
    """act(gate) · up. The backward pass keeps these two alone, and works out the rest again.

    Raises:
      ModelError: a name not in `ACTIVATIONS`.
    """
    return jax.checkpoint(lambda gate, up: activation(name)(gate) * up)(gate, up)


def activation(name: str) -> Activation:
    """The function that transformers calls `name`; the backward pass keeps what it is given, and works it out again.

    Raises:
      ModelError: a name not in `ACTIVATIONS`.
    """
    if name not in ACTIVATIONS:
        raise ModelError(f"activation {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return jax.checkpoint(ACTIVATIONS[name])
