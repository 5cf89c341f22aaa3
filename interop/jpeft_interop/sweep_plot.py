"""A sweep as a picture: how each run learnt, and what its learning rate has to do with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from jpeft.atomic import write_file
from jpeft_interop.plot import SPAN

STYLES = ("-", "--", ":", "-.")


class Curve(NamedTuple):
    """What is drawn of a run.

    Attributes:
      rate: its learning rate, which its colour tells.
      kind: what else it is, its rank say, which its line's style tells.
      losses: of step 1, 2 and so on, as long as they are finite.
      final: the loss that runs are compared by; None if it diverged.
    """

    rate: float
    kind: str
    losses: Sequence[float]
    final: float | None


def plot_sweep(path: str | Path, runs: Mapping[str, Curve], best: str | None, compared_by: str, title: str) -> None:
    """Writes a PNG: each run's running mean of the loss, and the final losses over the learning rate.

    Args:
      path: the file.
      runs: by name.
      best: the name of the one that is drawn thick.
      compared_by: what the final losses are of.
      title: of the whole.
    """
    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    curves, finals = figure.subplots(1, 2, width_ratios=(3, 2))
    rates = sorted({run.rate for run in runs.values()})
    colours = dict(zip(rates, matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(rates))), strict=True))
    styles = {kind: STYLES[i % len(STYLES)] for i, kind in enumerate(dict.fromkeys(run.kind for run in runs.values()))}
    _curves(curves, runs, best, colours, styles)
    _finals(finals, runs, best, colours, styles, compared_by)
    write_file(path, lambda new: figure.savefig(new, format="png"))


def _curves(axes: Axes, runs: Mapping[str, Curve], best: str | None, colours: Mapping, styles: Mapping) -> None:
    axes.set(xlabel="step", ylabel="training loss, running mean")
    shown = [float(smoothed(run.losses).max()) for run in runs.values() if run.final is not None and run.losses]
    for name, run in runs.items():
        steps = np.arange(1, len(run.losses) + 1)
        width = 2.8 if name == best else 1.2
        axes.plot(steps, smoothed(run.losses), styles[run.kind], color=colours[run.rate], linewidth=width)
    if shown:  # one that diverged must not flatten the others
        axes.set_ylim(top=min(axes.get_ylim()[1], 1.05 * max(shown)))
    for rate, colour in colours.items():
        axes.plot([], [], color=colour, label=f"lr {rate:g}")
    for kind, style in styles.items() if len(styles) > 1 else ():
        axes.plot([], [], style, color="0.3", label=kind)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)


def _finals(
    axes: Axes, runs: Mapping[str, Curve], best: str | None, colours: Mapping, styles: Mapping, compared_by: str
) -> None:
    axes.set(xlabel="learning rate", ylabel=compared_by, xscale="log")
    for kind, style in styles.items():
        found = {rate: _of(runs, kind, rate) for rate in colours}
        means = [(rate, np.mean(losses)) for rate, losses in found.items() if losses]
        axes.plot([rate for rate, _ in means], [mean for _, mean in means], style, color="0.6", zorder=1)
    for name, run in runs.items():
        if run.final is not None:
            axes.scatter(run.rate, run.final, s=40, color=colours[run.rate], zorder=2)
            if name == best:
                axes.scatter(run.rate, run.final, s=170, facecolors="none", edgecolors="k", zorder=3, label="best")
    axes.set_xticks(list(colours))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.15)
    axes.grid(alpha=0.25)
    if best is not None:
        axes.legend(frameon=False, fontsize=8)


def _of(runs: Mapping[str, Curve], kind: str, rate: float) -> list[float]:
    return [run.final for run in runs.values() if (run.kind, run.rate) == (kind, rate) and run.final is not None]


def smoothed(losses: Sequence[float]) -> np.ndarray:
    """The mean over each step and some before it, `plot.SPAN` of the run.

    Example:
      >>> smoothed([3.0, 1.0]).tolist()
      [3.0, 1.0]
    """
    width = max(1, round(SPAN * len(losses)))
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(losses, float))])
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)
