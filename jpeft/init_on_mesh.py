"""New leaves where their base lives on a mesh: each device makes its own part, and none has them whole.

To compile one program for all weights takes a minute for a small model; to compile one for each kind of weight, a
second. Values are those that `init` makes without a mesh, bit for bit, where they don't come from sums over a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
from jax import Array

from jpeft.method import Leaves
from jpeft.methods import METHODS
from jpeft.site import Site
from jpeft.spec import Spec

Homes = Mapping[str, Any]  # a NamedSharding for each leaf


class Maker:
    """Makes leaves on a mesh, for one spec and dtype; weights that are alike share a compiled program."""

    def __init__(self, spec: Spec, dtype: Any) -> None:
        self.spec, self.dtype = spec, dtype
        self._programs: dict[Any, Callable[..., Leaves]] = {}

    def trained(self, key: Array, site: Site, weight: Any, homes: Homes) -> Leaves:
        """The method's `init`, each leaf at its home."""
        # Of the path, a method's init makes a key and a choice of leaves, and no more.
        alike = replace(site, path=""), tuple(sorted(homes.items())), weight.dtype
        program = self._programs.setdefault(alike, self._program(site, weight, homes))
        return program(key, weight if isinstance(weight, Array) else None)

    def _program(self, site: Site, weight: Any, homes: Homes) -> Callable[..., Leaves]:
        shape = jax.ShapeDtypeStruct(weight.shape, weight.dtype)

        def new(key: Array, array: Array | None) -> Leaves:
            return METHODS[site.method].init(key, site, self.spec, shape if array is None else array, self.dtype)

        return jax.jit(new, out_shardings=dict(homes))
