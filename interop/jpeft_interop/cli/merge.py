"""`jpeft merge`: a model and an adapter into one ordinary folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jpeft_interop.cli.arguments import AdapterArgument, ModelArgument, require_adapter, require_model


def merge(
    model: ModelArgument,
    adapter: AdapterArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)],
    untie: Annotated[
        bool,
        typer.Option(
            "--untie",
            help="Write embedding and output head as two weights, where they are one and the adapter acts on one side.",
        ),
    ] = False,
    max_shard_gb: Annotated[float, typer.Option(min=0.001, help="Split the weights into files of this size.")] = 5.0,
) -> None:
    """Fold an adapter into its model, and write an ordinary Hugging Face folder.

    Goes tensor by tensor: a model may be larger than the memory. The change
    is computed in fp32, checked to be finite and rounded to the base's dtype.
    Config and tokenizer come along. Torch is not needed.

    [bold]Example[/]

      jpeft merge SmolLM2-135M my-adapter my-model
    """
    require_model(model)
    require_adapter(adapter)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from jpeft_interop.merge_folder import merge_folder

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("Merging", total=None)
        merged = merge_folder(
            model,
            adapter,
            out,
            untie=untie,
            max_shard_bytes=round(max_shard_gb * 1e9),
            on_start=lambda tensors: progress.update(task, total=tensors),
            on_tensor=lambda: progress.advance(task),
        )
    for key, reason in merged.left_out.items():
        console.print(f"left out: {key} ({reason})", highlight=False, markup=False)
    typer.echo(f"{out}: {len(merged.changed)} weights changed, {merged.kept} copied as they were")
