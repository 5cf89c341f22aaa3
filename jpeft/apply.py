"""The definition: an adapted model is the model with other params. Pure, dense, in fp32; `lift` is its fast twin."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from jpeft.adapter import Adapter, Site
from jpeft.errors import KernelError, MergeError, SpecError
from jpeft.kernel import from_matrix, to_matrix, wide
from jpeft.method import Leaves
from jpeft.methods import METHODS
from jpeft.tree import beside, flatten, is_floating, is_weight, nearest, replace

Adapters = Adapter | Sequence[Adapter] | Mapping[str, Adapter]
Weights = ArrayLike | Sequence[Any] | Mapping[str, Any] | None
Weighted = tuple[Adapter, Any]


def apply(params: Any, adapter: Adapters, weights: Weights = None) -> Any:
    """`params` with the adapter's change in them: the same tree, shapes and dtypes.

    Computed in fp32 and rounded to each param's dtype. Several adapters each act on the base: what adds, adds up.
    Applying twice is arithmetic: `W + 2 ΔW`.

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
        for bias, change in _bias_changes(path, flat, group):
            new[bias] = (wide(new.get(bias, flat[bias])) + change).astype(flat[bias].dtype)
    return replace(params, new)


def merge(params: Any, adapter: Adapters, weights: Weights = None) -> Any:
    """`apply`, once and for good: outside jit, each result checked to be finite before anything is returned.

    There is no unmerge: keep the base.

    Raises:
      MergeError: a merged weight is not finite; or called under jit.
    """
    base, merged = flatten(params), apply(params, adapter, weights)
    for path, leaf in flatten(merged).items():
        if leaf is base[path]:
            continue
        if isinstance(leaf, Tracer):
            raise MergeError("merge checks values, so it can't run under jit; inside jit use jpeft.apply")
        if not np.all(jnp.isfinite(leaf)):
            raise MergeError(f"{path!r} holds values that are not finite after merging; nothing was returned")
    return merged


def weighted_adapters(adapters: Adapters, weights: Weights = None) -> list[Weighted]:
    """One or several adapters, as pairs with their weights."""
    if isinstance(adapters, Mapping):
        names = list(adapters)
        if isinstance(weights, Mapping) and set(weights) != set(names):
            raise SpecError(f"weights are for {sorted(weights)}; the adapters are {sorted(names)}")
        weights = [weights[name] for name in names] if isinstance(weights, Mapping) else weights
        adapters = [adapters[name] for name in names]
    if isinstance(weights, Mapping):
        raise SpecError(f"weights are by name ({sorted(weights)}), the adapters are not; give {{name: adapter}}")
    group = [adapters] if isinstance(adapters, Adapter) else adapters
    if not isinstance(group, (list, tuple)) or not all(isinstance(one, Adapter) for one in group):
        raise TypeError(
            f"expected an adapter, made by jpeft.init(key, spec, params) or jpeft.load(path); found {_kind(group)}"
        )
    amounts: Any = [None] * len(group) if weights is None else weights
    several = isinstance(amounts, (list, tuple)) or getattr(amounts, "ndim", 0) > 0
    amounts = list(amounts) if several else [amounts]
    if len(amounts) != len(group):
        raise SpecError(f"{len(amounts)} weights for {len(group)} adapters")
    return list(zip(group, amounts, strict=True))


def _kind(found: Any) -> str:
    if isinstance(found, (list, tuple)):
        return f"a {type(found).__name__} of {', '.join(sorted({type(one).__name__ for one in found})) or 'nothing'}"
    return type(found).__name__


def check_fit(flat: Mapping[str, Any], pairs: Sequence[Weighted]) -> None:
    """Every site of every adapter has its weight here, in its shape, not yet adapted."""
    for adapter, _ in pairs:
        for site in adapter.sites:
            if site.path not in flat:
                raise KernelError(
                    f"the adapter has {site.path!r}, the params don't; nearest: {nearest(site.path, flat)}"
                )
            leaf = flat[site.path]
            if is_weight(leaf):
                raise KernelError(
                    f"{site.path!r} has an adapter attached; attach all at once: jpeft.attach(params, [a, b])"
                )
            if tuple(leaf.shape) != site.kernel.shape:
                raise KernelError(
                    f"{site.path!r}: the adapter is for shape {site.kernel.shape}, the params have {tuple(leaf.shape)}"
                )
            if not is_floating(leaf):
                raise KernelError(f"{site.path!r} holds {leaf.dtype}; expected a floating dtype: dequantize it first")


class Effect(NamedTuple):
    """What one adapter does at one weight: its leaves as matrices with the adapter's weight folded in."""

    site: Site
    leaves: Leaves
    dropout: float


def effects_by_path(pairs: Sequence[Weighted]) -> dict[str, list[Effect]]:
    """What each weight undergoes.

    Raises:
      SpecError: a weight on something that can't be scaled, or two adapters that replace the same leaf.
      KernelError: two adapters that take the same weight's axes differently.
    """
    effects: dict[str, list[Effect]] = {}
    for adapter, weight in pairs:
        for site in adapter.sites:
            effect = Effect(site, _leaves(adapter, site, weight), adapter.spec.dropout)
            effects.setdefault(site.path, []).append(effect)
    for path, group in effects.items():
        if len(group) > 1 and any(METHODS[site.method].delta is None for site, *_ in group):
            raise SpecError(f"{path!r} is replaced whole by one of {len(group)} adapters: they can't act together")
        axes = {(site.kernel.contracted, site.kernel.output, site.kernel.batch) for site, *_ in group}
        if len(axes) > 1:
            raise KernelError(
                f"{path!r}: the adapters take its axes differently, (contracted, output, batch): {sorted(axes)}; make "
                "both with the same kernels="
            )
    return effects


def _leaves(adapter: Adapter, site: Site, weight: Any) -> Leaves:
    method = METHODS[site.method]
    leaves = method.matrices(adapter.leaves(site.path), site.kernel)
    if weight is None:
        return leaves
    if method.weighted is None:
        raise SpecError(f"{site.path!r}: the effect of {site.method!r} can't be scaled; leave weights= out")
    return method.weighted(leaves, jnp.asarray(weight, jnp.float32))


def adapted(weight: Array, effects: Sequence[Effect]) -> Array:
    """One weight with its effects: fp32 maths, the weight's own dtype and axes."""
    kernel = effects[0][0].kernel
    matrix = adapted_matrix(wide(to_matrix(weight, kernel)), effects)
    return from_matrix(matrix, kernel).astype(weight.dtype)


def adapted_matrix(w: Array, effects: Sequence[Effect]) -> Array:
    """W' of matrices (*batch, in, out), in the dtype of `w`: what adds is taken of the base and added up."""
    for site, leaves, _ in effects:
        w = METHODS[site.method].transform(w, {name: leaf.astype(w.dtype) for name, leaf in leaves.items()})
    return w


def _check_all_uses(effects: Mapping[str, Sequence[Effect]]) -> None:
    for site, *_ in (effect for group in effects.values() for effect in group):
        if site.use is not None:
            raise MergeError(
                f"{site.path!r} is read both as a lookup and as the output head, and the adapter acts on the "
                f"{site.use} alone: no single weight does that. Run it with jpeft.lift and jpeft.attach"
            )


def _bias_changes(path: str, flat: Mapping[str, Any], effects: Sequence[Effect]) -> list[tuple[str, Array]]:
    changes = []
    for site, leaves, _ in effects:
        change = METHODS[site.method].bias({name: wide(leaf) for name, leaf in leaves.items()})
        if change is None:
            continue
        bias = beside(path, "bias")
        if bias not in flat:
            raise KernelError(
                f"the adapter changes the bias of {path!r}, and there is no {bias!r} to hold it; run it with jpeft.lift"
            )
        changes.append((bias, _bias_in_place(change, site, flat[bias].shape)))
    return changes


def _bias_in_place(change: Array, site: Site, shape: tuple[int, ...]) -> Array:
    """(*batch, out) as the bias has it: batch axes where the kernel has them (so Flax's scan stacks both)."""
    kernel = site.kernel
    own = tuple(size for axis, size in enumerate(shape) if axis not in kernel.batch)
    if math.prod(own) != kernel.fan_out or len(own) + len(kernel.batch) != len(shape):
        raise KernelError(
            f"the bias beside {site.path!r} has shape {shape}; expected axes for the kernel's output "
            f"{kernel.sizes(kernel.output)} and batch {kernel.batch_shape}; run it with jpeft.lift"
        )
    return jnp.moveaxis(change.reshape(*kernel.batch_shape, *own), range(len(kernel.batch)), kernel.batch)
