"""Sparse task arithmetic: which entries of several tensors count, and how they add up.

TIES: Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models", arXiv:2306.01708. DARE: Yu et al.
2023, "Language Models are Super Mario", arXiv:2311.03099. All act on matrices (*batch, rows, columns), each by itself,
as PEFT has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

MajoritySign = Literal["total", "frequency"]


def largest(x: Array, density: float) -> Array:
    """`x` with all but the `int(density * size)` entries of largest magnitude of each matrix set to zero.

    Example:
      >>> largest(jnp.array([[1.0, -3.0], [2.0, 0.5]]), 0.5).tolist()
      [[0.0, -3.0], [2.0, 0.0]]
    """
    flat = x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
    order = jnp.argsort(-jnp.abs(flat), axis=-1, stable=True)
    kept = jnp.argsort(order, axis=-1) < int(density * flat.shape[-1])
    return jnp.where(kept, flat, 0).reshape(x.shape)


def random(key: Array, x: Array, density: float) -> Array:
    """DARE: each entry kept with probability `density`, and divided by it, so that the expectation is `x`."""
    if density == 1:
        return x
    kept = jax.random.bernoulli(key, density, x.shape)
    return jnp.where(kept, x / density, 0)


def weighted_sum(tensors: Sequence[Array], weights: Sequence[Array]) -> Array:
    """Σ w_i x_i, with weights (*batch,)."""
    return sum((_in_front(w) * x for w, x in zip(weights, tensors, strict=True)), start=jnp.zeros_like(tensors[0]))


def elected_mean(tensors: Sequence[Array], weights: Sequence[Array], sign: MajoritySign = "total") -> Array:
    """TIES: an entry's sign is elected, and of those that have it the weighted values are averaged.

    Args:
      tensors: the sparse tensors x_i; a zero has no vote and no share.
      weights: w_i (*batch,); they take no part in the election.
      sign: the vote is the sum of the values (`total`) or of their signs (`frequency`); equal votes elect plus.
    """
    votes = tensors if sign == "total" else [jnp.sign(x) for x in tensors]
    elected = jnp.where(sum(votes[1:], start=votes[0]) >= 0, 1.0, -1.0).astype(tensors[0].dtype)
    agrees = [jnp.sign(x) == elected for x in tensors]
    total = weighted_sum([jnp.where(agree, x, 0) for agree, x in zip(agrees, tensors, strict=True)], weights)
    share = sum((agree.astype(total.dtype) for agree in agrees), start=jnp.zeros_like(total))
    return total / jnp.maximum(share, 1)


def _in_front(weight: Array) -> Array:
    return weight[..., None, None]
