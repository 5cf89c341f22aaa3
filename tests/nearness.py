"""Numbers that come of an SVD, a QR or a long sum: as far from the truth as another's, on whichever processor."""

from typing import Any

import numpy as np

FACTOR = 4


def assert_as_near_as(ours: Any, theirs: Any, truth: np.ndarray, tolerance: float, where: str = "") -> None:
    """Check that `ours` is at most four times as far from the truth as `theirs`, and `theirs` within `tolerance` of it.

    A unit in the last place of the largest value stands in for a distance below it. The second check is what makes the
    truth, a float64 computation of the test's own, that of the others.
    """
    assert truth.dtype == np.float64, f"{where}: the truth is {truth.dtype}"
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape == truth.shape, f"{where}: {ours.shape}, {theirs.shape} and {truth.shape}"
    unit = float(np.spacing(np.float32(np.abs(truth).max())))
    our_distance, their_distance = (float(np.abs(np.float64(one) - truth).max()) for one in (ours, theirs))
    assert their_distance <= tolerance, f"{where}: theirs is off by {their_distance:.2e}"
    allowed = FACTOR * max(their_distance, unit)
    assert our_distance <= allowed, f"{where}: ours is off by {our_distance:.2e}, theirs by {their_distance:.2e}"


def with_signs_of(found: Any, truth: np.ndarray, axis: int) -> np.ndarray:
    """Negate the columns (axis 0) or rows (axis 1) that point away from the truth's: an SVD leaves their signs open."""
    found = np.asarray(found)
    return found * np.sign((found * truth).sum(axis, keepdims=True)).astype(found.dtype)
