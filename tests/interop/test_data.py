"""Files of examples, rows of ids, batches."""

import json
import os

import numpy as np
import pytest

from jpeft_interop import data
from jpeft_interop.tokenizer import TokenizerError, load_tokenizer
from tiny_folder import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_txt_file_is_its_paragraphs_or_one_document(tmp_path):
    path = write(tmp_path, "a.txt", "\ufeff\n one\ntwo \r\n \t\r\nthree\n\n\n")
    assert [(d.text, d.where) for d in data.read(path)] == [(" one\ntwo", f"{path}:2"), ("three", f"{path}:5")]
    assert [d.text for d in data.read(path, whole=True)] == ["one\ntwo \n \t\nthree"]


def test_a_jsonl_file_has_texts_and_conversations(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes\u2028no"}]
    lines = [json.dumps({"text": "a", "more": 1}), "", json.dumps({"messages": turns}, ensure_ascii=False)]
    document, conversation = data.read(write(tmp_path, "a.jsonl", "\n".join(lines)))
    assert isinstance(document, data.Document) and document.text == "a"
    assert isinstance(conversation, data.Conversation) and conversation.where.endswith(":3")
    assert [(m.role, m.content) for m in conversation.messages] == [("user", "hi"), ("assistant", "yes\u2028no")]


def test_a_csv_file_has_texts_and_labels_over_several_lines(tmp_path):
    long = "x" * 200_000  # beyond csv's own limit for a field
    path = write(tmp_path, "a.csv", f'id,text,label\r\n1,"two\r\nlines, quoted",good\r\n2,{long}\u2028,bad\r\n')
    first, second = data.read_labelled(path)
    assert (first.text, first.label, first.where) == ("two\r\nlines, quoted", "good", f"{path}:3")
    assert (second.text, second.label) == (long + "\u2028", "bad")
    assert [d.text for d in data.read(path)] == [first.text, second.text]


BROKEN = {
    "ending": ("a.md", "text", ":.*.txt, .jsonl or .csv; found '.md'"),
    "nothing": ("a.txt", " \n\n ", "holds no examples"),
    "utf-8": ("a.txt", b"one\ntw\xff", r"a\.txt:2: expected UTF-8; found byte 0xff"),
    "json": ("a.jsonl", '{"text": "a"}\n{"text"', r"a\.jsonl:2: not valid JSON"),
    "no object": ("a.jsonl", "[1]", r"a\.jsonl:1: expected a JSON object, found a list"),
    "no text": ("a.jsonl", '{"text": "a"}\n{"body": "b"}', r"a\.jsonl:2: expected `text` or `messages`; found body"),
    "a field twice": ("a.jsonl", '{"text": "a", "text": "b"}', r"a\.jsonl:1: .*'text' stands there twice"),
    "NaN": ("a.jsonl", '{"text": "a", "score": NaN}', r"a\.jsonl:1: .*NaN is no JSON"),
    "half a pair": ("a.jsonl", '{"text": "a \\ud800"}', r"a\.jsonl:1: .*surrogate"),
    "depth": ("a.jsonl", '{"text": "a"}\n{"x": ' + "[" * 100_000, r"a\.jsonl:2: .*nested too deeply"),
    "digits": ("a.jsonl", '{"text": "a", "x": ' + "1" * 5_000 + "}", r"a\.jsonl:1: not valid JSON"),
    "both": ("a.jsonl", '{"text": "a", "messages": []}', r"a\.jsonl:1: .*found both"),
    "empty text": ("a.jsonl", '{"text": " "}', r"a\.jsonl:1: the text is empty"),
    "no messages": ("a.jsonl", '{"messages": []}', r"a\.jsonl:1: expected `messages`"),
    "no content": ("a.jsonl", '{"messages": [{"role": "user"}]}', r"a\.jsonl:1, message 1: expected"),
    "no role": ("a.jsonl", '{"messages": [{"role": 1, "content": "b"}]}', r"message 1: expected"),
    "header": ("a.csv", "one,two\n1,2", r"a\.csv:1: expected a header"),
    "fields": ("a.csv", "text,label\na,b\nc,d,e", r"a\.csv:3: expected 2 fields.*found 3"),
    "quotes": ("a.csv", 'text,label\n"a"b,c', r"a\.csv:2: not CSV"),
}


def test_blanks_by_the_hundred_thousand_take_no_time(tmp_path):
    long = " " * 300_000
    found = data.read(write(tmp_path, "a.txt", f"{long}\n one\n  two \n{long}\n\n{long}three"))
    assert [one.text for one in found] == [" one\n  two", f"{long}three"]
    assert [one.where.rpartition(":")[2] for one in found] == ["2", "6"]


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(data.DataError, match="expected an ordinary file, found a pipe"):
        data.read(tmp_path / "a.txt")


@pytest.mark.parametrize("row", BROKEN)
def test_a_broken_file_is_named_with_its_line(row, tmp_path):
    name, content, message = BROKEN[row]
    with pytest.raises(data.DataError, match=message):
        data.read(write(tmp_path, name, content))


def test_labels_are_needed_for_classification(tmp_path):
    with pytest.raises(data.DataError, match=r"a\.csv:2: expected a `label`.*None"):
        data.read_labelled(write(tmp_path, "a.csv", "text\na"))
    with pytest.raises(data.DataError, match=r"a\.jsonl:1: expected a `label`.*True"):
        data.read_labelled(write(tmp_path, "a.jsonl", '{"text": "a", "label": true}'))
    with pytest.raises(data.DataError, match="a .txt has not"):
        data.read_labelled(write(tmp_path, "a.txt", "a"))


def labelled(*labels):
    return [data.Labelled("a cat", label, f"f:{n}") for n, label in enumerate(labels, 1)]


def test_labels_are_numbered_by_value_or_by_name():
    assert data.labels_of(labelled(10, "9", -1)).names == ("-1", "9", "10")
    names = data.labels_of(labelled("good", "bad", "10"))
    assert names.id2label == {0: "10", 1: "bad", 2: "good"} and names.id_of("bad", "f:1") == 1
    with pytest.raises(data.DataError, match="at least two"):
        data.labels_of(labelled("a", "a"))
    with pytest.raises(data.DataError, match=r"f:7: expected one of the labels 10, bad, good; found 'worse'"):
        names.id_of("worse", "f:7")


def test_a_split_takes_whole_examples_by_seed():
    learnt, held_out = data.split(list(range(40)), 0.25, seed=1)
    assert len(held_out) == 10 and sorted(learnt + held_out) == list(range(40)) and learnt == sorted(learnt)
    assert data.split(list(range(40)), 0.25, seed=1)[1] == held_out != data.split(list(range(40)), 0.25, seed=2)[1]
    assert data.split([1], 0.0, seed=0) == ([1], [])
    with pytest.raises(data.DataError, match="leaves none"):
        data.split([1], 0.1, seed=0)


def documents(*texts):
    return [data.Document(text, "f:1") for text in texts]


@pytest.mark.parametrize("length", [4, 7, 64])
def test_blocks_hold_every_token_in_order_and_its_successor(tokenizer, length):
    texts = "the cat sat", "on the mat", "no dog"
    rows = data.packed(documents(*texts), tokenizer, length)
    stream = np.concatenate([np.append(tokenizer.encode(text), tokenizer.eos) for text in texts])
    labels, ids = rows["labels"].ravel(), rows["input_ids"].ravel()
    learnt = labels != data.IGNORE
    assert rows["input_ids"].shape[1] == length and learnt.sum() == len(stream) - 1
    np.testing.assert_array_equal(labels[learnt], stream[1:])
    np.testing.assert_array_equal(ids[learnt], stream[:-1])


def conversation(*contents):
    roles = "user", "assistant"
    turns = tuple(data.Message(roles[n % 2], content) for n, content in enumerate(contents))
    return data.Conversation(turns, "f:1")


def test_of_a_conversation_the_assistants_turns_are_learnt(tokenizer):
    rows = data.packed([conversation("a cat?", "no dog", "a log?", "the mat")], tokenizer, 64)
    learnt = rows["labels"][rows["labels"] != data.IGNORE]
    assert tokenizer.decode(learnt, special=True) == "no dog<|end|>the mat<|end|>"
    whole = tokenizer.decode(rows["input_ids"][0], special=True)
    assert whole.startswith(
        "<|user|>a cat?<|end|><|assistant|>no dog<|end|><|user|>a log?<|end|><|assistant|>the mat<|end|>"
    )


def test_a_template_that_hides_the_turns_is_learnt_whole_if_asked(tmp_path):
    drops = "{% for m in messages %}{{ m['content'] if m['role'] == 'user' or loop.last else '' }}<|end|>{% endfor %}"
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, chat_template=drops))
    talk = [conversation("zyx", "no", "b", "dog")]
    with pytest.raises(TokenizerError, match="f:1: .*message 2.*--train-on all"):
        data.packed(talk, tokenizer, 64)
    rows = data.packed(talk, tokenizer, 64, train_on="all")
    learnt = tokenizer.decode(rows["labels"][rows["labels"] != data.IGNORE], special=True)
    assert learnt == "yx<|end|><|end|>b<|end|>dog<|end|>"  # the user's words, too; the first token follows nothing


def test_nothing_to_learn_is_an_error(tokenizer):
    with pytest.raises(data.DataError, match="nothing to learn"):
        data.packed([conversation("only the user speaks")], tokenizer, 64)


def test_blocks_that_teach_nothing_are_no_steps(tokenizer):
    rows = data.packed([conversation("the cat sat on the mat " * 9, "no")], tokenizer, 8)
    assert (rows["labels"] != data.IGNORE).any(axis=1).all() and data.size_of(rows) <= 2


def test_texts_are_padded_to_the_longest_and_cut_with_their_end(tokenizer):
    records = [data.Labelled("cat", 1, "f:1"), data.Labelled("the cat sat on the mat", 0, "f:2")]
    rows = data.padded(records, tokenizer, 4, data.labels_of(records))
    whole = tokenizer.encode(records[1].text)
    np.testing.assert_array_equal(rows["input_ids"][1], [*whole[:3], whole[-1]])
    short = tokenizer.encode("cat")
    np.testing.assert_array_equal(rows["input_ids"][0], [*short, *[tokenizer.pad] * (4 - len(short))])
    np.testing.assert_array_equal(rows["attention_mask"].sum(axis=1), [len(short), 4])
    assert rows["labels"].tolist() == [1, 0] and data.truncated(records, tokenizer, 4) == 1


ROWS = {"input_ids": np.arange(14).reshape(7, 2), "labels": np.arange(7)}


def numbers(batches, count):
    return [next(batches)["labels"].tolist() for _ in range(count)]


def test_an_epoch_has_every_row_once_and_the_next_another_order():
    seen = np.concatenate(numbers(data.shuffled(ROWS, 2, seed=0), 7))
    assert sorted(seen[:7]) == sorted(seen[7:]) == list(range(7)) and seen[:7].tolist() != seen[7:].tolist()


def test_the_order_is_the_seeds_and_columns_stay_together():
    assert numbers(data.shuffled(ROWS, 2, seed=0), 9) == numbers(data.shuffled(ROWS, 2, seed=0), 9)
    assert numbers(data.shuffled(ROWS, 2, seed=0), 9) != numbers(data.shuffled(ROWS, 2, seed=1), 9)
    batch = next(data.shuffled(ROWS, 3, seed=0))
    np.testing.assert_array_equal(batch["input_ids"][:, 0], 2 * batch["labels"])


def test_a_position_is_gone_back_to():
    batches = data.shuffled(ROWS, 2, seed=0)
    numbers(batches, 5)
    position = json.loads(json.dumps(batches.get_state()))
    other = data.shuffled(ROWS, 2, seed=0)
    other.set_state(position)
    assert numbers(other, 4) == numbers(batches, 4)


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(data.DataError, match="batches of 8 need.* makes 7"):
        data.shuffled(ROWS, 8, seed=0)


def test_in_order_gives_all_rows_and_fills_up_with_nothing_learnt():
    rows = ROWS | {"attention_mask": np.zeros((7, 2), int)}
    batches = list(data.in_order(rows, 3))
    labels = np.concatenate([batch["labels"] for batch in batches])
    assert [len(batch["labels"]) for batch in batches] == [3, 3, 3]
    assert labels.tolist() == [*range(7), data.IGNORE, data.IGNORE] and batches[-1]["attention_mask"][-1].all()
