"""A live line while training goes on: how far, the loss, tokens a second, time left."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from jpeft.errors import JpeftError
from jpeft_interop.train import Metrics, S

SMOOTHING = 0.9


class TrainingError(JpeftError):
    """Training went somewhere it can't come back from: a loss that is not finite."""


def watched(
    steps: Iterable[tuple[S, Metrics]], total: int, console: Console, *, done: int = 0
) -> Iterator[tuple[S, Metrics]]:
    """The same steps, their metrics as numbers, shown as they come; ends after `total`.

    Metrics are waited for, so the time of a step is the time it took. The first step, which is compiled, does not count
    towards the speed.

    Args:
      steps: of `train.run`.
      total: the number of the last step.
      console: where to show them. One that is no terminal gets a line every tenth of the way.
      done: steps done before.

    Raises:
      TrainingError: a loss is not finite.
    """
    if done >= total:
        return
    line = _Line(total, done, console)
    with line.progress:
        for number, (state, metrics) in zip(range(done + 1, total + 1), steps, strict=False):
            metrics = jax.device_get(metrics)
            if not math.isfinite(metrics.loss):
                raise TrainingError(
                    f"step {number}: the loss is {metrics.loss}; lower the learning rate, or look at the data"
                )
            rank = None if metrics.rank is None else int(metrics.rank)
            line.show(number, float(metrics.loss), int(metrics.tokens), rank)
            yield state, metrics


class _Line:
    """What is shown, and the clock behind it."""

    def __init__(self, total: int, done: int, console: Console) -> None:
        self.progress = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("Training", total=total, completed=done, figures="compiling the step …")
        self.console, self.total, self.first = console, total, done + 1
        self.loss, self.tokens, self.begun = 0.0, 0, 0.0

    def show(self, number: int, loss: float, tokens: int, rank: int | None) -> None:
        if number == self.first:
            self.loss, self.begun = loss, time.monotonic()
        else:
            self.loss = SMOOTHING * self.loss + (1 - SMOOTHING) * loss
            self.tokens += tokens
        figures = self.figures(number) + (f"  {rank} ranks" if rank is not None else "")
        self.progress.update(self.task, completed=number, figures=figures)
        if not self.console.is_terminal and (number == self.total or number % max(1, self.total // 10) == 0):
            self.console.print(f"step {number}/{self.total}  {figures}", highlight=False)

    def figures(self, number: int) -> str:
        loss = f"loss {self.loss:.3f}"
        if not self.tokens:
            return loss
        elapsed = max(time.monotonic() - self.begun, 1e-9)
        left = elapsed / (number - self.first) * (self.total - number)
        return f"{loss}  {self.tokens / elapsed:,.0f} tokens/s  {_clock(left)} left"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
