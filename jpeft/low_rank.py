"""The frozen product with a low-rank branch, `y + s (x A) B`, arranged so that it costs what its arithmetic costs.

Autodiff of the branch as everyone writes it does the right arithmetic slowly: XLA:CPU fuses each skinny product with
the additions beside it, and a fused product leaves the library call for a plain loop. Here the backward pass is written
out over two-dimensional operands, and `optimization_barrier` keeps every product a library call. `benchmarks/step.py`
measures it against the frozen model.

The sum is kept whole. XLA would rather keep both terms for the backward pass, and add them again wherever the sum is
read: a step's temporaries were 1.27 times the frozen model's, and are 1.12 times (the same benchmark).
"""

from __future__ import annotations

import jax
from jax import Array

from jpeft.whole import for_cpu, whole


def _pays(x: Array) -> bool:
    # Measured on the CPU backend alone, where it decides; elsewhere the compiler is left to choose.
    return for_cpu() and x.ndim == 2


@jax.custom_batching.custom_vmap
def _held(x: Array) -> Array:
    return jax.lax.optimization_barrier(x)


@_held.def_vmap
def _batched(axis_size: int, in_batched: list[bool], x: Array) -> tuple[Array, bool]:
    # XLA:CPU aborts the process on a barrier behind a batched product of some shapes, with "Check failed: ...
    # LayoutUtil::IsMonotonicWithDim0Major" (jaxlib 0.10.2).
    del axis_size
    return x, in_batched[0]


@jax.custom_jvp
def _barrier(x: Array) -> Array:
    return _held(x) if _pays(x) else x


@_barrier.defjvp
def _barrier_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (t,) = primals, tangents
    return _barrier(x), jax.lax.optimization_barrier(t) if _pays(t) else t


@whole
def _onto(y: Array, h: Array, b: Array) -> Array:
    return y + (h @ b).astype(y.dtype)


def low_rank_plain(x: Array, y: Array, a: Array, b: Array, scaling: Array) -> Array:
    """The same with JAX's own derivative: forward mode works, and a step costs some 5 % more."""
    return _onto(y, _barrier(x @ a), scaling[..., None, None] * b)


@jax.custom_vjp
def low_rank(x: Array, y: Array, a: Array, b: Array, scaling: Array) -> Array:
    """`y + s (x A) B`, in the dtype of `y`.

    Args:
      x: (*batch, rows, in); without batch axes, there may be several of rows.
      y: the frozen product, (*batch, rows, out).
      a: (*batch, in, r), in the dtype of `x`, as `b` and `scaling`.
      b: (*batch, r, out).
      scaling: (*batch,).
    """
    return low_rank_plain(x, y, a, b, scaling)


def _forward(x: Array, y: Array, a: Array, b: Array, scaling: Array) -> tuple[Array, tuple[Array, ...]]:
    h = _barrier(x @ a)
    return _onto(y, h, scaling[..., None, None] * b), (x, a, b, scaling, h)


def _backward(saved: tuple[Array, ...], g: Array) -> tuple[Array, ...]:
    # With H = x A and Y = s H B:  dH = g (s B)ᵀ,  dx = dH Aᵀ,  dA = xᵀ dH,  dB = s Hᵀ g,  ds = <H B, g> = <B, Hᵀ g>.
    # s multiplies what is as small as the factors, never what has the layer's rows.
    x, a, b, scaling, h = saved
    s, dy = scaling[..., None, None], g.astype(a.dtype)
    dh = _barrier(dy @ (s * b).mT)
    over_rows = _over_rows if a.ndim == 2 else lambda u, v: u.mT @ v
    hg = _barrier(over_rows(h, dy))
    da = _barrier(over_rows(dh, x)).mT
    return _barrier(dh @ a.mT), g, da, s * hg, (b * hg).sum((-2, -1))


def _over_rows(u: Array, v: Array) -> Array:
    """uᵀ v, (r, n), the sum over all axes of rows."""
    rows = tuple(range(u.ndim - 1))
    return jax.lax.dot_general(u, v, ((rows, rows), ((), ())))


low_rank.defvjp(_forward, _backward)


def gated_low_rank(x: Array, y: Array, a: Array, b: Array, gates: Array) -> Array:
    """`y + ((x A) ⊙ g) B` with gates (*batch, rows, r): another mixture of the columns of A for each row."""
    return _onto(y, _barrier(x @ a) * gates, b)
