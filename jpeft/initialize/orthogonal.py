"""Orthogonal initialisation: both factors start non-zero, in orthogonal subspaces of the rank, so that `A B = 0`.

    Q (r, r) orthogonal,    A = X Q_odd / 10,    B = Q_evenᵀ Y / 10,    X (in, r/2), Y (r/2, out) ~ N(0, 1)

From D. Datta, "Rethinking LoRA initialisation", datta0.github.io/posts/rethink-lora-init, as PEFT has it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jpeft.adapter import Adapter, Site
from jpeft.errors import SpecError
from jpeft.initialize.factors import Factors, site_key, sites, with_factors


def orthogonal(key: Array, adapter: Adapter) -> Adapter:
    """The adapter with random factors whose product is zero (to rounding): the base stays as it is.

    Args:
      key: a JAX PRNG key.
      adapter: a new LoRA of even ranks, from `jpeft.init`.

    Raises:
      SpecError: not a new LoRA, or an odd rank.
      KernelError: an embedding or a convolution.

    Example:
      >>> import jpeft
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> adapter = orthogonal(key := jax.random.key(0), jpeft.init(key, jpeft.LoRA(rank=2), params))
      >>> leaves = adapter.trained["kernel"]
      >>> bool(jnp.abs(leaves["b"]).min() > 0), bool(jnp.abs(leaves["a"] @ leaves["b"]).max() < 1e-7)
      (True, True)
    """
    return with_factors(adapter, {site.path: _factors(site_key(key, site), site) for site in sites(adapter)})


def _factors(key: Array, site: Site) -> Factors:
    kernel, rank = site.kernel, site.rank
    if rank % 2:
        raise SpecError(f"{site.path!r}: an orthogonal start needs an even rank; found {rank}")
    of_q, of_x, of_y = jax.random.split(key, 3)
    q, _ = jnp.linalg.qr(jax.random.normal(of_q, (*kernel.batch_shape, rank, rank)))
    x = jax.random.normal(of_x, (*kernel.batch_shape, kernel.fan_in, rank // 2))
    y = jax.random.normal(of_y, (*kernel.batch_shape, rank // 2, kernel.fan_out))
    dot = lambda one, other: jnp.matmul(one, other, precision="highest")
    return Factors(dot(x, q[..., 0::2, :]) / 10, dot(q[..., 1::2, :].mT, y) / 10)
