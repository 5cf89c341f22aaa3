"""GGUF files, converted once into an ordinary Hugging Face folder and kept.

A GGUF file holds a language model in llama.cpp's quantised blocks, with its config and tokenizer. transformers can read
it; what it reads is written out as fp32 safetensors under a cache, whole or not at all, under a name that holds the
digest of the file: the second time costs only that digest. Only the conversion itself imports torch.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from jpeft.atomic import locked, write_folder
from jpeft.errors import WeightsError

CACHE_VARIABLE = "JPEFT_CACHE"
MAGIC = b"GGUF"
INSTALL = "pip install gguf transformers torch"


def cache_folder() -> Path:
    """Where converted models are kept: `$JPEFT_CACHE`, or `~/.cache/jpeft`."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "jpeft")


def gguf_file(path: str | os.PathLike) -> Path | None:
    """The GGUF file at `path`, itself or the only one in that folder; None where there is none.

    Raises:
      WeightsError: the folder holds several.
    """
    path = Path(path)
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise WeightsError(f"{path} holds several GGUF files ({names}); give the path of the one to load")
    return files[0] if files else None


def convert_gguf(path: str | os.PathLike, cache: str | os.PathLike | None = None) -> Path:
    """The Hugging Face folder of a GGUF language model: config, tokenizer, fp32 safetensors.

    Args:
      path: a `.gguf` file, or a folder that holds one.
      cache: where to keep the folder; `cache_folder()` by default.

    Returns:
      The folder. It is made at the first call, and found again as long as the file's content is the same.

    Raises:
      WeightsError: there is no such file, it is not GGUF, a package is missing, or transformers can't read it.
    """
    file = gguf_file(path)
    if file is None:
        raise WeightsError(f"{path} is not a GGUF file, and no folder that holds one")
    folder = Path(cache or cache_folder()) / f"{file.stem}-{_digest(file)}"
    if not folder.is_dir():
        turn = folder.parent / ".converting"
        turn.mkdir(parents=True, exist_ok=True)
        with locked(turn):  # of two processes the second waits, and finds what it wants
            if not folder.is_dir():
                write_folder(folder, lambda fresh: _convert(file, fresh))
    return folder


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        if (found := stream.read(len(MAGIC))) != MAGIC:
            raise WeightsError(f"{file} is not GGUF: expected its first bytes to be {MAGIC!r}, found {found!r}")
        stream.seek(0)
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


def _convert(file: Path, fresh: Path) -> None:
    try:
        import gguf  # noqa: F401 (transformers needs it, and says so less plainly)
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise WeightsError(f"converting {file} needs {error.name}, which is not installed: {INSTALL}") from error
    whole = GgufConfig(dequantize=True)
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name, "local_files_only": True}
    try:
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, quantization_config=whole)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except Exception as error:  # whatever transformers and gguf raise on a broken or unknown file
        raise WeightsError(f"transformers can't read {file}: {type(error).__name__}: {error}") from error
    model.config.__dict__.pop("quantization_config", None)  # no longer true, and it can't be written
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
