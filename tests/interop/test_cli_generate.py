from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cli_folders import run, write_adapter, write_model
from jpeft.errors import JpeftError
from jpeft_interop.chat import render
from jpeft_interop.cli.generate import Stream
from jpeft_interop.tokenizer import load_tokenizer
from peft_twins import base, bert, load
from torch_twins import randomise


def loud() -> LlamaForCausalLM:
    """Words loud enough that the text varies."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=50, eos_token_id=2
    )
    module = randomise(LlamaForCausalLM(config))
    with torch.no_grad():
        module.model.embed_tokens.weight *= 10
    return module


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder, module = tmp_path_factory.mktemp("generate"), loud()
    adapter = write_adapter(folder / "adapter", module, target_modules="all-linear", r=4, lora_alpha=16)
    return write_model(folder / "model", module), adapter


def of_transformers(model: Path, adapter: Path | None, text: str, new: int, special: bool = True) -> str:
    """What transformers and PEFT write: greedy."""
    module = LlamaForCausalLM.from_pretrained(model)
    module = load(module, adapter)[0] if adapter else module
    tokenizer = load_tokenizer(model)
    ids = tokenizer.encode(text, special=special)
    whole = module.generate(
        input_ids=torch.tensor(ids[None].astype(np.int64)), max_new_tokens=new, do_sample=False, pad_token_id=0
    )[0]
    return tokenizer.decode(whole.numpy())[len(tokenizer.decode(ids)) :]


def test_greedy_text_is_transformers_with_and_without_adapter(folders: tuple[Path, Path]) -> None:
    model, adapter = folders
    texts = {}
    for one in (None, adapter):
        options = ["--adapter", one] if one else []
        result = run("generate", model, *options, "--prompt", "what is it", "--max-new-tokens", 12)
        assert result.exit_code == 0, result.exception
        texts[one] = result.stdout
        assert result.stdout == of_transformers(model, one, "what is it", 12) + "\n"
    assert texts[None] != texts[adapter]


def test_chat_wraps_the_prompt(folders: tuple[Path, Path]) -> None:
    model, _ = folders
    text = render(load_tokenizer(model), [{"role": "user", "content": "hello"}], prompt=True)
    assert text == "<user>hello<bot>"
    result = run("generate", model, "--chat", "-p", "hello", "--max-new-tokens", 8)
    assert result.stdout == of_transformers(model, None, text, 8, special=False) + "\n"


def test_a_seed_settles_the_text(folders: tuple[Path, Path]) -> None:
    draw = lambda seed: (
        run("generate", folders[0], "-p", "some", "--temperature", 2, "--seed", seed, "--max-new-tokens", 12).stdout
    )
    assert draw(1) == draw(1) != draw(2)


def test_the_text_comes_in_whole_characters(folders: tuple[Path, Path]) -> None:
    tokenizer, pieces = load_tokenizer(folders[0]), []
    prompt, new = tokenizer.encode("ab"), tokenizer.encode("c🙂üd")
    assert len(new) == 8  # four bytes and two
    stream = Stream(tokenizer, prompt, pieces.append)
    for id in new:
        stream.add(int(id))
    assert pieces == ["c", "🙂", "ü", "d"]
    stream.add(int(new[1]))
    assert len(pieces) == 4
    stream.end()
    assert pieces[-1] == "\N{REPLACEMENT CHARACTER}"


def test_bad_input(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model, adapter = folders
    classifier = write_model(tmp_path / "bert", base(bert))
    for arguments, words in {
        (tmp_path / "nowhere", "-p", "a"): "no such folder",
        (adapter, "-p", "a"): "it is an adapter's folder",
        (classifier, "-p", "a"): "writes no text",
        (model, "-p", ""): "no tokens",
        (model, "-p", "a", "--adapter", tmp_path / "nowhere"): "no such folder or file",
        (model, "-p", "a", "--adapter", model): "adapter_config.json",
        (model, "-p", "a", "--top-p", 0): "top_p",
    }.items():
        result = run("generate", *arguments)
        assert result.exit_code == 1 and isinstance(result.exception, JpeftError), (arguments, result.exception)
        assert words in str(result.exception), str(result.exception)
    assert run("generate", model).exit_code == 2
