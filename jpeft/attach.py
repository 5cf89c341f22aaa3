"""Adapters put into the params without being folded in: what a lifted function takes."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jpeft.biases import scaled
from jpeft.effects import Adapters, Effect, Weights, check_fit, effects_by_path, weighted_adapters
from jpeft.gates import as_gates, routed_effects
from jpeft.kernel import Kernel
from jpeft.rewrite.weight import Branch, Weight
from jpeft.tree import flatten, replace
from jpeft.view import View


def attach(
    params: Any,
    adapter: Adapters,
    weights: Weights = None,
    *,
    gates: Any = None,
    dropout_key: Array | None = None,
) -> Any:
    """`params` with adapters at their weights, for a lifted function; the same kind of tree.

    Args:
      params: the base, not yet adapted.
      adapter: one, a sequence, or a mapping of names to adapters, as for `apply`.
      weights: how much of each.
      gates: how much of each, row by row: floats (*rows, K) for K low-rank adapters, `rows` the first axes of the
        activations, (batch,) or (batch, tokens); or integers (*rows,), the number of each row's adapter, -1 for none of
        them; or one of these for each path. A mixture of adapters in one product, under one jit.
      dropout_key: turns on the specs' dropout; a new key each step. Without it the branch sees all of its input.

    Raises:
      TypeError: a spec where an adapter belongs.
      KernelError: the adapter was made for other params, or these have one attached already.
      SpecError: gates that don't fit the adapters, or an adapter that can't be gated: one that is not low-rank.

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
    if gates is None:
        effects = {path: [(e, None) for e in group] for path, group in effects_by_path(pairs).items()}
    else:
        effects = routed_effects(pairs, as_gates(gates, len(pairs)))
    new: dict[str, Any] = {}
    for path, group in effects.items():
        new[path] = _attached(path, flat[path], group, dropout_key)
    for path, group in effects.items():  # after all else: a bias may be replaced and scaled
        new |= scaled(path, flat | new, [effect for effect, _ in group])
    return replace(params, new)


def _attached(path: str, leaf: Any, group: Sequence[tuple[Effect, Array | None]], key: Array | None) -> Any:
    first, kernel = group[0][0], group[0][0].site.kernel
    if first.site.method == "replacement":
        return first.leaves["value"].reshape(leaf.shape).astype(leaf.dtype)
    branches = tuple(_branch(effect, gates, i, key, path) for i, (effect, gates) in enumerate(group))
    return Weight(leaf, branches, path, kernel, View.whole(kernel.shape), kernel.batch)


def _branch(effect: Effect, gates: Array | None, number: int, key: Array | None, path: str) -> Branch:
    site, leaves, rate = effect
    if rate == 0 or key is None or site.kernel.kind == "embedding":
        return Branch(leaves, None, gates, site.method, 0.0, site.use)
    key = jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(path.encode())), number)
    return Branch(leaves, _split(key, site.kernel), gates, site.method, rate, site.use)


def _split(key: Array, kernel: Kernel) -> Array:
    """(*batch,) keys: each stacked layer drops its own."""
    return jax.random.split(key, kernel.batch_shape) if kernel.batch else key
