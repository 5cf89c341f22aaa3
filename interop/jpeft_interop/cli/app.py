"""The commands, each in a file of its own that imports what is heavy only when it runs."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import typer

COMMANDS = ("quickstart", "finetune", "sweep", "generate", "merge", "verify", "inspect", "xlora")

app = typer.Typer(
    help="Fine-tune Hugging Face models in JAX with adapters, and hand them back to torch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # `main` tells of errors
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name in COMMANDS:
    if find_spec(f"{__package__}.{name}"):
        app.command(name)(getattr(import_module(f"{__package__}.{name}"), name))
