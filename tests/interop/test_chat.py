"""What is learnt of a conversation: by the template's own marks as in transformers, else by proof, else not at all."""

import dataclasses
import json
import pickle
import re
from pathlib import Path
from random import Random

import numpy as np
import pytest
from transformers import AutoTokenizer

from jpeft_interop import data
from jpeft_interop.chat import render, with_spans
from jpeft_interop.data.read import parse
from jpeft_interop.tokenizer import TokenizerError, load_tokenizer
from tiny_folder import write_tokenizer

TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
FOR, END = "{% for m in messages %}", "{% endfor %}"
THOUGHT = """
{%- set at = namespace(user=-1) %}
{%- for m in messages if m.role == 'user' %}{% set at.user = messages.index(m) %}{% endfor %}
{%- for m in messages %}
    {%- set words = (m.content or '').split('</think>') %}
    {{- '<|im_start|>' + m.role + '\n' }}
    {%- if m.role == 'assistant' and loop.last %}
        {{- '<think>\n' + (words[0].split('<think>')[-1].strip() if words | length > 1 else '') + '\n</think>\n\n' }}
    {%- endif %}
    {{- words[-1].strip() + '<|im_end|>\n' }}
{%- endfor %}
"""
LAST_SYSTEM = """
{%- set system = messages[0].content + '; ' if messages[0].role == 'system' else '' %}
{%- for m in messages if m.role != 'system' %}
    {%- if m.role == 'user' %}{{- '[INST] ' + (system if loop.revindex <= 2 else '') + m.content + '[/INST]' }}
    {%- else %}{{- ' ' + m.content | trim + eos_token }}{% endif %}
{%- endfor %}
"""
MERGED = """
{%- for m in messages %}
    {{- '\n' if loop.previtem is defined and loop.previtem.role == m.role else '<' + m.role + '>' }}
    {{- m.content }}
    {{- '' if loop.nextitem is defined and loop.nextitem.role == m.role else '<|end|>' }}
{%- endfor %}
{{- '<assistant>' if add_generation_prompt }}
"""
TEMPLATES = {
    "grows": FOR + TURN + END + ASK,
    "a thought in the last turn": THOUGHT + ASK,
    "and an opening that thinks": THOUGHT + ASK.replace("{% endif", "<think>\n{% endif"),
    "the system prompt in the last user turn": LAST_SYSTEM,
    "answers in succession are one": MERGED,
    "the end of the text": "<s>" + FOR + TURN + END + ASK.replace("{% endif", "{% else %}{{ eos_token }}{% endif"),
    "words at the end": FOR + TURN + END + "That was all.\n" + ASK,
    "words at the end, but for the prompt": FOR + TURN + END + ASK.replace("{% endif", "{% else %}Bye{% endif"),
    "another end of the last turn": FOR.replace("%}", "-%}")
    + "<|start|>{{ m.role }}:{{ m.content }}"
    + "{{ '<|return|>' if m.role == 'assistant' and loop.last and not add_generation_prompt else '<|stop|>' }}"
    + END
    + "{{ '<|start|>assistant:' if add_generation_prompt }}",
    "only the last answer": FOR + "{% if m.role != 'assistant' or loop.last %}" + TURN + "{% endif %}" + END + ASK,
    "users first": "{% for m in messages if m.role == 'user' %}U {{ m.content }}<|end|>{% endfor %}"
    + "{% for m in messages if m.role == 'assistant' %}A {{ m.content }}<|end|>{% endfor %}",
}


def said(role):
    return lambda content, **more: {"role": role, "content": content, **more}


system, user, assistant = map(said, ("system", "user", "assistant"))
THINKS = "<think>\nhm\n</think>\n\nyes"
LEARNT = [
    ("grows", [user("yes"), assistant("yes"), user("yes"), assistant("yes")], ["yes<|im_end|>\n"] * 2),
    ("grows", [user("a"), assistant(""), user("b"), assistant(" \n")], ["<|im_end|>\n", " \n<|im_end|>\n"]),
    ("grows", [assistant("hello"), user("a"), assistant("b")], ["hello<|im_end|>\n", "b<|im_end|>\n"]),
    (
        "a thought in the last turn",
        [user("a"), assistant(THINKS), user("b"), assistant(THINKS)],
        ["yes<|im_end|>\n", THINKS + "<|im_end|>\n"],
    ),
    (
        "a thought in the last turn",
        [system("be"), user("a"), assistant(" yes "), user("yes"), assistant("yes")],
        ["yes<|im_end|>\n", "<think>\n\n</think>\n\nyes<|im_end|>\n"],
    ),
    (
        "and an opening that thinks",
        [user("a"), assistant(THINKS), user("b"), assistant(THINKS)],
        ["yes<|im_end|>\n", "hm\n</think>\n\nyes<|im_end|>\n"],
    ),
    (
        "the system prompt in the last user turn",
        [system("be"), user("yes"), assistant("yes"), user("yes"), assistant(" yes ")],
        [" yes<|end|>", " yes<|end|>"],
    ),
    (
        "answers in succession are one",
        [user("a"), assistant("one"), assistant("two"), user("b"), assistant("yes")],
        ["one", "two<|end|>", "yes<|end|>"],
    ),
    ("the end of the text", [user("a"), assistant("one"), user("b"), assistant("one")], ["one<|im_end|>\n"] * 2),
    ("words at the end", [user("a"), assistant("one"), user("b"), assistant("one")], ["one<|im_end|>\n"] * 2),
    (
        "words at the end, but for the prompt",
        [user("a"), assistant("one"), user("b"), assistant("one")],
        ["one<|im_end|>\n"] * 2,
    ),
    (
        "another end of the last turn",
        [user("a"), assistant("one"), assistant("two"), user("b"), assistant("one")],
        ["one<|stop|>", "two<|stop|>", "one<|return|>"],
    ),
    (
        "another end of the last turn",
        [user("a"), assistant("one"), assistant("two")],
        ["one<|stop|>", "two<|return|>"],
    ),
    ("only the last answer", [user("a"), assistant("one"), user("one"), assistant("two")], ["", "two<|im_end|>\n"]),
    ("users first", [user("a"), assistant("one"), user("one"), assistant("two")], ["one<|end|>", "A two<|end|>"]),
]


def with_template(folder, template):
    return load_tokenizer(write_tokenizer(folder, chat_template=template))


@pytest.mark.parametrize(("name", "turns", "expected"), LEARNT)
def test_what_the_assistant_says_is_proven(name, turns, expected, tmp_path):
    text, spans = with_spans(with_template(tmp_path, TEMPLATES[name]), turns)
    found = [text[start:end] for start, end in spans]
    if name == "the end of the text":  # is learnt where it follows the last turn
        expected = [*expected[:-1], expected[-1] + "<|end|>"]
    assert found == expected
    assert all(one[1] <= other[0] for one, other in zip(spans, spans[1:], strict=False) if one[1])


PIECES = [
    "",
    "yes",
    " ",
    "\n",
    "<|im_end|>\n",
    "<|im_start|>assistant\n",
    "<|end|>",
    "[/INST]",
    "<|stop|>",
    "A ",
    "{{ m }}",
]


def random_talk(draw):
    """A conversation that says what its template says; the assistant's words hold `A#`, all others' `U#`."""
    roles = ["system"] if draw.random() < 0.3 else []
    for _ in range(draw.randint(1, 3)):
        roles += ["user", *["assistant"] * draw.choice([1, 1, 1, 2])]
    word = lambda role: draw.choice(PIECES) + ("A#" if role == "assistant" else "U#") + draw.choice(PIECES)
    return [{"role": role, "content": word(role)} for role in roles]


@pytest.mark.parametrize("name", TEMPLATES)
def test_nothing_but_the_assistants_words_is_ever_learnt(name, seed, tmp_path):
    tokenizer, draw = with_template(tmp_path, TEMPLATES[name]), Random(seed)
    for _ in range(20):
        text, spans = with_spans(tokenizer, talk := random_talk(draw))
        inside = np.zeros(len(text), bool)
        for start, end in spans:
            inside[start:end] = True
        for found in re.finditer("[AU]#", text):
            assert (inside[found.start() : found.end()] == (found[0] == "A#")).all(), (talk, text, spans)


HIDES = FOR + "{{ m.content if m.role == 'user' or loop.last else '' }}<|end|>" + END
TWICE = FOR + TURN + END + "{{ messages[-1].content }}"
UNCLEAR = {"hides": HIDES, "says it twice": TWICE}
TALK = [user("zyx"), assistant("no"), user("b"), assistant("dog")]


def read(*rows):
    return parse("\n".join(map(json.dumps, rows)).encode(), Path("f.jsonl"))


def learnt(rows, tokenizer):
    return tokenizer.decode(rows["labels"][rows["labels"] != data.IGNORE], special=True)


@pytest.mark.parametrize("name", UNCLEAR)
def test_what_cannot_be_told_is_an_error_unless_all_is_learnt(name, tmp_path):
    tokenizer = with_template(tmp_path, UNCLEAR[name])
    talks = read({"messages": [user("a")]}, {"messages": TALK})
    with pytest.raises(TokenizerError, match=r"f\.jsonl:2: .*message [24].*--train-on all"):
        data.packed(talks, tokenizer, 64)
    rows = data.packed(talks[1:], tokenizer, 64, train_on="all")
    assert learnt(rows, tokenizer) == render(tokenizer, TALK)[1:]  # the first token follows nothing


def test_a_choice_that_is_none_is_refused(tmp_path):
    with pytest.raises(data.DataError, match="expected assistant or all; found 'al'"):
        data.packed(read({"messages": TALK}), with_template(tmp_path, TEMPLATES["grows"]), 64, train_on="al")


def test_a_template_that_needs_todays_date_is_told_of(tmp_path):
    dated = "{{ strftime_now('%d') if strftime_now is defined else '1' }}" + TEMPLATES["grows"]
    assert render(with_template(tmp_path / "falls back", dated), TALK).startswith("1<|im_start|>")
    with pytest.raises(TokenizerError, match="write a date into it"):
        render(with_template(tmp_path / "does not", "{{ strftime_now('%d') }}"), TALK)


MARKED = """
{%- for m in messages %}
    {{- '<|' + m.role + '|>' }}
    {%- if m.role == 'assistant' %}
        {%- generation %}{% set said = m.content %}{{ said | trim + eos_token }}{% endgeneration %}
    {%- else %}{{ m.content + '<|end|>' }}{% endif %}
{%- endfor %}
{{- messages | length }} turns
"""
SMOLLM2 = """
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\n' }}
    {%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
    {%- else %}{{ m.content + '<|im_end|>' }}{% endif %}
    {{- '\n' }}
{%- endfor %}
"""
TALKS = [
    [user("yes"), assistant("yes"), user("yes"), assistant(" the cat ")],
    [system("be a cat"), user("\n"), assistant("\n\nno\n"), user("hm"), assistant("hm"), assistant("é\n")],
    [user("nobody answers")],
]


def masks(folder, template, turns):
    """Ids and what is learnt of them, ours and transformers'."""
    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.chat_template = template
    expected = theirs.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    ours = dataclasses.replace(load_tokenizer(folder), chat_template=template)
    found = data.lesson(read({"messages": turns})[0], ours)
    return (found.ids.tolist(), found.learnt.astype(int).tolist()), (expected["input_ids"], expected["assistant_masks"])


@pytest.mark.parametrize("turns", TALKS)
def test_marks_of_the_template_are_transformers_token_by_token(turns, tmp_path):
    ours, theirs = masks(write_tokenizer(tmp_path), MARKED, turns)
    assert ours == theirs and any(ours[1]) == any(turn["role"] == "assistant" for turn in turns)


@pytest.mark.parametrize("turns", TALKS)
def test_marks_on_a_real_tokenizer_are_transformers(turns, smollm2_folder):
    ours, theirs = masks(smollm2_folder, SMOLLM2, turns)
    assert ours == theirs and any(ours[1]) == any(turn["role"] == "assistant" for turn in turns)


def test_the_mark_of_a_turn_that_straddles_a_token_is_transformers(smollm2_folder):
    """The blank of the opening words is of one token with the answer's first word, which is learnt."""
    template = FOR + "{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}\n\n" + END
    ours, theirs = masks(smollm2_folder, template, [assistant("Yes\n"), assistant("No")])
    assert ours == theirs
    unmarked = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    unmarked += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = dataclasses.replace(load_tokenizer(smollm2_folder), chat_template=unmarked)
    found = data.lesson(read({"messages": [user("hi"), assistant("Yes")]})[0], tokenizer)
    assert tokenizer.decode(found.ids[found.learnt]) == " Yes\n\n"


def test_a_proof_is_what_the_template_would_mark(smollm2_folder):
    """SmolLM2's own template, and one that says the same and marks what it says for the assistant."""
    tokenizer = load_tokenizer(smollm2_folder)
    marks = SMOLLM2.replace("<|im_end|>' }}{% endgen", "<|im_end|>\n' }}{% endgen").replace(
        "{{- '\n' }}", "{{- '\n' if m.role != 'assistant' }}"
    )
    turns = [system("Be brief."), user("Yes?"), assistant("Yes\n\n"), user("é"), assistant("Yes")]
    ours, theirs = masks(smollm2_folder, marks, turns)
    proven = data.lesson(read({"messages": turns})[0], tokenizer)
    assert ours == theirs == (proven.ids.tolist(), proven.learnt.astype(int).tolist())
    counts = {name: proven.counts[name] for name in ("system", "user")}
    assert counts == {"system": (0, 3), "user": (0, 3)} and proven.counts["assistant"] == (sum(ours[1]),) * 2


def test_marks_in_what_the_template_changes_afterwards_are_refused(tmp_path):
    changed = "{% set t %}{% generation %}{{ messages[0].content }} {% endgeneration %}{% endset %}{{ t | trim }}"
    with pytest.raises(TokenizerError, match="changes what stands in its"):
        with_spans(with_template(tmp_path, changed), [assistant("a")])


CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "é", "n": [1, None]}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALLS = [
    user("what?"),
    assistant(None, tool_calls=[CALL], weight=None),
    {"role": "tool", "name": "look", "tool_call_id": "c1", "content": "a cat"},
    {"content": "a cat", "role": "assistant", "reasoning": "it said so"},
]
TOOLS = """
{%- if tools %}{{ 'Tools: ' + tools | tojson(indent=1) + '\n' }}{% endif %}
{%- for d in documents or [] %}{{ d.title + ': ' + d.text + '\n' }}{% endfor %}
{%- for m in messages %}
    {{- '<' + m.role + '>' + (m.name or '') + (m.tool_call_id or '') + (m.reasoning_content or '') }}
    {%- if m.content is string %}{{ m.content }}{% elif m.content is defined %}
        {%- for part in m.content %}{{ part.text }}{% endfor %}{% endif %}
    {%- for call in m.tool_calls or [] %}{{ '[' + call.function | tojson + ']' }}{% endfor %}
    {{- '<|end|>' }}
{%- endfor %}
{{- '<assistant>' if add_generation_prompt }}
"""
WHOLE = FOR + "{{ m | tojson }}" + END + "{{ 'tools' if tools is defined else 'none' }}"
GIVEN = {"tools": [TOOL], "documents": [{"title": "a", "text": "b"}]}


@pytest.mark.parametrize("template", [TOOLS, WHOLE, {"default": FOR + TURN + END, "tool_use": TOOLS}])
@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_all_fields_reach_the_template_as_in_transformers(template, as_text, tmp_path):
    named = [{"name": n, "template": t} for n, t in template.items()] if isinstance(template, dict) else template
    folder = write_tokenizer(tmp_path, chat_template=named)
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(CALLS, tokenize=False, **GIVEN)
    given = {name: json.dumps(value) if as_text else value for name, value in GIVEN.items()}
    talk = read({"messages": CALLS, **given})[0]
    found = data.lesson(talk, load_tokenizer(folder), "all")
    assert load_tokenizer(folder).decode(found.ids, special=True) == expected
    assert hash(talk) == hash(pickle.loads(pickle.dumps(talk))) and pickle.loads(pickle.dumps(talk)) == talk


def test_a_call_is_learnt_and_its_answer_is_not(tmp_path):
    tokenizer = with_template(tmp_path, TOOLS)
    parts = [{"type": "text", "text": "it "}, {"type": "text", "text": "is"}]
    talk = read({"messages": [*CALLS, user(parts), assistant(parts)], **GIVEN})[0]
    found = data.lesson(talk, tokenizer)
    call = json.dumps(CALL["function"], ensure_ascii=False)
    assert tokenizer.decode(found.ids[found.learnt], special=True) == (
        f"[{call}]<|end|>it said soa cat<|end|>it is<|end|>"
    )
    assert found.counts["tool"][0] == found.counts["user"][0] == 0 < found.counts["tool"][1]
    assert data.unused([found.fields]) == {}


def test_fields_that_nothing_uses_are_counted(tmp_path):
    tokenizer = with_template(tmp_path, FOR + TURN + END + ASK)
    turns = [user("a"), assistant("b", weight=1, tool_calls=[CALL], name=None)]
    part = {"type": "text", "text": "a", "cache": 1}
    rows = [
        {"messages": turns, "id": 0, **GIVEN, "source": ""},
        {"messages": turns[:1] + [assistant("b", weight=0.5)], "id": 1},
        {"text": "a", "id": 2, "score": 0},
    ]
    found = data.unused(data.lesson(record, tokenizer).fields for record in read(*rows))
    assert found == {
        **{"id": 3, "messages[].weight": 2, "messages[].tool_calls": 1, "tools": 1, "documents": 1, "score": 1}
    }
    listed = with_template(tmp_path / "parts", TOOLS)
    lesson = data.lesson(read({"messages": [user([part]), assistant("b")]})[0], listed)
    assert data.unused([lesson.fields]) == {"messages[].content[].cache": 1}


BROKEN = {
    "tools": ({"messages": TALK, "tools": {"name": "f"}}, r"f\.jsonl:1: expected `tools`, a list of objects"),
    "tools as text": ({"messages": TALK, "tools": "[1"}, r"f\.jsonl:1, the JSON in `tools`: not valid JSON"),
    "two in one": ({"messages": TALK, "tools": '[], "b": []'}, r"expected `tools`, a list of objects"),
    "calls": ({"messages": [user("a"), assistant(None, tool_calls=[1])]}, r"message 2: expected `tool_calls`"),
    "nothing": ({"messages": [user("a"), assistant(None)]}, r"message 2: expected `content`, or null beside"),
    "a number": ({"messages": [user(1)]}, r"message 1: expected `content`, a string or a list of text parts"),
    "a picture": ({"messages": [user([{"type": "image", "url": "a"}])]}, r"message 1: expected `content` of text"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_conversation_is_named(name):
    row, message = BROKEN[name]
    with pytest.raises(data.DataError, match=message):
        read(row)


def test_parts_that_a_template_does_not_read_are_refused(tmp_path):
    tokenizer = with_template(tmp_path, FOR + TURN + END + ASK)
    talk = read({"messages": [user([{"type": "text", "text": "a"}]), assistant("b")]})
    with pytest.raises(TokenizerError, match=r"f\.jsonl:1: .*message 1.*list of parts.*string"):
        data.packed(talk, tokenizer, 64)
