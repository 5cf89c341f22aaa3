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


def plot_ranks(path: str | Path, ranks: Mapping[str, np.ndarray], title: str) -> None:
    """Writes a PNG: the rank of each kernel, a row for each kind of kernel and a column for each layer.

    Args:
      path: the file.
      ranks: by path, a number, or one for each layer of a stack, as `jpeft.ranks` gives them.
      title: what it is of.
    """
    cells = {cell: rank for name, one in ranks.items() for cell, rank in _cells(name, np.asarray(one))}
    kinds = sorted({kind for kind, _ in cells})
    layers = sorted({layer for _, layer in cells})
    grid = np.full((len(kinds), len(layers)), np.nan)
    for (kind, layer), rank in cells.items():
        grid[kinds.index(kind), layers.index(layer)] = rank
    figure = Figure(figsize=(2.5 + max(3.0, 0.32 * len(layers)), 1.4 + 0.4 * len(kinds)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(title=title, xlabel="layer")
    image = axes.imshow(grid, cmap="viridis", aspect="auto", vmin=0)
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers], fontsize=7)
    axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
    for (row, column), rank in np.ndenumerate(grid):
        if not np.isnan(rank):
            light = rank < 0.6 * np.nanmax(grid)
            axes.text(column, row, f"{rank:g}", ha="center", va="center", fontsize=6, color="w" if light else "k")
    figure.colorbar(image, label="rank", ticks=MaxNLocator(integer=True))
    write_file(path, lambda new: figure.savefig(new, format="png"))


def _cells(path: str, ranks: np.ndarray) -> list[tuple[tuple[str, int], float]]:
    """The kind and the layer of a kernel: `layers/3/mlp/up_proj/kernel` is `mlp/up_proj` of layer 3."""
    parts = path.split("/")[:-1]
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if number is not None:
        return [(("/".join(parts[number + 1 :]), int(parts[number])), float(ranks))]
    return [(("/".join(parts), layer), float(rank)) for layer, rank in enumerate(ranks.ravel())]


def _smoothed(losses: Sequence[float]) -> np.ndarray:
    """Each step's mean over what lies behind it."""
    width = max(1, round(SPAN * len(losses)))
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(losses, float))])
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)
