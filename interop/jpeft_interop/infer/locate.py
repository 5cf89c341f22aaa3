"""Where the values of one list lie in another."""

from __future__ import annotations

import numpy as np

from jpeft_interop.infer.digits import UNKNOWN


def locate(wanted: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Of each fingerprint, its place among others: `UNKNOWN` where it is not there, or more than once.

    Example:
      >>> locate(np.array([7, 5, 9, 3]), np.array([5, 7, 3, 3]))
      array([ 1,  0, -1, -1])
    """
    order = np.argsort(among, kind="stable")
    ranked = among[order]
    left = np.searchsorted(ranked, wanted, "left")
    right = np.searchsorted(ranked, wanted, "right")
    place = order[np.minimum(left, len(order) - 1)]
    return np.where(right - left == 1, place, UNKNOWN)


def locate_near(wanted: np.ndarray, among: np.ndarray, tolerance: float) -> np.ndarray:
    """The same for floats, to a relative tolerance; `UNKNOWN` where two are as near."""
    order = np.argsort(among, kind="stable")
    ranked = among[order]
    room = tolerance * np.abs(wanted)
    left = np.searchsorted(ranked, wanted - room, "left")
    right = np.searchsorted(ranked, wanted + room, "right")
    place = order[np.minimum(left, len(order) - 1)]
    return np.where(right - left == 1, place, UNKNOWN)
