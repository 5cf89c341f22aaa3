"""What shapes the params of a config's model have, in a third of the time that `nnx.eval_shape` of `build` takes.

NNX draws a key for every weight by counting in a variable, and each change of a variable costs the more, the longer the
traced function is by then. Here every weight has the same key: nobody reads the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
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


def abstract_params(config: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """The params of the model that `config` describes, by path."""
    return flatten(pure(nnx.eval_shape(lambda: build(config, rngs=_OneKey(0))))[1])
