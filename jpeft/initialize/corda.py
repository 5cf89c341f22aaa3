"""CorDA: the adapter starts in the directions that matter to the activations of some data, and the base keeps the rest.

    C = E[x xᵀ] + damping,    Wᵀ C = U S Vᵀ,    A = C⁻¹ V_r (S_r / s)^½,    B = (S_r / s)^½ U_rᵀ,    W_res = W - s A B

`ipm` (instruction-previewed mode) adapts the r largest components, `kpm` (knowledge-preserved mode) the r least, so
that what the data needs stays in the frozen base. Yang et al. 2024, "CorDA: Context-Oriented Decomposition Adaptation
of Large Language Models", arXiv:2406.05223. The paper's W is (out, in). As in PEFT the damping is 0.01 times the mean
of C's diagonal, doubled until the inverse holds, and the singular values are divided by the scaling.
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
from jpeft.initialize.factors import Factors, Initialized, Target, check_rank, start, targets
from jpeft.initialize.svd import svd
from jpeft.tree import nearest

Mode = Literal["ipm", "kpm"]
DAMPING, MOST, INVERSE_ERROR = 0.01, 1e6, 0.05


def corda(adapter: Adapter, params: Any, covariances: Mapping[str, Array], *, mode: Mode = "ipm") -> Initialized:
    """The adapter on each weight's context-oriented components, and the base without them.

    Args:
      adapter: a new LoRA, from `jpeft.init`.
      params: the base it was made for.
      covariances: `E[x xᵀ]` (*batch, in, in) of each weight's inputs, by path: `covariance(...)` of what
        `tap(fn, scaled_gram)` measured. Their scale does not matter.
      mode: `ipm` for the components that the data uses most, `kpm` for those that it uses least.

    Raises:
      SpecError: not a new LoRA with positive alpha, or an unknown mode.
      KernelError: an embedding or a convolution, other params, a rank above the weight's, or a covariance that is
        missing, of another shape or not finite.

    Example: inputs that use the second direction only.
      >>> import jpeft
      >>> params = {"kernel": jnp.eye(2)}
      >>> adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=1), params)
      >>> corda(adapter, params, {"kernel": jnp.diag(jnp.array([0.0, 1.0]))}).params["kernel"].round(3)
      Array([[1., 0.],
             [0., 0.]], dtype=float32)
    """
    if mode not in ("ipm", "kpm"):
        raise SpecError(f"mode must be 'ipm' or 'kpm'; found {mode!r}")
    found = targets(adapter, params)
    return start(adapter, params, {t.site.path: _factors(t, _covariance(covariances, t.site), mode) for t in found})


def covariance(measured: Mapping[str, Mapping[str, Array]]) -> dict[str, Array]:
    """`E[x xᵀ]` by path, of the sums that `tap(fn, scaled_gram)` gives.

    Raises:
      KernelError: a weight saw no input.
    """
    for path, sums in measured.items():
        if not isinstance(sums["calls"], Tracer) and bool((sums["calls"] == 0).any()):
            raise KernelError(f"{path!r} saw no input: nothing that depends on it is among the function's results")
    return {path: sums["gram"] / sums["calls"][..., None, None] for path, sums in measured.items()}


def _covariance(covariances: Mapping[str, Array], site: Site) -> Array:
    shape = (*site.kernel.batch_shape, site.kernel.fan_in, site.kernel.fan_in)
    if site.path not in covariances:
        raise KernelError(f"covariances has no {site.path!r}; the nearest are {nearest(site.path, covariances)}")
    c = jnp.asarray(covariances[site.path], jnp.float32)
    if c.shape != shape:
        raise KernelError(f"{site.path!r}: the covariance of its inputs has shape {shape}; found {c.shape}")
    if not isinstance(c, Tracer) and not bool(jnp.isfinite(c).all()):
        raise KernelError(f"{site.path!r}: the covariance of its inputs holds values that are not finite")
    return c


def _factors(target: Target, c: Array, mode: Mode) -> Factors:
    site = target.site
    check_rank(site, min(site.kernel.fan_in, site.kernel.fan_out))
    found = svd(jnp.matmul(_over_batch(_damped)(c), target.w, precision="highest"))
    kept = found.first(site.rank) if mode == "ipm" else found.last(site.rank)
    # With C W = V S Uᵀ, C⁻¹ V_r S_r is W U_r: no inverse, whose rounding errors would grow with the condition of C.
    root, s = jnp.sqrt(kept.s / target.s[..., 0]), target.s
    a = jnp.matmul(target.w, kept.vh.mT, precision="highest") / s
    return Factors(_divided(a, root[..., None, :]), root[..., :, None] * kept.vh)


def _divided(a: Array, root: Array) -> Array:
    """A direction that no input has, or that the weight ignores, is zero already."""
    return jnp.where(root > 0, a / jnp.where(root > 0, root, 1), 0)


def _over_batch(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """One matrix at a time."""
    return lambda c: jax.lax.map(function, c.reshape(-1, *c.shape[-2:])).reshape(c.shape)


def _damped(c: Array) -> Array:
    """C with its diagonal raised until it has an inverse in fp32."""
    eye, mean = jnp.eye(c.shape[0], dtype=c.dtype), jnp.diagonal(c).mean()
    dampen = lambda damping: c + damping * mean * eye

    def fails(damping: Array) -> Array:
        damped = dampen(damping)
        error = jnp.linalg.norm(jnp.matmul(damped, jnp.linalg.inv(damped), precision="highest") - eye)
        return ~(error < INVERSE_ERROR) & (damping < MOST)

    return dampen(jax.lax.while_loop(fails, lambda damping: 2 * damping, jnp.asarray(DAMPING, c.dtype)))
