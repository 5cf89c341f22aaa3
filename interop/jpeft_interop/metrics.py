"""The figures of a run, a JSON object a line, so that anything can read them while it goes on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jpeft.atomic import write_text
from jpeft_interop.train import Metrics, Score

STEP, HELD_OUT, RANKS = "training", "held out", "ranks"


class MetricsLog:
    """`metrics.jsonl`: what each step told, and the held-out scores.

    Attributes:
      done: the number of the last step.
      losses: of step 1, 2 and so on.
      scores: on what is held out, by the number of steps done.

    Args:
      path: the file. Of an earlier run, what came after step `done` is dropped, since those steps come again.
      done: steps done.
      writes: whether to write, and read, the file. Of several processes one does.
      agreed: what all processes take for true, of what this one says.
    """

    def __init__(
        self, path: Path, done: int, *, writes: bool = True, agreed: Callable[[bool], bool] = lambda said: said
    ) -> None:
        self.path, self.done, self._writes, self._agreed = path, done, writes, agreed
        kept = [row for row in _rows(path) if row["step"] <= done] if done and writes else []
        self.losses: list[float] = [row["loss"] for row in kept if row["kind"] == STEP]
        self.scores = {
            row["step"]: Score(row["loss"], row["accuracy"], row["labels"]) for row in kept if row["kind"] == HELD_OUT
        }
        if not writes:
            return
        write_text(path, "".join(map(_line, kept)))  # at once: a process killed here loses none of it

    def step(self, metrics: Metrics) -> None:
        """Notes the next step."""
        self.done += 1
        values = {field.name: getattr(metrics, field.name) for field in dataclasses.fields(metrics)}
        figures = {name: value.item() for name, value in values.items() if value is not None}
        self.losses.append(figures["loss"])
        self._append({"kind": STEP, "step": self.done, **figures})

    def ranks(self, ranks: Mapping[str, Any]) -> None:
        """Notes the rank of each kernel after the last step."""
        self._append({"kind": RANKS, "step": self.done, "ranks": {path: one.tolist() for path, one in ranks.items()}})

    def held_out(self, step: int, score: Callable[[], Score | None]) -> None:
        """Notes the score after so many steps, unless it is noted already, or there is none."""
        found = None if self._agreed(step in self.scores) else score()
        if found is not None:
            self.scores[step] = found
            figures = {**dataclasses.asdict(found), "perplexity": found.perplexity}
            self._append({"kind": HELD_OUT, "step": step, **figures})

    def _append(self, row: dict[str, Any]) -> None:
        if not self._writes:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(row))


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def _rows(path: Path) -> list[dict[str, Any]]:
    """The lines that are whole: a process that dies may leave half of one."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
