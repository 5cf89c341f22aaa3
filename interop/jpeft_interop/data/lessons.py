"""A record as ids, which of them are learnt, and what there is to say about it: tokens by role, fields without use."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from jpeft_interop.chat import Heard, hear, render
from jpeft_interop.chat_template import Span
from jpeft_interop.data.errors import DataError
from jpeft_interop.data.records import Conversation, Record
from jpeft_interop.tokenizer import Tokenizer, TokenizerError

ASSISTANT, ALL = "assistant", "all"
TRAIN_ON = (ASSISTANT, ALL)
DOCUMENTS, CONVERSATIONS, TEMPLATE = "documents", "conversations", "template"
Counts = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Lesson:
    """A record, tokenised.

    Attributes:
      ids: (n,), int32.
      learnt: (n,), whether each is learnt.
      where: the place it came from, as `file:line`.
      counts: by who says them, how many tokens are learnt and how many there are.
      fields: names of the row's fields beside its text, and whether the text would be another without each.
    """

    ids: np.ndarray
    learnt: np.ndarray
    where: str
    counts: Counts
    fields: Mapping[str, bool] = field(default_factory=dict)


def lesson(record: Record, tokenizer: Tokenizer, train_on: str = ASSISTANT) -> Lesson:
    """Tokenise a record: a document and its end-of-text token, or a conversation in the model's template.

    Args:
      record: what is learnt from.
      tokenizer: the model's.
      train_on: `assistant` learns the assistant's turns of a conversation, `all` every token.

    Raises:
      DataError: `train_on` is neither.
      TokenizerError: a conversation, and the template is missing, refuses it, or does not let one tell what the
        assistant says. Names the record's place.
    """
    if train_on not in TRAIN_ON:
        raise DataError(f"train_on: expected {' or '.join(TRAIN_ON)}; found {train_on!r}")
    if isinstance(record, Conversation):
        try:
            return _of_conversation(record, tokenizer, train_on)
        except TokenizerError as error:
            raise TokenizerError(f"{record.where}: {error}") from None
    ids = tokenizer.encode(record.text)
    ids = ids if len(ids) and ids[-1] == tokenizer.eos else np.append(ids, np.int32(tokenizer.eos))
    return _learnt_whole(ids, record.where, DOCUMENTS, dict.fromkeys(record.unused, False))


def _learnt_whole(ids: np.ndarray, where: str, name: str, fields: Mapping[str, bool]) -> Lesson:
    return Lesson(ids, np.ones(len(ids), bool), where, {name: (len(ids), len(ids))}, fields)


def _of_conversation(conversation: Conversation, tokenizer: Tokenizer, train_on: str) -> Lesson:
    turns = [message.turn for message in conversation.messages]
    given = {"tools": json.loads(conversation.tools), "documents": json.loads(conversation.documents)}
    if train_on == ALL:
        text = render(tokenizer, turns, **given)
        ids, _ = tokenizer.spans(text)
        return _learnt_whole(
            ids, conversation.where, CONVERSATIONS, _fields(conversation, tokenizer, turns, given, text)
        )
    heard = hear(tokenizer, turns, **given)
    ids, places = tokenizer.spans(heard.text)
    learnt, speakers = _who(heard, places)
    fields = _fields(conversation, tokenizer, turns, given, heard.text)
    return Lesson(ids, learnt, conversation.where, _counted(learnt, speakers), fields)


def _who(heard: Heard, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tell of each token whether it is learnt, and who says it.

    A token that lies partly in an assistant's turn is learnt, as in transformers: no character of the turn is left out.
    Where the turns are proven and not marked, one that holds a character of another role's is not.
    """
    learnt = np.zeros(len(places), bool)
    for span in heard.assistant:
        learnt |= _touches(places, span)
    speakers = np.full(len(places), TEMPLATE, object)
    speakers[learnt] = ASSISTANT
    for role, span in heard.contents:
        speakers[_touches(places, span)] = role
    return learnt if heard.marked else learnt & (speakers == ASSISTANT), speakers


def _touches(places: np.ndarray, span: Span) -> np.ndarray:
    return (places[:, 0] < span[1]) & (places[:, 1] > span[0])


def _counted(learnt: np.ndarray, speakers: np.ndarray) -> Counts:
    there, taught = Counter(speakers.tolist()), Counter(speakers[learnt].tolist())
    return {name: (taught[name], number) for name, number in there.items()}


def _fields(
    conversation: Conversation,
    tokenizer: Tokenizer,
    turns: Sequence[Mapping[str, Any]],
    given: Mapping[str, Any],
    text: str,
) -> dict[str, bool]:
    """Tell of each field of the row and its turns whether the text would be another without it."""
    idle = [*conversation.unused, *(f"messages[].{name}" for one in conversation.messages for name in one.unused)]
    own = {name: None for turn in turns for name, value in turn.items() if name not in ("role", "content") and value}
    without = {f"messages[].{name}": ([_less(turn, {name}) for turn in turns], given) for name in own}
    without |= {name: (turns, {**given, name: None}) for name, value in given.items() if value}
    same = partial(_same, tokenizer, text)
    bare = [_less(turn, set(own)) for turn in turns]
    none_used = bool(without) and same(bare, dict.fromkeys(given))
    used = {name: not (none_used or same(*one)) for name, one in without.items()}
    return dict.fromkeys(idle, False) | used


def _less(turn: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in turn.items() if name not in names}


def _same(tokenizer: Tokenizer, text: str, turns: Sequence[Mapping[str, Any]], given: Mapping[str, Any]) -> bool:
    try:
        return render(tokenizer, turns, **given) == text
    except TokenizerError:  # the template can't do without
        return False


def learnt_by_role(lessons: Iterable[Lesson]) -> dict[str, tuple[int, int]]:
    """Count the tokens that are learnt and those that there are by who says them, the template's own at the end."""
    taught, there = Counter[str](), Counter[str]()
    for one in lessons:
        taught.update({name: learnt for name, (learnt, _) in one.counts.items()})
        there.update({name: number for name, (_, number) in one.counts.items()})
    names = sorted(there, key=lambda name: (name == TEMPLATE, name != ASSISTANT))
    return {name: (taught[name], there[name]) for name in names}


def unused(fields: Iterable[Mapping[str, bool]]) -> dict[str, int]:
    """Count the rows that hold a field which is used in none of them."""
    rows, used = Counter[str](), set[str]()
    for one in fields:
        rows.update(one.keys())
        used |= {name for name, does in one.items() if does}
    return {name: number for name, number in rows.items() if name not in used}
