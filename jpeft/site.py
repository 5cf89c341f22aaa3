"""One weight that a method acts on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jpeft.kernel import Kernel


@dataclass(frozen=True)
class Site:
    """What is done to one weight.

    Attributes:
      path: where the weight is.
      method: a name of `jpeft.methods.METHODS`.
      kernel: the weight's geometry.
      rank: the method's rank here (0 where it has none).
      layers: of stacked layers, those adapted; None for all.
      use: `lookup` or `product` where the adapter acts on one use alone of a weight with both (a tied embedding); None
        for all uses.
    """

    path: str
    method: str
    kernel: Kernel
    rank: int = 0
    layers: tuple[int, ...] | None = None
    use: str | None = None

    @property
    def chosen(self) -> np.ndarray:
        """(*batch,): 1 for each matrix that is adapted, 0 for the slices of a stack that `layers` leaves alone."""
        chosen = np.ones(self.kernel.batch_shape, np.float32)
        if self.layers is None:
            return chosen
        assert self.kernel.stack is not None
        mask = np.isin(np.arange(self.kernel.depth), self.layers)
        return chosen * mask.reshape(-1, *[1] * (chosen.ndim - 1 - self.kernel.stack))
