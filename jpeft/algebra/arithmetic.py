"""Adapters scaled, subtracted and interpolated: exact in ΔW."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike

from jpeft.adapter import Adapter
from jpeft.algebra.combine import combine
from jpeft.errors import SpecError
from jpeft.methods import METHODS
from jpeft.targets import frozen_mapping


def scale(adapter: Adapter, weight: ArrayLike) -> Adapter:
    """The adapter with `weight` times its ΔW: the scaling changes, the factors don't.

    Args:
      adapter: of a method that adds (LoRA, AdaLoRA), with nothing trained whole.
      weight: a number, which the spec's alpha takes part in; or an array, traced ones too, of which the spec says
        nothing: the scaling is what acts, in files as well.

    Raises:
      SpecError: the effect of something in it can't be scaled.

    Example:
      >>> import jax, jpeft
      >>> adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=2, alpha=4), {"kernel": jnp.ones((3, 2))})
      >>> scale(adapter, 0.5).spec.alpha
      2.0
    """
    constant = dict(adapter.constant)
    for site in adapter.sites:
        weighted = METHODS[site.method].weighted
        if weighted is None:
            raise SpecError(f"{site.path!r}: the effect of {site.method!r} can't be scaled; only what adds can")
        new = weighted(adapter.leaves(site.path), jnp.asarray(weight, jnp.float32))
        constant[site.path] = {name: new[name] for name in constant[site.path]}
    spec = _scaled_spec(adapter.spec, weight) if isinstance(weight, (int, float)) else adapter.spec
    return adapter.replace(constant=constant, meta=replace(adapter.meta, spec=spec))


def _scaled_spec(spec: Any, weight: float) -> Any:
    alpha = weight * (spec.rank if spec.alpha is None else spec.alpha)
    patterns = tuple((name, weight * value) for name, value in frozen_mapping(getattr(spec, "alpha_pattern", ())))
    return replace(spec, alpha=alpha, **({"alpha_pattern": patterns} if patterns else {}))


def subtract(adapter: Adapter, other: Adapter) -> Adapter:
    """The LoRA with `ΔW - ΔW'`: exact; its rank is the sum of theirs (`shrink` makes it smaller).

    Raises:
      SpecError: one is no LoRA, or has leaves trained whole.
      KernelError: a weight that they see differently.

    Example:
      >>> import jax, jpeft
      >>> adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=2), {"kernel": jnp.ones((3, 2))})
      >>> subtract(adapter, adapter).spec.rank
      4
    """
    return combine([adapter, other], [1.0, -1.0], "cat")


def interpolate(adapter: Adapter, other: Adapter, t: ArrayLike) -> Adapter:
    """The LoRA with `(1 - t) ΔW + t ΔW'`: exact; its rank is the sum of theirs.

    Where only one of them acts, the other counts as no change. Differentiable in `t`.

    Raises:
      SpecError: one is no LoRA, or has leaves trained whole.
      KernelError: a weight that they see differently.

    Example:
      >>> import jax, jpeft
      >>> spec, params = jpeft.LoRA(rank=2), {"kernel": jnp.ones((3, 2))}
      >>> one, two = (jpeft.init(jax.random.key(i), spec, params) for i in range(2))
      >>> interpolate(one, two, 0.25).trained["kernel"]["a"].shape
      (3, 4)
    """
    return combine([adapter, other], [1 - jnp.asarray(t, jnp.float32), t], "cat")
