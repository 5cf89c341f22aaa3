"""The command line `jpeft`: what a person reads when something is wrong is one line, not a traceback."""

from __future__ import annotations

import os
import sys

DEBUG = "JPEFT_DEBUG"
# The extra that brings a package.
EXTRAS = {
    "cli": ("grain", "matplotlib", "rich", "typer"),
    "torch": ("gguf", "peft", "torch", "transformers"),
    "interop": ("jinja2", "ml_dtypes", "tokenizers"),
}


def main() -> None:
    """Runs the command of `sys.argv`; the console script `jpeft`.

    Exits with 1 and one line on stderr where a command raises a JpeftError or an OSError, or a package is missing. With
    `JPEFT_DEBUG=1` the traceback comes instead.
    """
    try:
        from jpeft_interop.cli.app import app  # here, so that a missing typer is a line, too

        app(prog_name="jpeft")
    except (ValueError, OSError, ModuleNotFoundError) as error:
        line = _line(error)
        if line is None or os.environ.get(DEBUG):
            raise
        print(f"jpeft: {line}", file=sys.stderr)
        sys.exit(1)


def _line(error: Exception) -> str | None:
    """What to tell of an error; None for one that nobody raises on purpose."""
    from jpeft.errors import JpeftError

    if isinstance(error, ModuleNotFoundError):
        name = (error.name or "").partition(".")[0]
        extra = next((extra for extra, packages in EXTRAS.items() if name in packages), None)
        return (
            extra and f"this command needs the package {name!r}, which is not installed: pip install 'jpeft[{extra}]'"
        )
    if isinstance(error, JpeftError | OSError):
        return " ".join(str(error).split())
    return None
