"""The course of the loss, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jpeft.atomic import write_file

SPAN = 0.08  # of the run, that the smoothed line averages over


def plot_loss(path: str | Path, losses: Sequence[float], held_out: Mapping[int, float], title: str) -> None:
    """Writes a PNG: the loss of each step, its running mean, and the held-out loss where it was measured.

    Args:
      path: the file.
      losses: of step 1, 2, and so on.
      held_out: the held-out loss by the number of steps done.
      title: what it is of.
    """
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # a canvas of its own: no window, and nothing left behind in pyplot
    axes = figure.add_subplot(title=title, xlabel="step", ylabel="loss (nats a label)")
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color="0.75", linewidth=1, label="training, each step")
    axes.plot(steps, _smoothed(losses), color="tab:blue", linewidth=2, label="training, running mean")
    if held_out:
        axes.plot(*zip(*sorted(held_out.items()), strict=True), "o--", color="tab:orange", label="held out")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    write_file(path, lambda new: figure.savefig(new, format="png"))


def _smoothed(losses: Sequence[float]) -> np.ndarray:
    """Each step's mean over what lies behind it."""
    width = max(1, round(SPAN * len(losses)))
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(losses, float))])
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)
