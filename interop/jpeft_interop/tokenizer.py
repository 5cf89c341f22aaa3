"""A model folder's tokenizer: text to ids and back, without torch.

`tokenizer.json` is read with the `tokenizers` library; a folder that has none goes through transformers, which builds
the same kind of tokenizer from older files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from jpeft.errors import JpeftError

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token")


class TokenizerError(JpeftError):
    """A folder without a tokenizer that can be read, or one that lacks what was asked of it."""


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back.

    Attributes:
      backend: of the `tokenizers` library, without padding and truncation.
      special: special tokens by what they are for: `bos_token`, `eos_token`, `pad_token` and so on.
      chat_template: Jinja source, or None.
      folder: where it came from, for error messages.
      tool_chat_template: Jinja source for conversations with tools, where the folder has one of its own for them.
    """

    backend: tokenizers.Tokenizer
    special: Mapping[str, str]
    chat_template: str | None
    folder: str
    tool_chat_template: str | None = None

    def encode(self, text: str, *, special: bool = True) -> np.ndarray:
        """The ids of a text, int32; with the special tokens that the tokenizer puts around every text, if `special`."""
        return np.asarray(self.backend.encode(text, add_special_tokens=special).ids, np.int32)

    def spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids (n,) and the characters that each stands for (n, 2), of a text that brings its own special tokens."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        return np.asarray(encoding.ids, np.int32), np.asarray(encoding.offsets, np.int32).reshape(-1, 2)

    def decode(self, ids: Sequence[int] | np.ndarray, *, special: bool = False) -> str:
        """The text of some ids; special tokens are left out unless asked for."""
        return self.backend.decode([int(id) for id in ids], skip_special_tokens=not special)

    def id_of(self, role: str) -> int | None:
        """The id of `eos_token`, `pad_token` and so on; None where there is none."""
        return self.backend.token_to_id(self.special[role]) if role in self.special else None

    @property
    def eos(self) -> int:
        """The id that ends a text: `eos_token`, or BERT's `sep_token`.

        Raises:
          TokenizerError: there is neither.
        """
        found = [self.id_of(role) for role in ("eos_token", "sep_token")]
        id = next((id for id in found if id is not None), None)
        if id is None:
            raise TokenizerError(f"{self.folder}: the tokenizer has no eos_token; name one in tokenizer_config.json")
        return id

    @property
    def pad(self) -> int:
        """The id to pad with: `pad_token`, or what ends a text."""
        id = self.id_of("pad_token")
        return self.eos if id is None else id


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model folder.

    Raises:
      TokenizerError: the folder has none, or a broken one.

    Example:
      >>> load_tokenizer("/nowhere")
      Traceback (most recent call last):
      jpeft_interop.tokenizer.TokenizerError: /nowhere: no such folder
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TokenizerError(f"{folder}: no such folder")
    if not (folder / "tokenizer.json").exists():
        return _through_transformers(folder)
    try:
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(f"{folder / 'tokenizer.json'}: not a tokenizer: {error}") from None
    backend.no_padding()
    backend.no_truncation()
    config = _json_object(folder / "special_tokens_map.json") | _json_object(folder / "tokenizer_config.json")
    templates = _templates(folder, config)
    return Tokenizer(backend, _special(config), templates.get("default"), str(folder), templates.get("tool_use"))


def _json_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise TokenizerError(f"{path}: expected a JSON object; found {type(found).__name__}")
    return found


def _special(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by role; a token is a string, or an object with its text in `content`."""
    content = lambda token: token.get("content") if isinstance(token, dict) else token
    found = {role: content(config.get(role)) for role in SPECIAL}
    return {role: token for role, token in found.items() if isinstance(token, str)}


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Read the chat templates by name: files of their own, or a field, which may hold several."""
    found = _named(config.get("chat_template"))
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    there = {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()}
    return there or found


def _named(found: Any) -> dict[str, str]:
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    named = found if isinstance(found, dict) else {"default": found}
    return {name: template for name, template in named.items() if isinstance(template, str)}


def _through_transformers(folder: Path) -> Tokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise TokenizerError(
            f"{folder} has no tokenizer.json; older tokenizer files need transformers: pip install 'jpeft[torch]'"
        ) from None
    try:
        slow = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise TokenizerError(
            f"{folder}: no tokenizer that transformers can read: {str(error).splitlines()[0]}"
        ) from None
    backend = getattr(slow, "backend_tokenizer", None)
    if backend is None:
        raise TokenizerError(f"{folder}: {type(slow).__name__} has no fast form; save one as tokenizer.json")
    backend.no_padding()
    backend.no_truncation()
    special = {role: str(getattr(slow, role)) for role in SPECIAL if getattr(slow, role, None) is not None}
    templates = _named(slow.chat_template)
    return Tokenizer(backend, special, templates.get("default"), str(folder), templates.get("tool_use"))
