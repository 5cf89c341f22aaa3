"""A bar for what takes more than a moment."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from jpeft_interop.infer.seen import Seen

PATIENCE = 1.0  # seconds, before anything is shown


@contextmanager
def watched(total: int, *, show: bool) -> Iterator[Callable[[Seen], None]]:
    """What to call with each array that is done; `total` is the sum of their sizes. Shown in a terminal only."""
    console = Console(stderr=True)
    columns = (TextColumn("Matching weights"), BarColumn(bar_width=None), TaskProgressColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, expand=True, transient=True, disable=not (show and console.is_terminal))
    task, begun, shown = bar.add_task("", total=total), time.monotonic(), False

    def tick(array: Seen) -> None:
        nonlocal shown
        bar.advance(task, array.size)
        if not shown and time.monotonic() - begun > PATIENCE:
            bar.start()
            shown = True

    try:
        yield tick
    finally:
        bar.stop()
