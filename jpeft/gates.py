"""Gates: how much of each adapter each row of the batch gets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from jpeft.effects import Effect, Weighted, effects_by_path
from jpeft.errors import LiftError, SpecError
from jpeft.kernel import Kernel
from jpeft.methods.routed import stacked
from jpeft.site import Site
from jpeft.tree import nearest

Gates = Array | Mapping[str, Array]
BASE = "__base__"  # PEFT's word for a row without an adapter
ROUTABLE = ("lora", "adalora")


def as_gates(gates: Any, adapters: int) -> Gates:
    """Gates as floats with an axis for the adapters: an integer a row becomes a one there, and -1 nothing at all.

    Raises:
      SpecError: there are gates for another number of adapters, or (outside jit) a number that no adapter has.
    """
    if isinstance(gates, Mapping):
        return {path: as_gates(one, adapters) for path, one in gates.items()}  # pyright: ignore[reportReturnType]
    gates = jnp.asarray(gates)
    if jnp.issubdtype(gates.dtype, jnp.integer):
        _check_numbers(gates, adapters)
        return jax.nn.one_hot(gates, adapters)
    if gates.ndim < 2 or gates.shape[-1] != adapters:
        raise SpecError(
            f"gates of shape {gates.shape} for {adapters} adapters: expected (rows, ..., {adapters}), or integers "
            "(rows, ...), the number of the adapter each row gets, -1 for none"
        )
    return gates


def _check_numbers(numbers: Array, adapters: int) -> None:
    if isinstance(numbers, Tracer):
        return
    known = np.asarray(numbers)  # jnp would trace the comparison where a program is being traced
    if ((known < -1) | (known >= adapters)).any():
        raise SpecError(f"gates are numbers of {adapters} adapters, from 0, or -1 for none; found {known.tolist()}")


def rows(names: Sequence[str], adapters: Iterable[str]) -> Array:
    """The numbers that `attach(..., gates=)` takes, from the name of each row's adapter.

    Args:
      names: one a row; `__base__` for none.
      adapters: the names of the adapters, in the order they are attached in; a dict of them will do.

    Raises:
      SpecError: an unknown name.

    Example:
      >>> rows(["de", "__base__", "en"], {"en": ..., "de": ...})
      Array([ 1, -1,  0], dtype=int32)
    """
    numbers = {BASE: -1} | {name: number for number, name in enumerate(adapters)}
    for name in names:
        if name not in numbers:
            raise SpecError(f"no adapter is named {name!r}; the nearest are {nearest(name, numbers)}")
    return jnp.array([numbers[name] for name in names], jnp.int32)


def routed_effects(pairs: Sequence[Weighted], gates: Gates) -> dict[str, list[tuple[Effect, Array]]]:
    """What each weight undergoes when adapters are routed: effects of the method `routed`, and their gates.

    Adapters are joined in one product where they have the same dropout, and act on the same uses of a tied weight.

    Raises:
      SpecError: an adapter that is not low-rank, or that replaces leaves.
    """
    by_path: dict[str, dict[int, Effect]] = {}
    for k, pair in enumerate(pairs):
        for path, (effect,) in effects_by_path([pair]).items():
            if effect.site.method not in ROUTABLE:
                raise SpecError(
                    f"{path!r}: gates are for low-rank adapters, {' or '.join(ROUTABLE)}; adapter {k} is a "
                    f"{effect.site.method!r} there, which can't differ from row to row"
                )
            by_path.setdefault(path, {})[k] = effect
    effects_by_path(pairs)  # all take the same axes
    return {path: list(_joined(path, group, len(pairs), gates)) for path, group in by_path.items()}


def _joined(path: str, group: Mapping[int, Effect], adapters: int, gates: Gates) -> Iterator[tuple[Effect, Array]]:
    kind = lambda k: (group[k].site.method, group[k].site.use or "", group[k].dropout)
    for (method, use, dropout), numbers in groupby(sorted(group, key=kind), kind):
        members = set(numbers)
        kernel = group[min(members)].site.kernel
        leaves = stacked(method, [group[k].leaves if k in members else None for k in range(adapters)])
        site = Site(path, "routed", kernel, leaves["a"].shape[-1], use=use or None)
        yield Effect(site, leaves, dropout), _of_path(gates, path, kernel)


def _of_path(gates: Gates, path: str, kernel: Kernel) -> Array:
    """(*batch, *rows, K): given for this weight, or the same for all."""
    if not isinstance(gates, Mapping):
        return jnp.broadcast_to(gates, (*kernel.batch_shape, *gates.shape))
    if path not in gates:
        raise SpecError(f"no gates for {path!r}, which is adapted; there are some for {nearest(path, gates)}")
    found, lead = gates[path], len(kernel.batch_shape)
    if found.shape[:lead] != kernel.batch_shape:
        raise SpecError(
            f"gates for {path!r} have shape {found.shape}; expected the kernel's batch axes first, {kernel.batch_shape}"
        )
    return found


def aligned(gates: Array, lead: int, rows: tuple[int, ...], path: str) -> Array:
    """Gates (*batch, *rows, K) for a product whose rows have another shape: more axes behind, or all in one.

    Args:
      gates: the first `lead` axes are the kernel's batch axes.
      lead: how many these are.
      rows: the shape of the product's rows.
      path: of the weight, for the error.

    Returns:
      (*batch, *rows, K).

    Raises:
      LiftError: the product's rows are others than the gates are for.
    """
    batch, own, k = gates.shape[:lead], gates.shape[lead:-1], gates.shape[-1]
    if rows[: len(own)] == own:
        more = (1,) * (len(rows) - len(own))
        return jnp.broadcast_to(gates.reshape(*batch, *own, *more, k), (*batch, *rows, k))
    if len(own) > 1 and len(rows) == 1 and rows[0] == math.prod(own):
        return gates.reshape(*batch, *rows, k)
    raise LiftError(
        f"{path!r} meets rows of shape {rows}, and the gates are for {own}: the first axes of the activations have to "
        "be the ones that the gates have"
    )
