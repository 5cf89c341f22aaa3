"""How the benchmarks measure: rows in turns, ratios within a round, and what XLA says of the program it made.

A shared machine is busy for one second and idle the next. Rows that are timed in turns meet the same moments, so that
the quotient of two neighbours says more than that of two means.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np


@dataclass(frozen=True)
class Ratio:
    """Same-round quotients: their median, and their 10th and 90th percentile."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Compiled:
    """A compiled function, and what it took and takes.

    Attributes:
      step: the executable, called with the arguments it was compiled for.
      trace_s: seconds until its program was there.
      compile_s: seconds that XLA took for it.
      gflop: floating-point operations of one call, as XLA counts them, in 10^9.
      temp_mib: the most that is alive beside arguments and results, MiB.
    """

    step: Callable[..., Any]
    trace_s: float
    compile_s: float
    gflop: float
    temp_mib: float


def seconds(call: Callable[[], Any]) -> float:
    """The wall time of one call, until all it returns is there."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def in_turns(rows: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each row, every round, one row after the other; a round before them is not counted."""
    times = [[seconds(row) for row in rows.values()] for _ in range(rounds + 1)][1:]
    return {name: list(column) for name, column in zip(rows, zip(*times, strict=True), strict=True)}


def ratios(times: Mapping[str, list[float]], floor: str) -> dict[str, Ratio]:
    """Each row over the row called `floor` in the same round."""
    return {name: _ratio(np.divide(row, times[floor])) for name, row in times.items()}


def _ratio(quotients: np.ndarray) -> Ratio:
    low, middle, high = np.percentile(quotients, [10, 50, 90])
    return Ratio(float(middle), float(low), float(high))


def compiled(function: Callable[..., Any], *args: Any) -> Compiled:
    """`jax.jit(function)` compiled for these arguments."""
    start = time.perf_counter()
    lowered = jax.jit(function).lower(*args)
    traced = time.perf_counter()
    step = lowered.compile()
    end = time.perf_counter()
    cost, memory = step.cost_analysis() or {}, step.memory_analysis()
    temp = memory.temp_size_in_bytes / 2**20 if memory else math.nan
    return Compiled(step, traced - start, end - traced, cost.get("flops", math.nan) / 1e9, temp)
