"""Principal components of data that arrives in batches, from each batch's moments alone.

The components so far stand for all earlier data: with V their directions, S their singular values, X the new batch less
its mean μ_X, n and m the numbers of old and new rows, and μ the old mean,

    V' S'² V'ᵀ = k leading of  V S² Vᵀ + Xᵀ X + (n m / (n + m)) (μ - μ_X) (μ - μ_X)ᵀ

Ross, Lim, Lin, Yang 2008, "Incremental Learning for Robust Visual Tracking", section 3.1. In float64 on the host: the
matrices are (in, in), and the loop around it decides by values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Moments:
    """`gram` Xᵀ X (in, in), `sum` (in,) and `count` of a batch's rows, in float64."""

    gram: np.ndarray
    sum: np.ndarray
    count: float

    @property
    def mean(self) -> np.ndarray:
        """(in,)."""
        return self.sum / self.count

    @property
    def centred(self) -> np.ndarray:
        """Xᵀ X of the rows less their mean."""
        return self.gram - self.count * np.outer(self.mean, self.mean)


@dataclass(frozen=True)
class Components:
    """What is known after some batches: `v` (k, in) and `s` (k,) descending, and the whole data's mean and spread."""

    v: np.ndarray
    s: np.ndarray
    mean: np.ndarray
    count: float
    spread: float

    @property
    def explained(self) -> np.ndarray:
        """(k,): of all the variance, how much each direction has."""
        return self.s**2 / self.spread


def update(old: Components | None, batch: Moments, k: int) -> Components:
    """The `k` leading components after another batch."""
    centred = batch.centred
    if old is None:
        return Components(*_leading(centred, k), batch.mean, batch.count, float(np.trace(centred)))
    count, apart = old.count + batch.count, old.mean - batch.mean
    between = old.count * batch.count / count * np.outer(apart, apart)
    mean = (old.mean * old.count + batch.sum) / count
    found = _leading((old.v.T * old.s**2) @ old.v + centred + between, k)
    return Components(*found, mean, count, old.spread + float(np.trace(centred + between)))


def _leading(m: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Directions (k, in) and singular values of data with Xᵀ X = m; each direction's largest entry is positive."""
    values, vectors = np.linalg.eigh(m)
    v = vectors[:, ::-1].T[:k]
    signs = np.sign(v[np.arange(len(v)), np.abs(v).argmax(1)])
    return v * signs[:, None], np.sqrt(np.maximum(values[::-1][:k], 0))


def similarity(new: Components, old: Components) -> np.ndarray:
    """(k,): the cosine between each direction and the one it was."""
    return (new.v * old.v).sum(1) / (np.linalg.norm(new.v, axis=1) * np.linalg.norm(old.v, axis=1))
