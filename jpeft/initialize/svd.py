"""The leading singular vectors of matrices: exact, or by a randomised search that never forms the others.

Halko, Martinsson, Tropp 2011, "Finding structure with randomness", algorithms 4.4 and 5.1, arXiv:0909.4061.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jpeft.initialize import decompose

OVERSAMPLING = 8


class SVD(NamedTuple):
    """`M = U diag(S) Vh` with `u` (*batch, m, k), `s` (*batch, k) descending, `vh` (*batch, k, n)."""

    u: Array
    s: Array
    vh: Array

    def first(self, k: int) -> SVD:
        """The leading `k` directions."""
        return SVD(self.u[..., :k], self.s[..., :k], self.vh[..., :k, :])

    def last(self, k: int) -> SVD:
        """The `k` directions with the least singular values."""
        n = self.s.shape[-1]
        return SVD(self.u[..., n - k :], self.s[..., n - k :], self.vh[..., n - k :, :])


def svd(m: Array) -> SVD:
    """All directions, exactly. The largest entry of each u is positive, so that signs are the same on any machine."""
    u, s, vh = decompose.svd(m)
    largest = jnp.take_along_axis(u, jnp.abs(u).argmax(-2, keepdims=True), -2)
    sign = jnp.where(largest < 0, -1, 1).astype(u.dtype)
    return SVD(u * sign, s, vh * sign.mT)


def randomized_svd(key: Array, m: Array, k: int, niter: int) -> SVD:
    """About the leading `k` directions, from a random sketch sharpened by `niter` power iterations."""
    width = min(k + OVERSAMPLING, *m.shape[-2:])
    dot = lambda x, y: jnp.matmul(x, y, precision="highest")
    basis = lambda x: decompose.qr(x)[0]
    q = basis(dot(m, jax.random.normal(key, (*m.shape[:-2], m.shape[-1], width), m.dtype)))
    for _ in range(niter):
        q = basis(dot(m, basis(dot(m.mT, q))))
    u, s, vh = svd(dot(q.mT, m))
    return SVD(dot(q, u), s, vh).first(k)
