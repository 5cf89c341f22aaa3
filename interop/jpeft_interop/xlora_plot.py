"""A mixture's scalings, as a picture: which expert acts where, for each kind of text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jpeft.atomic import write_file
from jpeft.xlora import Mixture, layers_of

TICKS = 12


def plot_scalings(path: str | Path, mixture: Mixture, scalings: Mapping[str, np.ndarray], title: str) -> None:
    """Writes a PNG: for each kind of text the mean scalings, layers by experts; grey where an expert has nothing.

    Args:
      path: the file.
      mixture: whose scalings they are.
      scalings: by the name of the text, (layers, K) as `jpeft.xlora.scalings` orders them.
      title: what it is of.
    """
    layers = [layer.path for layer in layers_of(mixture.experts) for _ in range(layer.size)]
    acts = np.array([[path in mixture.experts[name].trained for name in mixture.names] for path in layers])
    height = 1.2 + len(scalings) * (0.7 + 0.3 * len(mixture.names))
    figure = Figure(figsize=(10, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    panels = figure.subplots(len(scalings), 1, sharex=True, squeeze=False)[:, 0]
    top = max(1.0, *(float(np.abs(one).max()) for one in scalings.values()))
    for panel, (text, found) in zip(panels, scalings.items(), strict=True):
        panel.set_facecolor("0.85")
        shown = np.ma.masked_array(found.T, mask=~acts.T)
        image = panel.imshow(shown, aspect="auto", cmap="viridis", vmin=min(0.0, found.min()), vmax=top)
        panel.set_yticks(range(len(mixture.names)), mixture.names)
        panel.set_title(f"on {text}", loc="left", fontsize=10)
    places, names = _ticks(layers)
    panels[-1].set_xticks(places, names)
    panels[-1].set_xlabel("adapted weight, by block")
    figure.colorbar(image, ax=list(panels), label="mean scaling")  # pyright: ignore[reportPossiblyUnboundVariable]
    write_file(path, lambda new: figure.savefig(new, format="png"))


def _ticks(layers: list[str]) -> tuple[list[int], list[str]]:
    """The first weight of some blocks, and the blocks' numbers."""
    first: dict[str, int] = {}
    for place, path in enumerate(layers):
        if number := re.search(r"\d+", path):
            first.setdefault(number.group(), place)
    chosen = list(first.items())[:: max(1, -(-len(first) // TICKS))]
    return [place for _, place in chosen], [number for number, _ in chosen]
