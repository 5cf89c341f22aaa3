"""What a method adds to the loss."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jpeft.adapter import Adapter
from jpeft.methods import METHODS


def penalty(adapter: Adapter) -> Array:
    """What to add to the loss for the method's sake, a scalar: AdaLoRA's orthogonality, and 0 for most.

    Already times the spec's weight for it.

    Example:
      >>> import jax, jpeft
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> float(penalty(jpeft.init(jax.random.key(0), jpeft.LoRA(rank=1), params)))
      0.0
    """
    method = METHODS[adapter.spec.method]
    if method.penalty is None:
        return jnp.zeros(())
    sites = [site for site in adapter.sites if site.method == adapter.spec.method]
    group = [method.matrices(adapter.leaves(site.path), site.kernel) for site in sites]
    return adapter.spec.penalty_weight * method.penalty(group)
