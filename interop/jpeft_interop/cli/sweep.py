"""`jpeft sweep`: learning rates, seeds and ranks tried at the same time over one base, and compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from typer import Argument, BadParameter, Option

from jpeft_interop.cli.arguments import ModelArgument, TrainOn, TrainOnOption, require_model
from jpeft_interop.cli.finetune import ADAPTER, DATA, RUN, TRAINING, Dtype, Method, Task, targets_of

if TYPE_CHECKING:
    from jpeft.spec import Spec

GRID = "The grid: several values with commas"
N = TypeVar("N", int, float)


def sweep(
    model: ModelArgument,
    data: Annotated[
        Path,
        Argument(
            metavar="DATA",
            help="Examples: .txt, .jsonl (text or messages) or .csv (text, label).",
            show_default=False,
        ),
    ],
    out: Annotated[Path, Option(help="Where everything goes.", show_default=False, rich_help_panel=RUN)],
    lr: Annotated[
        str, Option(help="The highest learning rates; each warms up, then falls.", rich_help_panel=GRID)
    ] = "1e-4,3e-4,1e-3,3e-3",
    seed: Annotated[
        str, Option(help="Of first values, dropout and the order of the data.", rich_help_panel=GRID)
    ] = "0,1",
    rank: Annotated[str, Option(help="The rank r; each is a compiled step of its own.", rich_help_panel=GRID)] = "8",
    alpha: Annotated[
        str | None,
        Option(
            help="The scaling's numerator; each is a compiled step of its own.",
            show_default="2 r",
            rich_help_panel=GRID,
        ),
    ] = None,
    task: Annotated[Task, Option(help="What is learnt.", rich_help_panel=DATA)] = Task.causal_lm,
    seq_len: Annotated[int, Option(min=2, help="Tokens in a row.", rich_help_panel=DATA)] = 256,
    holdout: Annotated[
        float, Option(help="The share of examples held out, the same for all runs; 0 for none.", rich_help_panel=DATA)
    ] = 0.1,
    whole_txt: Annotated[
        bool, Option("--whole-txt", help="A .txt is one document, not parted by blank lines.", rich_help_panel=DATA)
    ] = False,
    train_on: TrainOnOption = TrainOn.assistant,
    method: Annotated[Method, Option(help="lora or dora.", rich_help_panel=ADAPTER)] = Method.lora,
    targets: Annotated[
        str,
        Option(
            help="all-linear, names with commas (q_proj,v_proj), or a regex of the whole path.",
            rich_help_panel=ADAPTER,
        ),
    ] = "all-linear",
    dropout: Annotated[float, Option(help="On the input of the branch.", rich_help_panel=ADAPTER)] = 0.0,
    epochs: Annotated[float, Option(help="Passes over the data.", rich_help_panel=TRAINING)] = 1.0,
    steps: Annotated[
        int | None, Option(min=1, help="Instead of --epochs.", show_default=False, rich_help_panel=TRAINING)
    ] = None,
    batch_size: Annotated[int, Option(min=1, help="Rows in a step of each run.", rich_help_panel=TRAINING)] = 4,
    accumulate: Annotated[
        int, Option(min=1, help="Work through a batch in so many parts.", rich_help_panel=TRAINING)
    ] = 1,
    weight_decay: Annotated[float, Option(help="AdamW's, on the adapter.", rich_help_panel=TRAINING)] = 0.0,
    dtype: Annotated[
        Dtype | None, Option(help="Of the base's weights.", show_default="the folder's", rich_help_panel=TRAINING)
    ] = None,
    remat: Annotated[
        bool,
        Option("--remat", help="Less memory, more time: compute again in the backward pass.", rich_help_panel=TRAINING),
    ] = False,
) -> None:
    """Try learning rates, seeds and ranks at the same time, and see which is best.

    Every combination is a run with an adapter, an optimizer and an order of the
    data of its own; the base is in memory once, and all runs of a rank are one
    compiled step. It takes the time of the runs one by one and little more
    memory than one of them. Held-out examples are the same for all.

    OUT gets adapters/NAME/ for each run (PEFT and transformers read them),
    sweep.png (how each learnt, and the loss over the learning rate), sweep.json
    (all figures, best run first) and metrics/NAME.jsonl. A run whose loss is no
    longer finite is left out; the others go on. An interrupted sweep begins anew.

    [bold]Examples[/]

      jpeft sweep SmolLM2 notes.txt --out sweep --lr 1e-4,3e-4,1e-3 --seed 0,1

      jpeft sweep SmolLM2 notes.txt --out sweep --rank 4,16,64 --lr 1e-3 --steps 50

      jpeft sweep MiniLM reviews.csv --task classification --out sweep

      jpeft generate SmolLM2 --adapter sweep/adapters/rank8-lr0.001-seed0
    """
    require_model(model)
    rates, seeds, ranks = _numbers("--lr", lr, float), _numbers("--seed", seed, int), _numbers("--rank", rank, int)
    alphas = None if alpha is None else _numbers("--alpha", alpha, float)
    if method not in (Method.lora, Method.dora):
        raise BadParameter(f"sweep trains lora or dora; found --method {method.value}: use jpeft finetune")
    from rich.console import Console

    from jpeft_interop.finetune import Settings
    from jpeft_interop.sweep_run import grid, run

    specs = _specs(method, ranks, alphas, {"targets": targets_of(targets), "dropout": dropout})
    shared = Settings(
        next(iter(specs.values())),
        task=task.value,
        weight_decay=weight_decay,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        accumulate=accumulate,
        seq_len=seq_len,
        holdout=holdout,
        dtype=dtype and dtype.value,
        whole_txt=whole_txt,
        train_on=train_on.value,
        remat=remat,
    )
    run(model, data, out, grid(shared, specs, rates, seeds), console=Console())


def _numbers(option: str, text: str, kind: Callable[[str], N]) -> list[N]:
    """The numbers between the commas.

    Raises:
      BadParameter: something else is there, or a number twice.
    """
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        raise BadParameter(f"{option} takes numbers with commas between them, as 1,2; found {text!r}") from None
    if len(set(found)) < len(found):
        raise BadParameter(f"{option} has a number twice: {text!r}")
    return found


def _specs(method: Method, ranks: list[int], alphas: list[float] | None, common: dict[str, Any]) -> dict[str, Spec]:
    """By name, every rank with every alpha."""
    import jpeft

    kind = jpeft.DoRA if method is Method.dora else jpeft.LoRA
    if alphas is None:
        return {f"rank{r}": kind(rank=r, alpha=2 * r, **common) for r in ranks}
    return {f"rank{r}-alpha{a:g}": kind(rank=r, alpha=a, **common) for r in ranks for a in alphas}
