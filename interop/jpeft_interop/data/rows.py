"""Examples as rows of ids, all of one length: packed blocks for a language model, padded texts for a classifier.

Rows are plain dicts of NumPy arrays whose first axis is the row: `input_ids`, `labels` and, where rows are padded,
`attention_mask`. A label is what the model should say at its place: `labels[:, t]` follows `input_ids[:, t]`, so
nothing is left to shift in a loss. `IGNORE` marks what is not learnt.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from jpeft_interop.data.errors import DataError
from jpeft_interop.data.labels import Labels
from jpeft_interop.data.lessons import ASSISTANT, Lesson, lesson
from jpeft_interop.data.records import Labelled, Record
from jpeft_interop.tokenizer import Tokenizer

IGNORE = -100
Rows = dict[str, np.ndarray]


def packed(records: Sequence[Record], tokenizer: Tokenizer, length: int, *, train_on: str = ASSISTANT) -> Rows:
    """Documents and conversations, one after the other, cut into blocks of `length` tokens.

    A document ends with the end-of-text token. Of a conversation the assistant's turns are learnt. Every token but the
    first of all is a label once; the last block is filled up with the end-of-text token, unlearnt.

    Args:
      records: at least one.
      tokenizer: the model's.
      length: tokens in a block.
      train_on: `assistant`, or `all` to learn every token of a conversation.

    Returns:
      `input_ids` and `labels`, int32, (blocks, length).

    Raises:
      DataError: there is nothing to learn in the records.
      TokenizerError: conversations, and no chat template, or one that does not let one tell what the assistant says.
    """
    lessons = [lesson(record, tokenizer, train_on) for record in records]
    return blocks(lessons, tokenizer.eos, length)


def blocks(lessons: Sequence[Lesson], eos: int, length: int) -> Rows:
    """Cut what `packed` cuts, already tokenised.

    Args:
      lessons: at least one.
      eos: the end-of-text token.
      length: tokens in a block.

    Raises:
      DataError: there is nothing to learn in them.
    """
    ids, learnt = (np.concatenate(parts) for parts in zip(*((one.ids, one.learnt) for one in lessons), strict=True))
    labels = np.where(learnt, ids, IGNORE)[1:]
    count = -(-len(labels) // length)
    fill = lambda row, value: np.pad(row, (0, count * length - len(row)), constant_values=value).reshape(count, length)
    rows = {"input_ids": fill(ids[:-1], eos), "labels": fill(labels, IGNORE)}
    kept = (rows["labels"] != IGNORE).any(axis=1)  # a block that teaches nothing would be a step without a gradient
    if not kept.any():
        raise DataError(f"{lessons[0].where} and {len(lessons) - 1} more examples hold nothing to learn")
    return {name: array[kept] for name, array in rows.items()}


def padded(records: Sequence[Labelled], tokenizer: Tokenizer, length: int, labels: Labels) -> Rows:
    """Labelled texts, each cut to `length` tokens and filled up on the right.

    Returns:
      `input_ids` and `attention_mask` (texts, longest), `labels` (texts,), all int32; `longest` is at most `length`.
    """
    texts = [_cut(tokenizer.encode(record.text), length) for record in records]
    columns = zip(*itertools.zip_longest(*texts, fillvalue=tokenizer.pad), strict=True)
    ids = np.asarray(list(columns), np.int32)
    mask = np.arange(ids.shape[1]) < np.asarray([len(text) for text in texts])[:, None]
    classes = [labels.id_of(record.label, record.where) for record in records]
    return {"input_ids": ids, "attention_mask": mask.astype(np.int32), "labels": np.asarray(classes, np.int32)}


def _cut(ids: np.ndarray, length: int) -> np.ndarray:
    """The first `length` ids; the last of all stays, since it is what closes a text (`[SEP]`)."""
    return ids if len(ids) <= length else np.append(ids[: length - 1], ids[-1])


def truncated(records: Sequence[Labelled], tokenizer: Tokenizer, length: int) -> int:
    """How many of the texts `padded` cuts."""
    return sum(len(tokenizer.encode(record.text)) > length for record in records)


def size_of(rows: Mapping[str, np.ndarray]) -> int:
    """The number of rows."""
    return len(rows["input_ids"])
