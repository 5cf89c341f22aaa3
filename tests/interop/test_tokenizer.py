"""Tokenizers and chat templates against transformers."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer, BertTokenizer

from jpeft_interop.chat import render, with_spans
from jpeft_interop.tokenizer import TokenizerError, load_tokenizer
from tiny_folder import write_tokenizer

TURNS = [
    {"role": "system", "content": "be a cat"},
    {"role": "user", "content": " what\n is <|end|> é?"},
    {"role": "assistant", "content": "no\n"},
]
BLOCKS = """
{%- for message in messages %}
    {%- if loop.index0 == 5 %}{% break %}{% endif %}
    {{- message | tojson }}
    {%- if message['role'] == 'assistant' %}
    {% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""


@pytest.fixture
def folder(tmp_path):
    return write_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["the cat sat", " a\n\n dog é 日本 <|end|>", ""])
def test_ids_and_text_are_transformers(folder, text):
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    ids = ours.encode(text)
    assert ids.tolist() == theirs(text)["input_ids"]
    for special in (True, False):
        assert ours.decode(ids, special=special) == theirs.decode(ids, skip_special_tokens=not special)
    assert (ours.eos, ours.pad) == (theirs.eos_token_id, theirs.pad_token_id)


def test_a_real_tokenizer_that_pads_and_cuts_does_neither_here(minilm_folder):
    ours, theirs = load_tokenizer(minilm_folder), AutoTokenizer.from_pretrained(minilm_folder)
    for text in ("a cat", "a cat " * 200):
        assert ours.encode(text).tolist() == theirs(text, truncation=False)["input_ids"]
    assert ours.eos == theirs.sep_token_id and ours.pad == theirs.pad_token_id


def test_a_folder_without_tokenizer_json_goes_through_transformers(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    ours = load_tokenizer(tmp_path)
    assert (
        ours.encode("The cats").tolist()
        == [2, 5, 6, 7, 3]
        == BertTokenizer.from_pretrained(tmp_path)("The cats")["input_ids"]
    )
    assert (ours.eos, ours.pad) == (3, 0)


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("template", ["the folder's", BLOCKS])
def test_a_conversation_reads_as_in_transformers(folder, template, prompt):
    if template == BLOCKS:
        (folder / "chat_template.jinja").write_text(BLOCKS)
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=prompt)
    assert render(load_tokenizer(folder), TURNS, prompt=prompt) == expected


def test_spans_cover_what_the_assistant_says(folder):
    turns = [*TURNS, {"role": "user", "content": "no\n"}, {"role": "assistant", "content": "no\n"}]
    text, spans = with_spans(load_tokenizer(folder), turns)
    assert spans and [text[start:end] for start, end in spans] == ["no\n<|end|>", "no\n<|end|>"]
    assert spans[0][1] < spans[1][0] == len(text) - len("no\n<|end|>")


def test_templates_run_in_a_sandbox(folder):
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    (folder / "chat_template.jinja").write_text(escape)
    with pytest.raises(TokenizerError, match="the chat template fails"):
        render(load_tokenizer(folder), TURNS)


def test_what_a_template_refuses_is_said(folder):
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system turns') }}")
    with pytest.raises(TokenizerError, match="no system turns"):
        render(load_tokenizer(folder), TURNS)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(TokenizerError, match="no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(TokenizerError, match="no tokenizer that transformers can read"):
        load_tokenizer(tmp_path)
    bare = load_tokenizer(write_tokenizer(tmp_path, chat_template=None, eos_token=None))
    with pytest.raises(TokenizerError, match="no chat template"):
        render(bare, TURNS)
    with pytest.raises(TokenizerError, match="no eos_token"):
        _ = bare.eos


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_file_is_named(folder, name):
    (folder / name).write_text("[1")
    with pytest.raises(TokenizerError, match=name):
        load_tokenizer(folder)


def test_spans_of_ids_are_characters(folder):
    ids, places = load_tokenizer(folder).spans("the cat é<|end|>")
    assert places[0][0] == 0 and places[-1].tolist() == [9, 16] and len(ids) == len(places)
    assert np.all(places[1:, 0] >= places[:-1, 0])
