"""`jpeft generate`: text from a model, with an adapter or without, as it comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jpeft_interop.cli.arguments import AdapterOption, ModelArgument, require_adapter, require_model

if TYPE_CHECKING:
    import numpy as np

    from jpeft_interop.tokenizer import Tokenizer

HEADS = ("ForCausalLM", "LMHeadModel")
UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class DType(StrEnum):
    """The dtypes to compute in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to continue, or to answer.", show_default=False)],
    adapter: AdapterOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens to write.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token; more is more daring.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that reach this share.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed draws the same text.")] = 0,
    chat: Annotated[bool, typer.Option(help="The prompt is a user's turn, in the model's chat template.")] = False,
    dtype: Annotated[DType | None, typer.Option(help="Compute in this.", show_default="the model's own")] = None,
) -> None:
    """Continue a prompt, or answer it ([bold]--chat[/bold]); the text appears as it is made.

    Only the new text goes to standard output. An adapter is attached, not
    merged.

    [bold]Example[/]

      jpeft generate SmolLM2-135M --adapter my-adapter --chat --prompt "What is a list?"
    """
    require_model(model)
    require_adapter(adapter)
    import jax

    import jpeft
    from jpeft_interop.any_adapter import load_adapter
    from jpeft_interop.generate import generate
    from jpeft_interop.load_model import hf_folder, load_model, read_config
    from jpeft_interop.tokenizer import load_tokenizer

    folder = hf_folder(model)
    config = read_config(folder)
    _require_language_model(config, folder)
    tokenizer = load_tokenizer(folder)
    ids = _prompt(tokenizer, prompt, chat)
    forward, params = load_model(folder, dtype=dtype and dtype.value)
    if adapter is not None:
        params = jpeft.attach(params, load_adapter(adapter, params))
    stream = Stream(tokenizer, ids, lambda text: typer.echo(text, nl=False))
    generate(
        forward if adapter is None else jpeft.lift(forward),
        params,
        ids[None],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        key=jax.random.key(seed),
        eos_token_id=_ends(folder, config, tokenizer) or None,
        on_token=lambda tokens: stream.add(int(tokens[0])),
    )
    stream.end()
    typer.echo()


class Stream:
    """Tokens as text, in pieces that are whole: a character of several tokens waits for the last of them."""

    def __init__(self, tokenizer: Tokenizer, prompt: np.ndarray, write: Callable[[str], None]) -> None:
        self.tokenizer, self.write = tokenizer, write
        self.ids = prompt.tolist()
        self.shown = len(tokenizer.decode(self.ids))

    def add(self, id: int) -> None:
        """One more token."""
        self.ids.append(id)
        text = self.tokenizer.decode(self.ids)
        if not text.endswith(UNFINISHED):
            self._show(text)

    def end(self) -> None:
        """There are no more: what still waits is shown as it is."""
        self._show(self.tokenizer.decode(self.ids))

    def _show(self, text: str) -> None:
        if len(text) > self.shown:
            self.write(text[self.shown :])
            self.shown = len(text)


def _prompt(tokenizer: Tokenizer, prompt: str, chat: bool) -> np.ndarray:
    """Its ids, known to be some."""
    from jpeft_interop.chat import render
    from jpeft_interop.tokenizer import TokenizerError

    if chat:
        text = render(tokenizer, [{"role": "user", "content": prompt}], prompt=True)
        return tokenizer.encode(text, special=False)
    ids = tokenizer.encode(prompt)
    if not len(ids):
        raise TokenizerError("--prompt: the text has no tokens; give at least a word to begin with")
    return ids


def _require_language_model(config: dict[str, Any], folder: Path) -> None:
    from jpeft_interop.models import ModelError

    name = next(iter(config.get("architectures") or ["a model of unknown architecture"]))
    if not name.endswith(HEADS):
        raise ModelError(f"{folder} holds {name}, which writes no text; expected one of those named *ForCausalLM")


def _ends(folder: Path, config: dict[str, Any], tokenizer: Tokenizer) -> Sequence[int]:
    """The tokens that end a text: those of generation_config.json, else of config.json, else the tokenizer's."""
    from jpeft.errors import WeightsError
    from jpeft.strict_json import read_json_object

    file = folder / "generation_config.json"
    told = read_json_object(file, WeightsError).get("eos_token_id") if file.exists() else None
    for found in (told, config.get("eos_token_id"), tokenizer.id_of("eos_token")):
        if found is not None:
            return found if isinstance(found, list) else [found]
    return []
