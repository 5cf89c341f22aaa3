"""LoftQ: a quantised base, and an adapter that starts as the best low-rank repair of what quantising lost.

    Q_t = q(W - s A_{t-1} B_{t-1}),    s A_t B_t = SVD_r(W - Q_t),    t = 1 … T,    A_0 B_0 = 0

Li et al. 2023, "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", arXiv:2310.08659, algorithm 1.
q is quantised and back: blocks of 64 values to the quantiles of a normal distribution (NF4: Dettmers et al. 2023,
"QLoRA", arXiv:2305.14314, appendix E), or rows to 8-bit integers. The base holds the values after the way back, in its
own dtype: packing them is the business of who stores it. PEFT leaves s out, which is right for alpha = rank alone.
"""

from __future__ import annotations

from functools import cache
from statistics import NormalDist
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jpeft.adapter import Adapter
from jpeft.errors import SpecError
from jpeft.initialize.factors import Factors, Initialized, Target, check_rank, targets, with_factors
from jpeft.initialize.pissa import split
from jpeft.initialize.svd import svd
from jpeft.kernel import from_matrix
from jpeft.tree import base_leaves, replace

BLOCK = 64
BITS = (2, 3, 4, 8)


def loftq(adapter: Adapter, params: Any, *, bits: int = 4, iterations: int = 1) -> Initialized:
    """The quantised (and dequantised) base, and the adapter that repairs it.

    Args:
      adapter: a new LoRA, from `jpeft.init`.
      params: the base it was made for.
      bits: 2, 3 or 4 for normal floats (4 is NF4), 8 for integers with a scale for each output.
      iterations: T: how often base and adapter are fitted to each other.

    Raises:
      SpecError: not a new LoRA with positive alpha, unknown `bits`, or `iterations` below 1.
      KernelError: an embedding or a convolution, other params, or a rank above the weight's.

    Example: a rank that repairs everything.
      >>> import jax, jpeft
      >>> params = {"kernel": jax.random.normal(jax.random.key(1), (3, 2))}
      >>> adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=2), params)
      >>> new, quantised = loftq(adapter, params)
      >>> lost = jnp.abs(quantised["kernel"] - params["kernel"]).max()
      >>> left = jnp.abs(jpeft.apply(quantised, new)["kernel"] - params["kernel"]).max()
      >>> bool(lost > 0.01), bool(left < 1e-6)
      (True, True)
    """
    if bits not in BITS:
        raise SpecError(f"bits must be one of {BITS}; found {bits!r}")
    if iterations < 1:
        raise SpecError(f"iterations must be >= 1; found {iterations!r}")
    flat, factors, new = base_leaves(params), {}, {}
    for target in targets(adapter, params):
        site = target.site
        quantised, factors[site.path] = _fitted(target, bits, iterations)
        chosen = jnp.where((target.scaling > 0)[..., None, None], quantised, target.w)
        new[site.path] = from_matrix(chosen, site.kernel).astype(flat[site.path].dtype)
    return Initialized(with_factors(adapter, factors), replace(params, new))


def _fitted(target: Target, bits: int, iterations: int) -> tuple[Array, Factors]:
    check_rank(target.site, min(target.site.kernel.fan_in, target.site.kernel.fan_out))
    quantised, factors, low_rank = target.w, None, jnp.zeros_like(target.w)
    for _ in range(iterations):
        quantised = quantize(target.w - low_rank, bits)
        factors = split(svd(target.w - quantised).first(target.site.rank), target.s)
        low_rank = target.s * jnp.matmul(factors.a, factors.b, precision="highest")
    assert factors is not None
    return quantised, factors


def quantize(w: Array, bits: int = 4) -> Array:
    """`w` (*batch, in, out) in fp32, each value moved to the nearest that `bits` can say.

    Blocks run along the inputs of one output after another, as in torch's row-major (out, in).
    """
    return _integers(w) if bits == 8 else _normal_floats(w, jnp.asarray(normal_float_table(bits)))


@cache
def normal_float_table(bits: int) -> tuple[float, ...]:
    """The 2^bits values of a normal float, -1 to 1, zero among them.

    Quantiles of N(0, 1), evenly spaced in probability on either side of zero, with one more on the positive side.
    """
    half = 2 ** (bits - 1)
    most = 1 - 0.5 * (1 / (4 * half) + 1 / (4 * half - 2))
    side = lambda n: [NormalDist().inv_cdf(p) for p in np.linspace(most, 0.5, n + 1)[:-1]]
    values = [*(-v for v in side(half - 1)), 0.0, *reversed(side(half))]
    return tuple(v / max(values) for v in values)


def _normal_floats(w: Array, table: Array) -> Array:
    rows = w.mT.reshape(*w.shape[:-2], -1)
    blocks = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, -rows.shape[-1] % BLOCK)])
    blocks = blocks.reshape(*rows.shape[:-1], -1, BLOCK)
    largest = jnp.abs(blocks).max(-1, keepdims=True)
    unit = blocks / jnp.where(largest > 0, largest, 1)
    nearest = jnp.searchsorted((table[1:] + table[:-1]) / 2, unit)
    back = (table[nearest] * largest).reshape(*rows.shape[:-1], -1)[..., : rows.shape[-1]]
    return back.reshape(w.mT.shape).mT


def _integers(w: Array) -> Array:
    largest = jnp.abs(w).max(-2, keepdims=True)
    step = jnp.where(largest > 0, largest, 1) / 127
    return jnp.round(w / step) * step
