"""`jpeft xlora`, on a model that takes seconds."""

import json
import random

import jax
import numpy as np
import pytest

import jpeft
from cli_folders import run
from jpeft import xlora
from jpeft_interop import xlora_run, xlora_train
from jpeft_interop.load_model import load_model
from jpeft_interop.load_peft import load_peft
from jpeft_interop.tokenizer import load_tokenizer
from jpeft_interop.xlora_run import MixtureError, Settings
from tiny_folder import write_folder

WORDS = {"letters": ["cat", "dog", "mat", "log", "the"], "digits": ["12", "345", "67", "890", "4"]}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A tiny model and two kinds of text; rates that move it."""
    for name, value in {"LENGTH": 16, "BATCH": 4, "EXPERT_RATE": 0.05, "RATE": 0.05}.items():
        monkeypatch.setattr(xlora_run, name, value)
    draw = random.Random(0)
    for name, words in WORDS.items():
        documents = (" ".join(draw.choices(words, k=20)) for _ in range(60))
        (tmp_path / f"{name}.txt").write_text("\n\n".join(documents))
    write_folder(tmp_path / "model")
    return tmp_path


def options(folder, *more):
    texts = [part for name in WORDS for part in ("--data", folder / f"{name}.txt")]
    return ["xlora", "--model", folder / "model", "--expert-steps", 30, "--steps", 30, *texts, *more]


def shown(result):
    assert result.exit_code == 0, result.exception
    return " ".join(result.stdout.split())


def test_it_trains_experts_and_finds_out_which_is_for_what(small):
    out = small / "out"
    told = shown(run(*options(small, "--out", out)))
    for part in ("expert letters", "expert digits", "step 30/30", "before → after", "✓ each kind of text"):
        assert part in told
    assert {path.name for path in out.iterdir()} == {"mixture", "experts", "scalings.png", "scalings.json"}
    assert (out / "scalings.png").read_bytes().startswith(b"\x89PNG")

    made, figures = xlora.load(out / "mixture"), json.loads((out / "scalings.json").read_text())
    forward, params = load_model(small / "model", dtype="float32")
    texts = xlora_run._texts(settings(small), load_tokenizer(small / "model"))
    for number, text in enumerate(texts):
        usage = xlora_train.usage(forward)(params, made, xlora_run._held_out(text))
        np.testing.assert_allclose(figures["texts"][text.name]["scalings"], usage.scalings, rtol=0, atol=1e-5)
        assert xlora_run.mean_of(made, usage.scalings)[number] > 0.6
        np.testing.assert_allclose(figures["texts"][text.name]["loss"], usage.loss, rtol=1e-5)
    assert figures["layers"] == [layer.path for layer in xlora.layers_of(made.experts)]
    assert len(figures["layers"]) == 7, "of each expert five"

    again = small / "again"
    folders = [part for name in WORDS for part in ("--experts", out / "experts" / name)]
    told = shown(run(*options(small, "--out", again, "--shared", *folders)))
    assert "✓" not in told, "nothing is promised of experts that were given"
    mixture = xlora.load(again / "mixture")
    assert mixture.names == tuple(WORDS) and not (again / "experts").exists()
    for name in WORDS:
        given, kept = load_peft(out / "experts" / name, params), mixture.experts[name]
        for path, leaves in given.trained.items():
            np.testing.assert_array_equal(kept.trained[path]["a"], leaves["a"])


def settings(folder, **changes):
    plain = {"expert_steps": 1, "steps": 1, "texts": tuple(folder / f"{name}.txt" for name in WORDS)}
    return Settings(xlora.XLoRA(), **{**plain, **changes})


def test_it_fails_where_it_does_not_hold_its_promise(small):
    """An expert on each kind of text, and the classifier prefers the other."""
    _, params = load_model(small / "model", dtype="float32")
    expert = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=1, targets=["q_proj"]), params)
    made = xlora.init(jax.random.key(0), xlora.XLoRA(), {"a": expert, "b": expert}, features=32)
    usage = {name: xlora_train.Usage(1.0, np.array([[0.4, 0.6]])) for name in ("a", "b")}
    console = xlora_run.Console(quiet=True)
    with pytest.raises(MixtureError, match="on a, held out, the expert 'b' is used most"):
        xlora_run._conclude(console, made, usage, usage, small, promised=True)
    xlora_run._conclude(console, made, usage, usage, small, promised=False)


def test_names_that_do_not_tell_apart(small):
    twice = run(*options(small, "--experts", small / "model", "--experts", small / "model", "--out", small / "out"))
    assert isinstance(twice.exception, MixtureError) and "found 'model' twice" in str(twice.exception)
    one = run("xlora", "--model", small / "model", "--data", small / "letters.txt", "--out", small / "out")
    assert "two or more kinds of text" in str(one.exception)
    missing = run(*options(small, "--experts", small / "nowhere", "--out", small / "out"))
    assert "no such folder" in str(missing.exception)
    assert not (small / "out").exists()


def test_its_help_teaches():
    told = shown(run("xlora", "--help"))
    for part in (
        "token by token",
        "first pass without experts",
        "--top-k",
        "--experts",
        "jpeft.xlora.load",
        "Examples",
    ):
        assert part in told
