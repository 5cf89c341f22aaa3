"""Adapters put into the params without being folded in: what a lifted function takes."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jpeft.apply import Adapters, Effect, Weights, check_fit, effects_by_path, weighted_adapters
from jpeft.kernel import Kernel
from jpeft.rewrite.weight import Branch, Weight
from jpeft.tree import flatten, replace
from jpeft.view import View


def attach(params: Any, adapter: Adapters, weights: Weights = None, *, dropout_key: Array | None = None) -> Any:
    """`params` with adapters at their weights, for a lifted function; the same kind of tree.

    Args:
      params: the base, not yet adapted.
      adapter: one, a sequence, or a mapping of names to adapters, as for `apply`.
      weights: how much of each.
      dropout_key: turns on the specs' dropout; a new key each step. Without it the branch sees all of its input.

    Raises:
      TypeError: a spec where an adapter belongs.
      KernelError: the adapter was made for other params, or these have one attached already.

    Example:
      >>> import jpeft, jax.numpy as jnp
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=1), params)
      >>> forward = jpeft.lift(lambda params, x: x @ params["kernel"])
      >>> forward(jpeft.attach(params, adapter), jnp.ones((1, 3)))
      Array([[3., 3.]], dtype=float32)
    """
    pairs = weighted_adapters(adapter, weights)
    flat = flatten(params)
    check_fit(flat, pairs)
    if dropout_key is not None and not jnp.issubdtype(dropout_key.dtype, jax.dtypes.prng_key):
        dropout_key = jax.random.wrap_key_data(dropout_key)  # of jax.random.PRNGKey
    new = {}
    for path, effects in effects_by_path(pairs).items():
        if effects[0].site.method == "replacement":
            new[path] = effects[0].leaves["value"].reshape(flat[path].shape).astype(flat[path].dtype)
            continue
        branches = tuple(_branch(effect, i, dropout_key, path) for i, effect in enumerate(effects))
        kernel = effects[0].site.kernel
        new[path] = Weight(flat[path], branches, path, kernel, View.whole(kernel.shape), kernel.batch)
    return replace(params, new)


def _branch(effect: Effect, number: int, key: Array | None, path: str) -> Branch:
    site, leaves, rate = effect
    if rate == 0 or key is None or site.kernel.kind == "embedding":
        return Branch(leaves, None, site.method, 0.0, site.use)
    key = jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(path.encode())), number)
    return Branch(leaves, _split(key, site.kernel), site.method, rate, site.use)


def _split(key: Array, kernel: Kernel) -> Array:
    """(*batch,) keys: each stacked layer drops its own."""
    return jax.random.split(key, kernel.batch_shape) if kernel.batch else key
