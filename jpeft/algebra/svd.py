"""The best approximation of a change by one of lower rank: the truncated SVD (Eckart and Young 1936).

Where ΔW = A B is thin already, it is never formed: with A = Q_a R_a and Bᵀ = Q_b R_b, the SVD of the small R_a R_bᵀ
gives that of A B = Q_a (R_a R_bᵀ) Q_bᵀ.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array

from jpeft.errors import SpecError
from jpeft.initialize.decompose import qr
from jpeft.initialize.svd import SVD, svd

__all__ = ["SVD", "factors", "lost", "rank_for", "svd", "thin_svd"]


def thin_svd(a: Array, b: Array) -> SVD:
    """The SVD of `A B` for A (*batch, in, r) and B (*batch, r, out): min(in, r, out) directions."""
    if a.shape[-1] == 0:  # argmax and the like refuse what is empty
        return SVD(a, a[..., 0, :], b)
    dot = lambda x, y: jnp.matmul(x, y, precision="highest")
    q_a, r_a = qr(a)
    q_b, r_b = qr(b.mT)
    u, s, vh = svd(dot(r_a, r_b.mT))
    return SVD(dot(q_a, u), s, dot(vh, q_b.mT))


def factors(found: SVD, rank: int) -> tuple[Array, Array]:
    """A = U (*batch, in, r) and B = S Vh (*batch, r, out) of the leading directions, as PEFT shares S out."""
    first = found.first(rank)
    return first.u, first.s[..., None] * first.vh


def lost(s: Array, rank: int) -> Array:
    """‖ΔW - ΔW_r‖_F / ‖ΔW‖_F (*batch,), from the singular values; 0 where ΔW is 0."""
    total = jnp.sum(s * s, -1)
    rest = jnp.sum(s[..., rank:] ** 2, -1)
    return jnp.sqrt(rest / jnp.where(total > 0, total, 1))


def rank_for(s: Array, energy: float) -> int:
    """The fewest directions that hold this share of Σ σ², as PEFT counts; of a stack, enough for every matrix.

    Not under jit: a rank is a shape. A change of zero needs no direction (PEFT gives it one).
    """
    if not 0 < energy <= 1:
        raise SpecError(f"energy is a share of the squared singular values, in (0, 1]; found {energy}")
    if s.size == 0:
        return 0
    cumulative = np.cumsum(np.asarray(s, np.float32) ** 2, -1).reshape(-1, s.shape[-1])
    needed = [int(np.searchsorted(one, np.float32(energy) * one[-1])) + 1 for one in cumulative if one[-1] > 0]
    return min(max(needed, default=0), s.shape[-1])
