"""The definition: an adapted model is the model with other params. Pure, dense, in fp32; `lift` is its fast twin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from jpeft.biases import added, scaled
from jpeft.effects import Adapters, Effect, Weights, acting, check_fit, effects_by_path, weighted_adapters
from jpeft.errors import MergeError
from jpeft.kernel import from_matrix, to_matrix, wide
from jpeft.together import adapted_matrix
from jpeft.tree import flatten, replace


def apply(params: Any, adapter: Adapters, weights: Weights = None) -> Any:
    """`params` with the adapter's change in them: the same tree, shapes and dtypes.

    Computed in fp32 and rounded to each param's dtype. Several adapters each act on the base and their changes add up;
    scalings (IA³) multiply what came of that. Applying twice is arithmetic: `W + 2 ΔW` of a LoRA.

    Args:
      params: the base; a Linen dict, an `nnx.State`, or any nested mapping or sequence.
      adapter: one, a sequence, or a mapping of names to adapters.
      weights: how much of each; as many, or under the same names. Arrays or numbers; 1 if None.

    Raises:
      TypeError: a spec where an adapter belongs.
      KernelError: the adapter was made for other params.
      SpecError: a weight on something that can't be scaled, or two adapters that replace the same leaf.

    Example:
      >>> import jax, jpeft
      >>> params = {"dense": {"kernel": jnp.ones((3, 2))}}
      >>> adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=1), params)
      >>> bool((apply(params, adapter)["dense"]["kernel"] == 1).all())
      True
    """
    pairs = weighted_adapters(adapter, weights)
    flat = flatten(params)
    check_fit(flat, pairs)
    effects = effects_by_path(pairs)
    _check_all_uses(effects)
    new: dict[str, Any] = {path: adapted(flat[path], group) for path, group in effects.items()}
    for path, group in effects.items():  # after all else: a bias may be replaced and added to
        new |= added(path, flat | new, group)
        new |= scaled(path, flat | new, group)
    return replace(params, new)


def merge(params: Any, adapter: Adapters, weights: Weights = None) -> Any:
    """`apply`, once and for good: outside jit, each result checked to be finite before anything is returned.

    Each merged weight lives where the base's does, on whatever mesh. There is no unmerge: keep the base.

    Raises:
      MergeError: a merged weight is not finite; or called under jit.
    """
    base, merged = flatten(params), apply(params, adapter, weights)
    at_home: dict[str, Array] = {}
    for path, leaf in flatten(merged).items():
        if leaf is base[path]:
            continue
        if isinstance(leaf, Tracer):
            raise MergeError("merge checks values, so it can't run under jit; inside jit use jpeft.apply")
        if not jnp.isfinite(leaf).all():
            raise MergeError(f"{path!r} holds values that are not finite after merging; nothing was returned")
        at_home[path] = jax.device_put(leaf, base[path].sharding) if isinstance(base[path], Array) else leaf
    return replace(merged, at_home)


def adapted(weight: Array, effects: Sequence[Effect]) -> Array:
    """One weight with its effects: fp32 maths, the weight's own dtype and axes."""
    kernel = effects[0].site.kernel
    matrix = adapted_matrix(wide(to_matrix(weight, kernel)), acting(effects))
    return from_matrix(matrix, kernel).astype(weight.dtype)


def _check_all_uses(effects: Mapping[str, Sequence[Effect]]) -> None:
    for site, *_ in (effect for group in effects.values() for effect in group):
        if site.use is not None:
            raise MergeError(
                f"{site.path!r} is read both as a lookup and as the output head, and the adapter acts on the "
                f"{site.use} alone: no single weight does that. Run it with jpeft.lift and jpeft.attach"
            )
