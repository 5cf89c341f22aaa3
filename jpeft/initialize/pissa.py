"""PiSSA: the adapter starts as the principal part of the weight, and the base keeps the rest.

    W = U S Vᵀ,    A = U_r (S_r / s)^½,    B = (S_r / s)^½ V_rᵀ,    W_res = W - s A B

Meng, Wang, Zhang 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
arXiv:2404.02948; the division by the scaling s = alpha / r is PEFT's.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from jpeft.adapter import Adapter
from jpeft.errors import SpecError
from jpeft.initialize.factors import Factors, Initialized, Target, check_rank, site_key, start, targets
from jpeft.initialize.svd import SVD, randomized_svd, svd


def pissa(adapter: Adapter, params: Any, *, niter: int | None = None, key: Array | None = None) -> Initialized:
    """The adapter on the `r` largest singular directions of each weight, and the base without them.

    Args:
      adapter: a new LoRA, from `jpeft.init`.
      params: the base it was made for.
      niter: power iterations of a randomised SVD (PEFT's `pissa_niter_4`), faster for large weights; exact if None.
      key: a JAX PRNG key, for `niter`: the same key gives the same adapter.

    Raises:
      SpecError: not a new LoRA with positive alpha, or `niter` and `key` do not go together.
      KernelError: an embedding or a convolution, other params, or a rank above the weight's.

    Example:
      >>> import jax, jpeft
      >>> params = {"kernel": jnp.array([[3.0, 0.0], [0.0, 1.0]])}
      >>> adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=1), params)
      >>> pissa(adapter, params).params["kernel"]
      Array([[0., 0.],
             [0., 1.]], dtype=float32)
    """
    if (niter is None) != (key is None):
        raise SpecError("niter= and key= go together: pissa(adapter, params, niter=4, key=key), or neither")
    return start(adapter, params, {t.site.path: _factors(t, niter, key) for t in targets(adapter, params)})


def _factors(target: Target, niter: int | None, key: Array | None) -> Factors:
    site = target.site
    check_rank(site, min(site.kernel.fan_in, site.kernel.fan_out))
    if niter is None or key is None:
        return split(svd(target.w).first(site.rank), target.s)
    return split(randomized_svd(site_key(key, site), target.w, site.rank, niter), target.s)


def split(m: SVD, s: Array) -> Factors:
    """A and B with `s A B = U S Vᵀ`, the singular values shared evenly between them."""
    root = jnp.sqrt(m.s / s[..., 0])
    return Factors(m.u * root[..., None, :], root[..., :, None] * m.vh)
