"""The data of a run: a file of examples as rows, and what there is to say about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jpeft_interop import data
from jpeft_interop.base import CLASSIFICATION, TASKS
from jpeft_interop.run_settings import Settings
from jpeft_interop.tokenizer import Tokenizer

SHOWN, WIDTH = 10, 60  # fields, and characters of a name


@dataclass(frozen=True)
class Examples:
    """The data of a run, as rows.

    Attributes:
      rows: to learn from.
      held_out: to score on, if anything is held out.
      labels: of a classifier.
      truncated: how many texts were cut.
      learnt: by who says them, how many tokens are learnt and how many there are, of what is not held out.
      unused: the fields that nothing uses, and how many rows have them.
    """

    rows: data.Rows
    held_out: data.Rows | None
    labels: data.Labels | None = None
    truncated: int = 0
    learnt: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    unused: Mapping[str, int] = field(default_factory=dict)


def examples_for(file: str | Path, tokenizer: Tokenizer, settings: Settings) -> Examples:
    """Read a file, hold some of it out, and make rows of both parts.

    Raises:
      DataError: the file is broken, or there is nothing to learn in it.
      TokenizerError: it holds conversations, and the chat template can't tell what is learnt of them.
    """
    share, seed, length = settings.holdout, settings.seed, settings.seq_len
    if TASKS[settings.task] is CLASSIFICATION:
        texts = data.read_labelled(file)
        labels, (learnt, held_out) = data.labels_of(texts), data.split(texts, share, seed)
        rows = lambda part: data.padded(part, tokenizer, length, labels)
        cut = data.truncated(texts, tokenizer, length)
        unused = data.unused(dict.fromkeys(text.unused, False) for text in texts)
        return Examples(rows(learnt), rows(held_out) if held_out else None, labels, cut, unused=unused)
    lessons = [
        data.lesson(record, tokenizer, settings.train_on) for record in data.read(file, whole=settings.whole_txt)
    ]
    learnt, held_out = data.split(lessons, share, seed)
    rows = lambda part: data.blocks(part, tokenizer.eos, length)
    return Examples(
        rows(learnt),
        rows(held_out) if held_out else None,
        learnt=data.learnt_by_role(learnt),
        unused=data.unused(one.fields for one in lessons),
    )


def described(examples: Examples, steps: int, settings: Settings) -> str:
    """Say what is trained on: rows and steps in a line, and the tokens that are learnt in another."""
    held_out = data.size_of(examples.held_out) if examples.held_out else 0
    rows, length = examples.rows["input_ids"].shape
    cut = f", {examples.truncated} texts cut to {settings.seq_len} tokens" if examples.truncated else ""
    line = f"{rows} rows of {length} tokens, {held_out} held out{cut}; {steps} steps of {settings.batch_size} rows"
    return "\n".join([line, learnt_tokens(examples.learnt)] if examples.learnt else [line])


def learnt_tokens(learnt: Mapping[str, tuple[int, int]]) -> str:
    """Say how many tokens are learnt, by who says them."""
    return "tokens learnt: " + ", ".join(f"{name:.60} {taught:,} of {all:,}" for name, (taught, all) in learnt.items())


def unused_fields(unused: Mapping[str, int]) -> Iterator[str]:
    """Say which fields nothing uses, if there are any, and what to do about it."""
    names = [f"{name:.{WIDTH}} ({rows:,} {'row' if rows == 1 else 'rows'})" for name, rows in unused.items()]
    shown = ", ".join([*names[:SHOWN], f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else names)
    if names:
        yield f"without use: {shown}: nothing reads these fields, neither jpeft nor the model's chat template"
