"""`jpeft inspect`: what an adapter holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from jpeft_interop.cli.arguments import AdapterArgument

if TYPE_CHECKING:
    from rich.table import Table

    from jpeft_interop.adapter_summary import Summary

LONG = 100  # characters of a config field


def inspect(
    adapter: AdapterArgument,
    brief: Annotated[bool, typer.Option("--brief", help="Leave out the table of modules.")] = False,
) -> None:
    """Show what an adapter holds: its options, and rank, scaling, shapes and norms of each module.

    Needs no base model. |ΔW| is the Frobenius norm of s A B, the change that
    the adapter makes to a weight (a DoRA's before its magnitudes act; an
    AdaLoRA's with E between A and B): 0 shows one that was never trained.

    [bold]Example[/]

      jpeft inspect my-adapter
    """
    from rich.console import Console

    from jpeft_interop.adapter_summary import summarise

    summary = summarise(adapter)
    console = Console()
    console.print(_config(summary), highlight=False)
    if not brief:
        for table in _tables(summary):
            console.print(table)
    ranks = ", ".join(map(str, sorted({one.rank for one in summary.factors}))) or "none"
    count = f"{len(summary.factors)} modules, rank {ranks}; {len(summary.plain)} other params"
    console.print(f"{count}; {summary.size:,} numbers stored", highlight=False)


def _config(summary: Summary) -> Table:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_row(Text("kind", style="bold"), summary.kind)
    grid.add_row(Text("provenance", style="bold"), summary.provenance)
    for name, value in summary.config.items():
        listed = ", ".join(sorted(map(str, value))) if isinstance(value, list | tuple) else str(value)
        grid.add_row(Text(name, style="bold"), Text(listed if len(listed) <= LONG else listed[: LONG - 1] + "…"))
    return grid


def _tables(summary: Summary) -> list[Table]:
    from rich.table import Table
    from rich.text import Text

    factors = _numbers(Table("module"), ("r", "α", "s", "A", "B", "dtype", "|A|", "|B|", "|ΔW|"))
    for one in summary.factors:
        numbers = (str(one.rank), f"{one.alpha:g}", f"{one.scaling:.4g}", _shape(one.a), _shape(one.b), one.dtype)
        factors.add_row(Text(one.module), *numbers, *(f"{x:.4g}" for x in (one.norm_a, one.norm_b, one.norm)))
    plain = _numbers(Table("param"), ("shape", "dtype", "norm"))
    for one in summary.plain:
        plain.add_row(Text(one.name), _shape(one.shape), one.dtype, f"{one.norm:.4g}")
    return [table for table in (factors, plain) if table.row_count]


def _numbers(table: Table, names: tuple[str, ...]) -> Table:
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
