"""`jpeft verify`: torch and JAX on the same texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jpeft_interop.cli.arguments import AdapterOption, ModelArgument, require_adapter, require_model

if TYPE_CHECKING:
    import numpy as np
    from rich.table import Table

    from jpeft_interop.torch_check import Difference

SHOWN = 48  # characters of a text


def verify(
    model: ModelArgument,
    adapter: AdapterOption = None,
    text: Annotated[list[str] | None, typer.Option(help="A text; give it as often as you like.")] = None,
    file: Annotated[Path | None, typer.Option(help="A file of texts, one a line.", show_default=False)] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="The largest difference that is none.")] = 1e-3,
) -> None:
    """Compare the logits of torch (transformers, PEFT) with those of JAX, and fail where they differ.

    Texts run with the adapter attached, not merged, and in fp32. The exit
    status is 1 if any logit differs by more than the tolerance.

    [bold]Example[/]

      jpeft verify SmolLM2-135M --adapter my-adapter --text "A list is" --text "A dict is"
    """
    require_model(model)
    require_adapter(adapter)
    texts = [*(text or []), *_lines(file)]
    if not texts:
        raise typer.BadParameter("give at least one --text, or a --file with a line of text")
    from rich.console import Console

    from jpeft_interop.load_model import hf_folder
    from jpeft_interop.tokenizer import load_tokenizer
    from jpeft_interop.verify import largest_logit_difference
    from jpeft_interop.verify import verify as compare

    with Console(stderr=True).status("Running the texts through torch and through JAX …"):
        tokenizer = load_tokenizer(hf_folder(model))
        found = compare(model, adapter, [_ids(tokenizer.encode(one), one) for one in texts])
    Console().print(_table(texts, found, tolerance))
    if adapter is not None:
        from jpeft_interop.provenance import provenance

        Console().print(f"adapter: {provenance(adapter)}", highlight=False)
    largest = largest_logit_difference(found)
    if not largest <= tolerance:
        typer.echo(f"jpeft: logits differ by {largest:.2e}, more than the tolerance of {tolerance:.0e}", err=True)
        raise typer.Exit(1)


def _lines(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{file}: not UTF-8: {error.reason} at byte {error.start}") from None


def _ids(ids: np.ndarray, text: str) -> np.ndarray:
    if not len(ids):
        raise typer.BadParameter(f"the text {text!r} has no tokens")
    return ids


def _table(texts: Sequence[str], found: Sequence[Difference], tolerance: float) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table("text", title="torch and JAX, logits in fp32", caption=f"tolerance {tolerance:g}")
    for name in ("tokens", "max |d|", "mean |d|", "max |logit|", "argmax agrees"):
        table.add_column(name, justify="right")
    for text, one in zip(texts, found, strict=True):
        style = "green" if one.largest <= tolerance else "bold red"
        short = " ".join(text.split())
        short = short if len(short) <= SHOWN else short[: SHOWN - 1] + "…"
        largest = Text(f"{one.largest:.2e}", style=style)
        table.add_row(
            Text(short), str(one.tokens), largest, f"{one.mean:.2e}", f"{one.scale:.1f}", f"{100 * one.agree:.1f} %"
        )
    return table
