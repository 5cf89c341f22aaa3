"""DoRA: weight-decomposed low-rank adaptation.

    W' = m V / ‖V‖_c,    V = W + s A B,    y = x W' + b

with m (out) the magnitudes and ‖·‖_c the norm of each column of (in, out). Liu et al. 2024, "DoRA: Weight-Decomposed
Low-Rank Adaptation", arXiv:2402.09353. The norm counts as a constant in the backward pass (section 4.3 there).

The fast path never forms V: y = m / ‖V‖ (x W + s x A B), where column by column

    ‖V‖² = ‖W‖² + 2 s <AᵀW, B> + s² <AᵀA B, B>
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jpeft.errors import KernelError
from jpeft.kernel import Kernel, to_matrix, wide
from jpeft.method import Axes, Leaves, Meeting, Method, Shapes, Weights, for_rows
from jpeft.methods import lora
from jpeft.remat import named
from jpeft.site import Site


class DoRA(lora.LoRA):
    """The DoRA spec: LoRA's fields, and a magnitude for each output feature.

    Raises:
      SpecError: a value out of range, or `factor_bias`, which DoRA has not.

    Example:
      >>> DoRA(rank=8, alpha=16, targets=["q_proj"])
      DoRA(rank=8, alpha=16, targets=('q_proj',))
    """

    method = "dora"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor_bias:
            raise self.fail("factor_bias has no meaning here: the magnitude scales the product, not a bias of B")


def init(key: Array, site: Site, spec: DoRA, weight: Any, dtype: jnp.dtype) -> Leaves:
    """LoRA's leaves and `m` (*batch, *output), the base's own column norms: the change is zero."""
    if isinstance(weight, jax.ShapeDtypeStruct):
        raise KernelError(f"{site.path!r}: DoRA starts from the weight's norms; found a ShapeDtypeStruct, give arrays")
    norms = column_norms(wide(to_matrix(jnp.asarray(weight), site.kernel)))
    m = norms.reshape(shapes(spec, site)["m"])
    return lora.init(key, site, spec, weight, dtype) | {"m": m.astype(dtype)}


def shapes(spec: DoRA, site: Site) -> Shapes:
    """LoRA's, `m` (*batch, *output), and `chosen` (*batch,) where only some slices of a stack are adapted."""
    kernel, batch = site.kernel, site.kernel.batch_shape
    chosen = {} if site.layers is None else {"chosen": batch}
    return lora.shapes(spec, site) | {"m": (*batch, *kernel.sizes(kernel.output))} | chosen


def axes(kernel: Kernel) -> dict[str, Axes]:
    """LoRA's, and those of m and of the choice of slices."""
    return lora.axes(kernel) | {"m": (*kernel.batch, *kernel.output), "chosen": kernel.batch}


def constant(spec: DoRA, site: Site) -> Leaves:
    """LoRA's, and `chosen` (*batch,) where only some slices of a stack are adapted: the others keep their norms."""
    chosen = {} if site.layers is None else {"chosen": jnp.asarray(site.chosen)}
    return lora.constant(spec, site) | chosen


def matrices(leaves: Leaves, kernel: Kernel) -> Leaves:
    """LoRA's, and m (*batch, out)."""
    return lora.matrices(leaves, kernel) | {"m": leaves["m"].reshape(*kernel.batch_shape, kernel.fan_out)}


def column_norms(v: Array) -> Array:
    """‖V‖_c of (*batch, in, out)."""
    return jnp.sqrt(jnp.sum(v * v, axis=-2))


def transform(w: Array, leaves: Leaves) -> Array:
    """W' = m V / ‖V‖_c, the norm a constant."""
    v = lora.transform(w, leaves)
    return v * _gain(column_norms(jax.lax.stop_gradient(v)), leaves)[..., None, :]


def _gain(norms: Array, leaves: Leaves) -> Array:
    """m / ‖V‖_c; a column of zeros stays one."""
    gain = leaves["m"] / jnp.where(norms > 0, norms, 1)
    return jnp.where(leaves["chosen"][..., None] > 0, gain, 1) if "chosen" in leaves else gain


def factored_norms(w: Array, leaves: Leaves) -> Array:
    """‖W + s A B‖_c without the sum: two skinny products and one pass over W."""
    a, b, s = leaves["a"], leaves["b"], leaves["scaling"][..., None, None]
    dot = lambda x, y: jnp.matmul(x, y, precision="highest")
    cross = 2 * s * dot(a.mT, w) + s * s * dot(dot(a.mT, a), b)
    return jnp.sqrt(jnp.maximum(jnp.sum(w * w, axis=-2) + jnp.sum(cross * b, axis=-2), 0))


def _factored_gain(w: Weights, leaves: Leaves) -> Array:
    """(*batch, out), in the precision that adapted weights are computed in."""
    base = wide(jax.lax.stop_gradient(w()))
    held = {name: jax.lax.stop_gradient(leaf).astype(base.dtype) for name, leaf in leaves.items()}
    return _gain(factored_norms(base, held), held | {"m": leaves["m"].astype(base.dtype)})


def product(x: Array, y: Array, w: Weights, leaves: Leaves, *, forward_mode: bool) -> Array:
    """y' = m / ‖V‖_c (y + s (x A) B)."""
    v = lora.product(x, wide(y), w, leaves, forward_mode=forward_mode)
    return (v * for_rows(_factored_gain(w, leaves), v)).astype(y.dtype)


def lookup(meeting: Meeting, y: Array, w: Weights, leaves: Leaves) -> Array:
    """The same for rows of an embedding, for a convolution, and for experts."""
    gain = meeting.each(_factored_gain(w, leaves))
    return (named(wide(y) + wide(lora.looked_up(meeting, leaves))) * gain).astype(y.dtype)


METHOD = Method(transform, matrices, init, shapes, axes, constant=constant, product=product, lookup=lookup)
