"""What several commands take: a model and an adapter, each known to be there before anything heavy is imported."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A Hugging Face folder, or a GGUF file.", show_default=False)
]
AdapterArgument = Annotated[
    Path, typer.Argument(metavar="ADAPTER", help="A PEFT folder, or a jpeft .safetensors file.", show_default=False)
]
AdapterOption = Annotated[
    Path | None,
    typer.Option("--adapter", "-a", help="A PEFT folder, or a jpeft .safetensors file.", show_default=False),
]
CONFIG = "config.json"


class TrainOn(StrEnum):
    """What is learnt of a conversation."""

    assistant = "assistant"
    all = "all"


TrainOnOption = Annotated[
    TrainOn,
    typer.Option(help="Of conversations, learn what the assistant says, or every token.", rich_help_panel="Data"),
]


def require_model(path: Path) -> None:
    """Refuses a path where no model is.

    Raises:
      WeightsError: nothing is there, or neither a folder with `config.json` nor a GGUF file.
    """
    if (path / CONFIG).is_file() or path.suffix == ".gguf" or any(path.glob("*.gguf")):
        return
    from jpeft.errors import WeightsError

    if not path.exists():
        raise WeightsError(f"{path}: no such folder; expected a Hugging Face model folder, or a GGUF file")
    if not path.is_dir():
        raise WeightsError(f"{path} is not a folder, nor a GGUF file; give the folder that holds {CONFIG}")
    adapter = "it is an adapter's folder: give the base model's" if (path / "adapter_config.json").exists() else ""
    raise WeightsError(f"{path}: no {CONFIG} there; {adapter or 'expected a Hugging Face model folder'}")


def require_adapter(path: Path | None) -> None:
    """Refuses a path where nothing is.

    Raises:
      AdapterError: there is neither a folder nor a file.
    """
    if path is not None and not path.exists():
        from jpeft.errors import AdapterError

        raise AdapterError(f"{path}: no such folder or file; expected a PEFT folder, or a jpeft .safetensors file")
