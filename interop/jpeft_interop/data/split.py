"""Holding examples out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from jpeft_interop.data.errors import DataError

T = TypeVar("T")


def split(records: Sequence[T], share: float, seed: int) -> tuple[list[T], list[T]]:
    """Those to train on and those held out: whole examples, chosen by a seed, each part in its own order.

    Args:
      records: at least two, if any are to be held out.
      share: of the examples, rounded, and at least one unless it is 0.
      seed: of the choice.

    Raises:
      DataError: the share is not in [0, 1), or nothing would be left to train on.

    Example:
      >>> train, held_out = split(range(10), 0.2, seed=0)
      >>> len(train), len(held_out), sorted(train + held_out) == list(range(10))
      (8, 2, True)
    """
    if not 0 <= share < 1:
        raise DataError(f"expected a share to hold out of at least 0 and below 1; found {share}")
    count = max(1, round(share * len(records))) if share else 0
    if count >= len(records):
        raise DataError(
            f"{count} of {len(records)} examples would be held out, which leaves none to train on; hold out less"
        )
    chosen = set(np.random.default_rng(seed).permutation(len(records))[:count].tolist())
    pick = lambda held: [record for number, record in enumerate(records) if (number in chosen) == held]
    return pick(False), pick(True)
