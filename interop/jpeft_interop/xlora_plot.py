"""A mixture's scalings, as a picture: which expert acts where, for each kind of text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jpeft.atomic import write_file
from jpeft.tree import module_of
from jpeft.xlora import Mixture, layers_of

FIRST_NUMBER = re.compile(r"(.*?)(?<![^/_])(\d+)(?=/|$)(.*)")


def plot_scalings(path: str | Path, mixture: Mixture, scalings: Mapping[str, np.ndarray], title: str) -> None:
    """Writes a PNG: a map for each kind of text and expert, modules by blocks; white where the expert has nothing.

    Args:
      path: the file.
      mixture: whose scalings they are.
      scalings: by the name of the text, (layers, K) as `jpeft.xlora.scalings` orders them.
      title: what it is of.
    """
    layers = [layer.path for layer in layers_of(mixture.experts) for _ in range(layer.size)]
    places = [_place(path) for path in layers]
    kinds = list(dict.fromkeys(kind for kind, _ in places))
    blocks = 1 + max(block for _, block in places)
    rows, columns = len(scalings), len(mixture.names)
    figure = Figure(figsize=(2.5 + 3.5 * columns, 1 + rows * (0.8 + 0.25 * len(kinds))), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    extremes = [float(end) for one in scalings.values() for end in (one.min(), one.max())]
    span = {"vmin": min(0.0, *extremes), "vmax": max(1.0, *extremes)}
    for panel, (text, found, k) in zip(panels.flat, _each(scalings, columns), strict=True):
        acts = [path in mixture.experts[mixture.names[k]].trained for path in layers]
        grid = _grid(found[:, k], acts, places, kinds, blocks)
        image = panel.imshow(grid, aspect="auto", cmap="viridis", interpolation="nearest", **span)
        panel.set_title(f"expert {mixture.names[k]} on {text}", fontsize=10)
        panel.set_yticks(range(len(kinds)), [_short(kind) for kind in kinds])
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    for panel in panels[-1]:
        panel.set_xlabel("block")
    figure.colorbar(image, ax=panels, label="mean scaling")  # pyright: ignore[reportPossiblyUnboundVariable]
    write_file(path, lambda new: figure.savefig(new, format="png"))


def _each(scalings: Mapping[str, np.ndarray], experts: int) -> list[tuple[str, np.ndarray, int]]:
    return [(text, found, k) for text, found in scalings.items() for k in range(experts)]


def _place(path: str) -> tuple[str, int]:
    """The kind of module, and the number of its block: what stands around the first number in the path, and that."""
    found = FIRST_NUMBER.fullmatch(module_of(path))
    return (found[1] + "#" + found[3], int(found[2])) if found else (module_of(path), 0)


def _grid(
    values: np.ndarray, acts: list[bool], places: list[tuple[str, int]], kinds: list[str], blocks: int
) -> np.ndarray:
    """(kinds, blocks); NaN where nothing acts. Of several weights in one place, their mean."""
    total, count = np.zeros((2, len(kinds), blocks))
    for value, act, (kind, block) in zip(values, acts, places, strict=True):
        total[kinds.index(kind), block] += value * act
        count[kinds.index(kind), block] += act
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def _short(kind: str) -> str:
    """`model/layers/#/self_attn/q_proj` as `self_attn/q_proj`."""
    return kind.rpartition("#/")[2] or kind
