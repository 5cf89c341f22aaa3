"""What rematerialisation keeps of an adapted product: the sum `y + s (x A) B`, and not its two terms.

JAX's policies tell products by their primitive. In a lifted program those are the frozen product and the branch's, each
as large as their sum, which is all that the backward pass reads. So the sum has a name, and a policy of its own.
"""

from __future__ import annotations

from typing import Any

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name

NAME = "jpeft.adapted"


def named(y: Array) -> Array:
    """The sum of a frozen product and a branch, as policies know it."""
    return checkpoint_name(y, NAME)


def adapted_saveable(primitive: Any, *inputs: Any, **settings: Any) -> bool:
    """A policy for `jax.checkpoint`: what an adapter has been added to is kept.

    It goes with a policy that keeps products, which would keep the frozen product and the branch instead, in twice the
    memory:

    Example:
      >>> import jax.numpy as jnp, jpeft
      >>> policies = jax.checkpoint_policies
      >>> keep = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, jpeft.adapted_saveable)
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=1), params)
      >>> forward = jax.checkpoint(jpeft.lift(lambda params, x: jnp.tanh(x @ params["kernel"])), policy=keep)
      >>> loss = lambda adapter: forward(jpeft.attach(params, adapter), jnp.ones((2, 4))).sum()
      >>> jax.grad(loss)(adapter).trained["kernel"]["b"].shape
      (1, 3)
    """
    return bool(_by_name(primitive, *inputs, **settings))


_by_name = jax.checkpoint_policies.save_only_these_names(NAME)
