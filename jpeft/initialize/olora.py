"""OLoRA: the adapter starts from the QR decomposition of the weight.

    Wᵀ = Q R,    B = Q_rᵀ (r first columns),    A = R_rᵀ (r first rows),    W_res = W - s A B

Büyükakyüz 2024, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", arXiv:2406.01775. The paper's W is
(out, in), hence the transposes; as in PEFT the scaling stays in the product that the base loses.
"""

from __future__ import annotations

from typing import Any

from jpeft.adapter import Adapter
from jpeft.initialize import decompose
from jpeft.initialize.factors import Factors, Initialized, Target, check_rank, start, targets


def olora(adapter: Adapter, params: Any) -> Initialized:
    """The adapter with an orthonormal B from each weight's QR decomposition, and the base without `s A B`.

    Args:
      adapter: a new LoRA, from `jpeft.init`.
      params: the base it was made for.

    Raises:
      SpecError: not a new LoRA with positive alpha.
      KernelError: an embedding or a convolution, other params, or a rank above the weight's.

    Example:
      >>> import jax, jpeft
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.array([[3.0, 0.0], [0.0, 1.0]])}
      >>> adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=1), params)
      >>> float(jnp.linalg.norm(olora(adapter, params).adapter.trained["kernel"]["b"]))
      1.0
    """
    return start(adapter, params, {t.site.path: _factors(t) for t in targets(adapter, params)})


def _factors(target: Target) -> Factors:
    site = target.site
    check_rank(site, min(site.kernel.fan_in, site.kernel.fan_out))
    q, r = decompose.qr(target.w.mT)
    return Factors(r[..., : site.rank, :].mT, q[..., : site.rank].mT)
