"""T5's relative positions: the distances between tokens in buckets, the far ones together."""

from __future__ import annotations

import math

import numpy as np


def relative_buckets(queries: int, keys: int, both_ways: bool, buckets: int, longest: int) -> np.ndarray:
    """The bucket of each key as seen from each query, `(queries, keys)`.

    Half of the buckets are for one distance each, from 0 on; the rest grow wider with the logarithm of the distance,
    the last of them holding all from `longest` on. In fp32 as torch has it: the edges depend on its rounding.

    Args:
      queries: how many.
      keys: how many.
      both_ways: half of all buckets are for keys after the query; otherwise those are all as if at distance 0.
      buckets: how many.
      longest: the distance from which on there is one bucket.

    Example:
      >>> relative_buckets(1, 6, True, 8, 16)
      array([[0, 5, 6, 6, 6, 6]])
    """
    ahead = np.arange(keys)[None] - np.arange(queries)[:, None]
    buckets = buckets // 2 if both_ways else buckets
    first = np.where(ahead > 0, buckets, 0) if both_ways else np.zeros_like(ahead)
    distance = np.abs(ahead) if both_ways else np.maximum(-ahead, 0)
    single = buckets // 2
    steps = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(single)) / np.float32(
        math.log(longest / single)
    )
    wide = single + (steps * np.float32(buckets - single)).astype(np.int64)
    return first + np.where(distance < single, distance, np.minimum(wide, buckets - 1))
