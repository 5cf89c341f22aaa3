"""LoRA-FA: A stays as it was drawn, and B's gradient is corrected for it.

    g_B ← (1/s²) (Aᵀ A + δ I)⁻¹ g_B,    δ = 1e-8,    then AdamW

with A (in, r), B (r, out) and s the scaling: of all changes of B, the one whose ΔW is nearest to full fine-tuning's.
Zhang et al. 2023, "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning",
arXiv:2308.03303; the correction is that of PEFT's `create_lorafa_optimizer`, whose AdamW (that of the old transformers)
adds ε to √v before the bias correction and decays the leaf after the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.core import Tracer

from jpeft.adapter import Adapter, Part
from jpeft.errors import SpecError
from jpeft.kernel import wide
from jpeft.methods import lora
from jpeft.site import Site

DELTA = 1e-8


class LoRAFAState(NamedTuple):
    """The optimizer's state; the frozen A have no moments.

    Attributes:
      step: steps done.
      corrections: by path, (*batch, r, r): `(Aᵀ A + δ I)⁻¹ / s²`, computed once, as A does not change.
      m: the first moment of every leaf that is trained.
      v: the second.
    """

    step: Array
    corrections: dict[str, Array]
    m: Part
    v: Part


def lora_fa(
    adapter: Adapter,
    learning_rate: float | Callable[[Any], Any],
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """An optimizer of `adapter.trained` that leaves A alone.

    Leaves that are no factors (a bias of B, biases and modules trained whole) get the same AdamW, uncorrected.

    Args:
      adapter: a LoRA, whose scaling is used.
      learning_rate: a number or an optax schedule.
      b1: of the first moment.
      b2: of the second.
      eps: ε.
      weight_decay: each step then takes this times the learning rate from B and the other leaves.

    Raises:
      SpecError: b1 or b2 out of [0, 1); not a LoRA; or an embedding whose A is still zero: frozen, it never learns.

    Example:
      >>> import jpeft
      >>> adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=1), {"kernel": jnp.ones((3, 2))})
      >>> optimizer = lora_fa(adapter, 0.5)
      >>> ones = jax.tree.map(jnp.ones_like, adapter.trained)
      >>> updates, _ = optimizer.update(ones, optimizer.init(adapter.trained), adapter.trained)
      >>> updates["kernel"]["a"].ravel().tolist(), updates["kernel"]["b"].round(3).tolist()
      ([0.0, 0.0, 0.0], [[-0.5, -0.5]])
    """
    if not (0 <= b1 < 1 and 0 <= b2 < 1):
        raise SpecError(f"lora_fa: b1 and b2 must be in [0, 1); found {b1} and {b2}")
    sites = {site.path: site for site in adapter.sites}
    scalings = {path: adapter.constant[path]["scaling"] for path, site in sites.items() if _is_lora(adapter, site)}

    def init(trained: Part) -> LoRAFAState:
        corrections = {path: _correction(sites[path], trained[path]["a"], s) for path, s in scalings.items()}
        zeros = jax.tree.map(jnp.zeros_like, _without_a(trained, sites))
        return LoRAFAState(jnp.zeros((), jnp.int32), corrections, zeros, zeros)

    def update(gradients: Part, state: LoRAFAState, trained: Part | None = None) -> tuple[Part, LoRAFAState]:
        if trained is None:
            raise SpecError("lora_fa decays the leaves: call update(gradients, state, adapter.trained)")
        step = state.step + 1
        g = _without_a(_corrected(gradients, state.corrections, sites), sites)
        m, v = _moments(state, g, b1, b2)
        rate = learning_rate(state.step) if callable(learning_rate) else learning_rate
        size = rate * jnp.sqrt(_one_minus_power(b2, step)) / _one_minus_power(b1, step)

        def change(p: Array, m: Array, v: Array) -> Array:
            u = -size * m / (jnp.sqrt(v) + eps)
            return (u - rate * weight_decay * (p + u)).astype(p.dtype)

        changes = jax.tree.map(change, _without_a(trained, sites), m, v)
        still = {path: {"a": jnp.zeros_like(trained[path]["a"])} for path in scalings}
        updates = {path: still.get(path, {}) | changes[path] for path in trained}
        return updates, LoRAFAState(step, state.corrections, m, v)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def _one_minus_power(b: float, step: Array) -> Array:
    """1 - b^t, without the cancellation that costs fp32 four digits at t = 1."""
    return -jnp.expm1(step * math.log(b)) if b > 0 else jnp.ones(())


def _is_lora(adapter: Adapter, site: Site) -> bool:
    if site.method not in ("lora", "replacement"):
        raise SpecError(f"{site.path!r}: lora_fa is for LoRA adapters; found {site.method!r}")
    if "mask" in adapter.constant.get(site.path, {}):
        raise SpecError(
            f"{site.path!r} holds adapters of its own for parts of the weight (a mask); LoRA-FA's correction is of one "
            "A: use jpeft.lora_plus, or an adapter of the whole from jpeft.init"
        )
    if site.method == "lora" and site.kernel.kind == "embedding" and site.rank > 0:
        a = adapter.trained[site.path]["a"]
        if not isinstance(a, Tracer | jax.ShapeDtypeStruct) and not bool(jnp.any(a)):
            raise SpecError(
                f"{site.path!r} is an embedding, whose A starts at zero: frozen, it never learns. Leave it out with "
                "exclude=, or use jpeft.lora_plus"
            )
    return site.method == "lora"


def _correction(site: Site, a: Array, s: Array) -> Array:
    """(Aᵀ A + δ I)⁻¹ / s² (*batch, r, r); 0 where a slice of a stack is left alone."""
    a = wide(lora.matrices({"a": a}, site.kernel)["a"])
    gram = jnp.matmul(a.mT, a, precision="highest") + DELTA * jnp.eye(a.shape[-1], dtype=a.dtype)
    inverse = jnp.linalg.pinv(gram, hermitian=True) if a.shape[-1] else gram
    over = jnp.where(s != 0, 1 / jnp.where(s != 0, s * s, 1), 0)
    return over[..., None, None] * inverse


def _corrected(gradients: Part, corrections: dict[str, Array], sites: dict[str, Site]) -> Part:
    """The gradients, those of B each multiplied by its correction."""
    new = dict(gradients)
    for path, correction in corrections.items():
        g = gradients[path]["b"]
        matrix = wide(g).reshape(*sites[path].kernel.batch_shape, correction.shape[-1], sites[path].kernel.fan_out)
        corrected = jnp.matmul(correction, matrix, precision="highest").reshape(g.shape).astype(g.dtype)
        new[path] = gradients[path] | {"b": corrected}
    return new


def _moments(state: LoRAFAState, g: Part, b1: float, b2: float) -> tuple[Part, Part]:
    m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.m, g)
    v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.v, g)
    return m, v


def _without_a(leaves: Part, sites: dict[str, Site]) -> Part:
    frozen = lambda path, name: sites[path].method == "lora" and name == "a"
    return {path: {n: leaf for n, leaf in one.items() if not frozen(path, n)} for path, one in leaves.items()}
