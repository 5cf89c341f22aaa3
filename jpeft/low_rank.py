"""The low-rank branch `s (x A) B`, arranged so that it costs what its arithmetic costs.

Autodiff of the branch as everyone writes it does the right arithmetic slowly: XLA:CPU fuses each skinny product with
the additions beside it, and a fused product leaves the library call for a plain loop. Here the backward pass is written
out over two-dimensional operands, and `optimization_barrier` keeps every product a library call. `benchmarks/step.py`
measures it against the frozen model.

Its sum with the frozen product is kept whole (`added`). XLA would rather keep both terms for the backward pass, and add
them again wherever the sum is read: 27 % more memory than the frozen model's step, for 7 % (the same benchmark).
"""

from __future__ import annotations

import jax
from jax import Array
from jax.experimental.xla_metadata import set_xla_metadata


def _pays(x: Array) -> bool:
    # Measured on the CPU backend alone, where it decides; elsewhere the compiler is left to choose.
    return jax.default_backend() == "cpu" and x.ndim == 2


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


def added(y: Array, z: Array) -> Array:
    """y + z, one array in memory for whoever reads it."""
    if jax.default_backend() != "cpu":
        return y + z
    # XLA fuses over a barrier by the time it fuses, but not into a call that it may not inline.
    with set_xla_metadata(inlineable="false"):
        return _sum(y, z)


@jax.jit
def _sum(y: Array, z: Array) -> Array:
    return y + z


def low_rank_plain(x: Array, a: Array, b: Array, scaling: Array) -> Array:
    """The branch with JAX's own derivative: forward mode works, and a step costs some 5 % more."""
    return _barrier((scaling[..., None, None] * _barrier(x @ a)) @ b)


@jax.custom_vjp
def low_rank(x: Array, a: Array, b: Array, scaling: Array) -> Array:
    """`s (x A) B` for x (*batch, rows, in), A (*batch, in, r), B (*batch, r, out), s (*batch,); all of one dtype."""
    return low_rank_plain(x, a, b, scaling)


def _forward(x: Array, a: Array, b: Array, scaling: Array) -> tuple[Array, tuple[Array, ...]]:
    h = _barrier(x @ a)
    return _barrier((scaling[..., None, None] * h) @ b), (x, a, b, scaling, h)


def _backward(saved: tuple[Array, ...], g: Array) -> tuple[Array, ...]:
    # With H = x A and Y = s H B:  dH = s g Bᵀ,  dx = dH Aᵀ,  dA = xᵀ dH,  dB = s Hᵀ g,  ds = <H B, g> = <B, Hᵀ g>.
    # s multiplies what is narrow, (rows, r), never what is as wide as the layer.
    x, a, b, scaling, h = saved
    s = scaling[..., None, None]
    dh = s * _barrier(g @ b.mT)
    hg = _barrier(h.mT @ g)
    da = _barrier(dh.mT @ x).mT
    return _barrier(dh @ a.mT), da, s * hg, (b * hg).sum((-2, -1))


low_rank.defvjp(_forward, _backward)


def gated_low_rank(x: Array, a: Array, b: Array, gates: Array) -> Array:
    """`((x A) ⊙ g) B` with gates (*batch, rows, r): another mixture of the columns of A for each row."""
    return _barrier((_barrier(x @ a) * gates) @ b)
