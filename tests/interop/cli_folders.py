"""Folders for the command line's tests: a tiny model with a tokenizer of its own, and a PEFT adapter for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

from jpeft_interop.cli.app import app
from peft_twins import adapted, save

TURNS = "{% for turn in messages %}<{{ turn['role'] }}>{{ turn['content'] }}{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}<bot>{% endif %}"


def run(*arguments: object) -> Any:
    """The command line, in this process: `exit_code`, `stdout`, `exception`."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def write_tokenizer(folder: Path, size: int = 50) -> None:
    """A byte-level tokenizer of `size` entries: bytes, so that a character can take several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    kept = [letter for letter in "abcdefghijklmnopqrstuvwxyzĠ<>ðŁĻĤÃ¼" if letter in alphabet]
    vocab = {token: id for id, token in enumerate(["<pad>", "<s>", "</s>", *kept][:size])}
    vocab |= {f"word{number}": number for number in range(len(vocab), size)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>", "pad_token": "<pad>"}')
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def write_model(folder: Path, module: Any) -> Path:
    module.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_adapter(folder: Path, module: Any, **config: Any) -> Path:
    return save(adapted(module, **config), folder)
