"""A model without weights, and the shapes of its params, in a third of the time that `nnx.eval_shape` of `build` takes.

NNX draws a key for every weight by counting in a variable, and each change of a variable costs the more, the longer the
traced function is by then. Here every weight has the same key: nobody reads the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax import Array

from jpeft.tree import flatten
from jpeft_interop.models import build, pure


class _OneKey(nnx.Rngs):
    """One key for every weight: no use but under `nnx.eval_shape`."""

    def params(self) -> Array:
        """The key."""
        return jax.random.key(0)


def abstract_model(make: Callable[..., nnx.Module]) -> nnx.Module:
    """`nnx.eval_shape` of `make(rngs=...)`."""
    return nnx.eval_shape(lambda: make(rngs=_OneKey(0)))


def abstract_params(config: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """The params of the model that `config` describes, by path."""
    return flatten(pure(abstract_model(partial(build, config)))[1])
