"""LoRA-GA: the adapter starts along the gradient of the weight, so that its first step is nearly full fine-tuning's.

    ∂L/∂W = U S Vᵀ,    A = U_I,    B = c V_Jᵀ,    W_res = W - s A B

with I and J two sets of r of the leading 2r directions and c = d_out^¼ / γ^½ ("stable"). Wang et al. 2024, "LoRA-GA:
Low-Rank Adaptation with Gradient Approximation", arXiv:2407.05000. The paper's W is (out, in). PEFT weighs the rows of
B with their singular values, which the paper does not; that is followed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from jpeft.adapter import Adapter, Site
from jpeft.errors import KernelError, SpecError
from jpeft.initialize.factors import Factors, Initialized, Target, check_rank, site_key, sites, start, targets
from jpeft.initialize.svd import SVD, randomized_svd, svd
from jpeft.kernel import to_matrix, wide
from jpeft.tree import base_leaves, nearest, replace

Direction = Literal["ArB2r", "A2rBr", "ArBr", "random"]
Scale = Literal["stable", "weight_svd", "gd_scale", "unit"]
DIRECTIONS, SCALES = ("ArB2r", "A2rBr", "ArBr", "random"), ("stable", "weight_svd", "gd_scale", "unit")


def lora_ga(
    adapter: Adapter,
    params: Any,
    gradients: Mapping[str, Array],
    *,
    direction: Direction = "ArB2r",
    scale: Scale = "stable",
    stable_gamma: float = 16,
    niter: int | None = None,
    key: Array | None = None,
) -> Initialized:
    """The adapter on the leading directions of each weight's gradient, and the base without `s A B`.

    Args:
      adapter: a new LoRA, from `jpeft.init`.
      params: the base it was made for.
      gradients: of each adapted weight, by path, in the weight's own shape: `weight_gradients(...)`, averaged over
        some batches.
      direction: which of the 2r directions A and B take, counted from 0: `ArB2r` the first r and the second r,
        `A2rBr` the other way round, `ArBr` the odd and the even ones, `random` the same r drawn ones.
      scale: of B: `stable` by `d_out^¼ / γ^½`, `weight_svd` so that its first direction has the weight's largest
        singular value, `unit` as it is; `gd_scale` divides both factors by s.
      stable_gamma: γ.
      niter: power iterations of a randomised SVD, faster for large weights; exact if None.
      key: a JAX PRNG key, for `niter` and `random`.

    Raises:
      SpecError: not a new LoRA with positive alpha, an unknown `direction` or `scale`, or `key` missing.
      KernelError: an embedding or a convolution, other params, a rank above half of the weight's, or a gradient that
        is missing, of another shape, zero or not finite.

    Example:
      >>> import jpeft
      >>> params = {"kernel": jnp.eye(2)}
      >>> adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=1), params)
      >>> new, residual = lora_ga(adapter, params, {"kernel": jnp.diag(jnp.array([3.0, 1.0]))}, scale="unit")
      >>> jnp.abs(jpeft.apply(residual, new)["kernel"] - residual["kernel"])
      Array([[0., 1.],
             [0., 0.]], dtype=float32)
    """
    _check(direction, scale, niter, key)
    found: dict[str, Factors] = {}
    for target in targets(adapter, params):
        gradient = _decomposed(target, _gradient(gradients, target.site), niter, key)
        factors = _chosen(target, gradient, direction, key)
        found[target.site.path] = _scaled(target, factors, scale, stable_gamma)
    return start(adapter, params, found)


def weight_gradients(loss: Callable[..., Array], adapter: Adapter, params: Any, *args: Any) -> dict[str, Array]:
    """The gradients of `loss(params, *args)` with respect to the adapted weights alone, by path.

    Average over batches with `jax.tree.map`. Their size matters except with `scale="weight_svd"`: B keeps the singular
    values.

    Args:
      loss: a pure function of the params, returning a scalar.
      adapter: whose weights are meant.
      params: the base.
      *args: the batch.

    Example:
      >>> import jpeft
      >>> params = {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}
      >>> adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=1), params)
      >>> weight_gradients(lambda p, x: (x @ p["kernel"] + p["bias"]).sum(), adapter, params, jnp.ones((1, 2)))
      {'kernel': Array([[1., 1.],
             [1., 1.]], dtype=float32)}
    """
    flat = base_leaves(params)
    weights = {site.path: flat[site.path] for site in sites(adapter, fresh=False)}
    return jax.grad(lambda weights: loss(replace(params, weights), *args))(weights)


def _check(direction: str, scale: str, niter: int | None, key: Array | None) -> None:
    for name, value, known in (("direction", direction, DIRECTIONS), ("scale", scale, SCALES)):
        if value not in known:
            raise SpecError(f"{name} must be one of {known}; found {value!r}")
    if key is None and (niter is not None or direction == "random"):
        raise SpecError("niter= and direction='random' draw at random; give a key: lora_ga(..., key=key)")


def _gradient(gradients: Mapping[str, Array], site: Site) -> Array:
    if site.path not in gradients:
        raise KernelError(f"gradients has no {site.path!r}; the nearest are {nearest(site.path, gradients)}")
    gradient = jnp.asarray(gradients[site.path])
    if gradient.shape != site.kernel.shape:
        raise KernelError(f"{site.path!r}: the gradient has shape {gradient.shape}; the weight {site.kernel.shape}")
    g = wide(to_matrix(gradient, site.kernel))
    if not isinstance(g, Tracer) and not bool(jnp.isfinite(g).all() and jnp.any(g, (-2, -1)).all()):
        raise KernelError(f"{site.path!r}: the gradient is zero or not finite; does the loss depend on this weight?")
    return g


def _decomposed(target: Target, g: Array, niter: int | None, key: Array | None) -> SVD:
    site, rank = target.site, target.site.rank
    check_rank(site, min(site.kernel.fan_in, site.kernel.fan_out) // 2, "rank, which takes twice as many directions,")
    if niter is None or key is None:
        return svd(g).first(2 * rank)
    return randomized_svd(site_key(key, site), g, 2 * rank, niter)


def _chosen(target: Target, g: SVD, direction: Direction, key: Array | None) -> Factors:
    """A and B from two sets of directions, B weighed with the singular values."""
    r = target.site.rank
    first, second, even, odd = jnp.arange(r), jnp.arange(r, 2 * r), jnp.arange(0, 2 * r, 2), jnp.arange(1, 2 * r, 2)
    if direction == "random":
        assert key is not None
        drawn = jax.random.permutation(jax.random.fold_in(site_key(key, target.site), 1), 2 * r)[:r]
        of_a, of_b = drawn, drawn
    else:
        of_a, of_b = {"ArB2r": (first, second), "A2rBr": (second, first), "ArBr": (odd, even)}[direction]
    return Factors(g.u[..., of_a], g.s[..., of_b, None] * g.vh[..., of_b, :])


def _scaled(target: Target, factors: Factors, scale: Scale, gamma: float) -> Factors:
    a, b = factors
    if scale == "stable":
        return Factors(a, b * target.site.kernel.fan_out**0.25 / gamma**0.5)
    if scale == "weight_svd":
        largest = jnp.linalg.svd(target.w, compute_uv=False)[..., :1, None]
        first = jnp.linalg.norm(b[..., :1, :], axis=-1, keepdims=True)
        return Factors(a, jnp.where(first > 0, b * largest / jnp.where(first > 0, first, 1), b))
    return Factors(a / target.s, b / target.s) if scale == "gd_scale" else factors
