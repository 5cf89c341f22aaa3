"""SVD and QR, in float64 where that costs little.

In fp32, LAPACK leaves singular vectors ten times further from the truth than their own rounding, and how far depends on
the processor. Numpy decomposes in float64 and gives the array's own dtype back, in about twice the time. It gets what
is known and lives on one CPU; what is traced, or on an accelerator or a mesh, stays where it is and with XLA.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer


def svd(m: Array) -> tuple[Array, Array, Array]:
    """Decompose as U diag(S) Vh: `u` (*batch, m, k), `s` (*batch, k) descending, `vh` (*batch, k, n)."""
    if not _for_numpy(m):
        u, s, vh = jnp.linalg.svd(m, full_matrices=False)
        return u, s, vh
    u, s, vh = np.linalg.svd(np.asarray(m), full_matrices=False)
    return jnp.asarray(u), jnp.asarray(s), jnp.asarray(vh)


def qr(m: Array) -> tuple[Array, Array]:
    """Decompose as Q R: `q` (*batch, m, k) with orthonormal columns, `r` (*batch, k, n)."""
    if not _for_numpy(m):
        q, r = jnp.linalg.qr(m)
        return q, r
    q, r = np.linalg.qr(np.asarray(m))
    return jnp.asarray(q), jnp.asarray(r)


def _for_numpy(m: Array) -> bool:
    """Tell whether numpy gets it; not if empty or not finite, which numpy refuses and XLA answers with NaN."""
    if isinstance(m, Tracer) or m.dtype != jnp.float32 or not m.size:
        return False
    on_one_cpu = jax.default_backend() == "cpu" and len(m.devices()) == 1
    return on_one_cpu and bool(np.isfinite(np.asarray(m)).all())
