"""Routing: several low-rank adapters in one product, each row with a gate for each of them.

    y_t = x_t W + Σ_k g_tk s_k (x_t A_k) B_k

for rows t (tokens, examples) and adapters k: one skinny product with all the A side by side, the gates on its result,
one with all the B. What `attach(..., gates=...)` makes of adapters: X-LoRA's mixture (Buehler & Buehler 2024,
arXiv:2402.07148) and one adapter an example both are this. No single weight does it, so it has no dense form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from jpeft.errors import LiftError, SpecError
from jpeft.kernel import Kernel
from jpeft.low_rank import gated_low_rank
from jpeft.method import Leaves, Meeting, Method, Weights
from jpeft.methods import adalora
from jpeft.remat import named
from jpeft.site import Site


def stacked(method: str, group: Sequence[Leaves | None]) -> Leaves:
    """The leaves of K adapters at one weight, side by side; None for an adapter that leaves the weight alone.

    Args:
      method: of all of them, `lora` or `adalora`.
      group: each one's leaves, as matrices.

    Returns:
      `a` (*batch, in, R) and `b` (*batch, R, out), R the sum of the ranks; `share` (*batch, K, R), s_k where a column
      is the k-th's, else 0; `bias` (*batch, K, out) if one has a bias of B.
    """
    plain = [adalora.as_lora(leaves) if leaves is not None and method == "adalora" else leaves for leaves in group]
    present = [(k, leaves) for k, leaves in enumerate(plain) if leaves is not None]
    parts: dict[str, list[Array]] = {"a": [], "b": [], "share": [], "bias": []}
    biased = any("bias" in leaves for _, leaves in present)
    for k, leaves in present:
        s = leaves["scaling"]
        own = jnp.zeros(len(group), s.dtype).at[k].set(1).reshape(*[1] * s.ndim, len(group), 1)
        scaling = (s[..., None, None] * own).astype(leaves["a"].dtype)  # (*batch, K, 1)
        parts["share"].append(jnp.repeat(scaling, leaves["a"].shape[-1], axis=-1))
        parts["a"].append(leaves["a"])
        parts["b"].append(leaves["b"])
        if "bias" in leaves:
            parts["bias"].append(scaling * leaves["bias"][..., None, :])
    joined = {name: jnp.concatenate(parts[name], axis) for name, axis in (("a", -1), ("b", -2), ("share", -1))}
    return joined | ({"bias": sum(parts["bias"][1:], parts["bias"][0])} if biased else {})


def init(key: Array, site: Site, spec: Any, weight: Any, dtype: jnp.dtype) -> Leaves:
    """There is none: adapters are routed when they are attached."""
    raise SpecError("routing has no spec: attach adapters with gates=")


def matrices(leaves: Leaves, kernel: Kernel) -> Leaves:
    """`stacked` makes matrices already."""
    return leaves


def transform(w: Array, leaves: Leaves) -> Array:
    """There is none."""
    raise LiftError("adapters with gates differ from row to row: no single weight does that")


def product(x: Array, y: Array, w: Weights, leaves: Leaves, *, forward_mode: bool) -> Array:
    """y + ((x A) ⊙ g) B with `gates` (*batch, rows, K) in the leaves."""
    a, b, gates = leaves["a"], leaves["b"], leaves["gates"].astype(leaves["a"].dtype)
    y = named(gated_low_rank(x.astype(a.dtype), y, a, b, gates @ leaves["share"]))
    return y + (gates @ leaves["bias"]).astype(y.dtype) if "bias" in leaves else y


def lookup(meeting: Meeting, y: Array, w: Weights, leaves: Leaves) -> Array:
    """The same for rows of an embedding, and for a convolution; `gates` (..., K) go with `take(A)` (..., R)."""
    gates, then = leaves["gates"].astype(leaves["a"].dtype), meeting.then
    branch = then(meeting.take(leaves["a"]) * then(gates, leaves["share"]), leaves["b"])
    return named(y + (branch + then(gates, leaves["bias"]) if "bias" in leaves else branch).astype(y.dtype))


def transposed(leaves: Leaves) -> Leaves | None:
    """(A B)ᵀ = Bᵀ Aᵀ; nothing where there is a bias, which belongs to the layer's own result."""
    return None if "bias" in leaves else leaves | {"a": leaves["b"].mT, "b": leaves["a"].mT}


METHOD = Method(
    transform,
    matrices,
    init,
    shapes=lambda spec, site: {},
    delta=lambda leaves: transform(leaves["a"], leaves),
    product=product,
    transposed=transposed,
    lookup=lookup,
)
