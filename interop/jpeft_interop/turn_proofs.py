"""Which characters of a conversation's text an assistant's turn is, proven from other renderings of it.

A turn's content is replaced by a word that stands nowhere else. What comes before and after the word is what the
template makes of everything but this content; the text itself has to begin and end the same, and what lies between is
the turn's. The turn begins where the words that open it (`add_generation_prompt`) end, and it ends with what follows
its content whether the conversation goes on or not. Each of the two is shown by renderings, never taken for granted: a
template that drops earlier thoughts, moves the system prompt or writes something at the end of the text passes, one
whose turns can't be told apart is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from jpeft_interop.chat_renderings import Proof, Replace, in_call, in_content
from jpeft_interop.chat_template import Span, Turn
from jpeft_interop.tokenizer import TokenizerError

ASSISTANT, USER = "assistant", "user"


def proven(proof: Proof, number: int, others: Sequence[Span]) -> Span:
    """Find the characters that an assistant's turn is, its end-of-turn mark included; (0, 0) if it is not in the text.

    Args:
      proof: of which conversation.
      number: of the turn.
      others: where the words of other roles lie; none of them is the assistant's.

    Raises:
      TokenizerError: that can't be told.
    """
    spoken = bool(proof.messages[number].get("content"))
    order = (in_content, in_call) if spoken else (in_call, in_content)
    spans = itertools.chain(
        *(_between(proof, number, replace) for replace in order), _grown(proof, number), _absent(proof, number)
    )
    alone = (span for span in spans if not any(start < span[1] and span[0] < end for start, end in others))
    if (span := next(alone, None)) is not None:
        return span
    raise TokenizerError(
        f"{proof.tokenizer.folder}: the chat template does not let one tell which characters of the text are message "
        f"{number + 1}, an assistant's turn; learn every token with --train-on all, or mark the assistant's words in "
        "the template with {% generation %} and {% endgeneration %}"
    )


def _between(proof: Proof, number: int, replace: Replace) -> Iterator[Span]:
    """Prove a turn by what stands around the word that takes the place of its content."""
    whole = proof.around(proof.messages, number, replace)
    alone = proof.around(proof.messages[: number + 1], number, replace)
    if whole is None or alone is None or not proof.text.endswith(whole[1]):
        return
    end = _ending(proof, number, replace, whole[1], alone[1])
    stop = len(proof.text) - len(whole[1])
    if end is not None:
        yield from ((start, stop + len(end)) for start in _starts(proof, number, replace, whole[0], alone[0], stop))


def _starts(proof: Proof, number: int, replace: Replace, head: str, alone: str, stop: int) -> Iterator[int]:
    """Find where a turn begins: after the words that open it, or, where they are not in the text, with its content.

    Args:
      proof: of which conversation.
      number: of the turn.
      replace: what puts the word into it.
      head: what comes before the word.
      alone: what comes before it where the turn is the last one. What the template writes between the opening words and
        the content is the turn's if it stands there without the later turns, too, or follows on the turn before.
      stop: where the content ends.
    """
    before = proof.tried(proof.messages[:number], prompt=True)
    if before is not None and proof.text.startswith(before) and len(before) <= stop:
        own = head == before or (head.startswith(before) and alone.startswith(head))
        if own or before.startswith(head):
            yield len(before)
    starts = [len(head) - gap for gap in _gap(proof, number, replace)]
    if replace is in_content and _begins_with_content(proof, number, head):
        starts.append(len(head))
    yield from (start for start in starts if start <= stop and proof.text.startswith(head[:start]))


def _begins_with_content(proof: Proof, number: int, head: str) -> bool:
    """Tell whether no other field of the turn, a thought or a call, is written before its content."""
    bare = {name: value for name, value in proof.messages[number].items() if name in ("role", "content")}
    if len(bare) == len(proof.messages[number]):
        return True
    around = proof.around([*proof.messages[:number], bare, *proof.messages[number + 1 :]], number, in_content)
    return around is not None and around[0] == head


def _gap(proof: Proof, number: int, replace: Replace) -> Iterator[int]:
    """Count the characters between the words that open a turn and its content, as they follow on the turn before.

    Earlier turns may be written in another way where the conversation goes on; what follows on the last of them is not.
    """
    if not number:
        return
    earlier = [*proof.messages[: number - 1], in_content(proof.messages[number - 1], proof.other)]
    asked = (proof.tried(earlier, prompt=True) or "").split(proof.other)
    around = proof.around([*earlier, *proof.messages[number:]], number, replace)
    written = around[0].split(proof.other) if around else []
    if len(asked) == len(written) == 2 and written[1].startswith(asked[1]):
        yield len(written[1]) - len(asked[1])


def _ending(proof: Proof, number: int, replace: Replace, tail: str, alone: str) -> str | None:
    """Find what ends a turn.

    Args:
      proof: of which conversation.
      number: of the turn.
      replace: what puts the word into it.
      tail: what follows the word.
      alone: what follows it where the turn is the last one.
    """
    last = number + 1 == len(proof.messages)
    if last and _nothing_trails(proof, number):
        return tail
    longer = [*proof.messages, {"role": USER, "content": proof.other}] if last else proof.messages
    going_on = (proof.around(longer, number, replace) or ("", None))[1] if last else tail
    if going_on is not None and going_on.startswith(alone):
        return alone
    for found in (
        _up_to_the_prompt(proof, number, replace),
        _up_to_the_next(proof, longer, number, replace, alone),
        _up_to_the_eos(proof, alone, going_on),
    ):
        if found and tail.startswith(found) and (going_on is None or going_on.startswith(found)):
            closed = last and tail.startswith(found + proof.eos)
            return found + proof.eos if closed else found
    if not last and proof.messages[number + 1]["role"] == ASSISTANT and not proof.shared(alone, tail):
        return ""  # two answers are one turn in the text: the first has no end of its own
    return None


def _nothing_trails(proof: Proof, number: int) -> bool:
    """Tell whether all that closes the text before the assistant speaks stays where it is when it has spoken."""
    spoken_to = _without_answers(proof, number)
    before = proof.tried(spoken_to) if spoken_to else None
    return before is not None and proof.text.startswith(before)


def _without_answers(proof: Proof, number: int) -> Sequence[Turn]:
    """Give the turns up to the last one before this that is not the assistant's."""
    others = [at + 1 for at in range(number) if proof.messages[at]["role"] != ASSISTANT]
    return proof.messages[: max(others, default=0)]


def _up_to_the_prompt(proof: Proof, number: int, replace: Replace) -> str | None:
    """Take the words that open another turn off what follows this one when they are asked for."""
    silent, asked = (proof.tried(_without_answers(proof, number), prompt=prompt) for prompt in (False, True))
    opened = proof.around(proof.messages[: number + 1], number, replace, prompt=True)
    if silent is None or asked is None or opened is None or not asked.startswith(silent):
        return None
    words = asked[len(silent) :]
    return opened[1].removesuffix(words) if words and opened[1].endswith(words) else None


def _up_to_the_next(proof: Proof, longer: Sequence[Turn], number: int, replace: Replace, alone: str) -> str | None:
    """Take what opens the next turn, known from a text that begins with it, off what lies between the two."""
    following = in_content(longer[number + 1], proof.other)
    pair = [*longer[: number + 1], following, *longer[number + 2 :]]
    around, first = proof.around(pair, number, replace), proof.tried([following])
    if around is None or first is None or proof.other not in around[1] or proof.other not in first:
        return None
    between, opening = around[1].split(proof.other)[0], first.split(proof.other)[0]
    found = between.removesuffix(proof.shared_end(between, opening))
    return found if alone.startswith(found) else None


def _up_to_the_eos(proof: Proof, alone: str, going_on: str | None) -> str | None:
    """Give what follows the turn in any case, if nothing but the end-of-text token comes after it at the end."""
    shared = proof.shared(alone, going_on or "")
    return shared if proof.eos and alone == shared + proof.eos else None


def _grown(proof: Proof, number: int) -> Iterator[Span]:
    """Prove a turn by texts that grow: up to its opening words, past it, and on."""
    before, past = proof.tried(proof.messages[:number], prompt=True), proof.tried(proof.messages[: number + 1])
    longer = [*proof.messages, {"role": USER, "content": proof.other}]
    whole = proof.tried(longer) if number + 1 == len(proof.messages) else proof.text
    if before is None or past is None or whole is None:
        return
    if past.startswith(before) and whole.startswith(past):
        yield len(before), len(past)


def _absent(proof: Proof, number: int) -> Iterator[Span]:
    """Prove that a turn is not in the text at all: without it, it is the same."""
    without = [*proof.messages[:number], *proof.messages[number + 1 :]]
    if without and proof.tried(without) == proof.text:
        yield 0, 0
