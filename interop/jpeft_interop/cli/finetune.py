"""`jpeft finetune`: a model folder and a file of examples in, a PEFT folder out."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

from typer import Exit, Option

from jpeft_interop.cli.arguments import ModelArgument, require_model

ADAPTER, TRAINING, DATA, RUN = "The adapter", "Training", "Data", "The run"


class Task(StrEnum):
    """What is learnt."""

    causal_lm = "causal-lm"
    classification = "classification"


class Dtype(StrEnum):
    """What the base's params may be."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def finetune(
    model: ModelArgument,
    data: Annotated[
        Path,
        Option(
            help="Examples: .txt, .jsonl (text or messages) or .csv (text, label).",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ],
    out: Annotated[Path, Option(help="Where everything goes.", show_default=False, rich_help_panel=RUN)],
    task: Annotated[Task, Option(help="What is learnt.", rich_help_panel=DATA)] = Task.causal_lm,
    seq_len: Annotated[int, Option(min=2, help="Tokens in a row.", rich_help_panel=DATA)] = 256,
    holdout: Annotated[float, Option(help="The share of examples held out; 0 for none.", rich_help_panel=DATA)] = 0.1,
    whole_txt: Annotated[
        bool, Option("--whole-txt", help="A .txt is one document, not parted by blank lines.", rich_help_panel=DATA)
    ] = False,
    rank: Annotated[int, Option(min=0, help="LoRA's rank r.", rich_help_panel=ADAPTER)] = 8,
    alpha: Annotated[float | None, Option(help="LoRA's alpha.", show_default="2 r", rich_help_panel=ADAPTER)] = None,
    targets: Annotated[
        str,
        Option(
            help="all-linear, names with commas (q_proj,v_proj), or a regex of the whole path.", rich_help_panel=ADAPTER
        ),
    ] = "all-linear",
    dropout: Annotated[float, Option(help="On the input of the branch.", rich_help_panel=ADAPTER)] = 0.0,
    rslora: Annotated[bool, Option("--rslora", help="Scale by alpha / sqrt(r).", rich_help_panel=ADAPTER)] = False,
    lr: Annotated[
        float, Option(help="The highest learning rate; it warms up, then falls.", rich_help_panel=TRAINING)
    ] = 5e-4,
    epochs: Annotated[float, Option(help="Passes over the data.", rich_help_panel=TRAINING)] = 1.0,
    steps: Annotated[
        int | None, Option(min=1, help="Instead of --epochs.", show_default=False, rich_help_panel=TRAINING)
    ] = None,
    batch_size: Annotated[int, Option(min=1, help="Rows in a step.", rich_help_panel=TRAINING)] = 4,
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
    seed: Annotated[int, Option(min=0, help="Of everything that is drawn.", rich_help_panel=RUN)] = 0,
    save_every: Annotated[int, Option(min=1, help="Steps between checkpoints.", rich_help_panel=RUN)] = 50,
    resume: Annotated[
        bool, Option(help="Go on with an interrupted run in --out, or drop it and begin anew.", rich_help_panel=RUN)
    ] = True,
) -> None:
    """Train a LoRA adapter on your data, and write it as a PEFT folder.

    OUT gets adapter/ (PEFT, transformers and vLLM read it), metrics.jsonl,
    loss.png and checkpoints/. The same command, given again after an
    interruption, goes on where it was, to the same result bit for bit.

    [bold]Examples[/]

      jpeft finetune SmolLM2 --data notes.txt --out run --epochs 3

      jpeft finetune SmolLM2 --data chats.jsonl --out run --rank 16

      jpeft finetune MiniLM --data reviews.csv --task classification --out run
    """
    require_model(model)
    from rich.console import Console

    import jpeft
    from jpeft_interop.finetune import Settings
    from jpeft_interop.finetune import finetune as run

    spec = jpeft.LoRA(
        rank=rank,
        alpha=2 * rank if alpha is None else alpha,
        targets=_targets(targets),
        dropout=dropout,
        rank_stabilized=rslora,
    )
    settings = Settings(
        spec,
        task=task.value,
        lr=lr,
        weight_decay=weight_decay,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        accumulate=accumulate,
        seq_len=seq_len,
        holdout=holdout,
        seed=seed,
        save_every=save_every,
        dtype=dtype and dtype.value,
        whole_txt=whole_txt,
        remat=remat,
    )
    console = Console()
    try:
        result = run(model, data, out, settings, console=console, resume=resume)
    except KeyboardInterrupt:
        console.print("Interrupted. The same command goes on from the last checkpoint.")
        raise Exit(130) from None
    for name, score in (("before", result.before), ("after", result.after)):
        if score is not None:
            perplexity = f"perplexity {score.perplexity:.2f}  " if task is Task.causal_lm else ""
            figures = f"loss {score.loss:.3f}  {perplexity}accuracy {score.accuracy:.1%}"
            console.print(f"held out, {name:6}  {figures}", highlight=False)
    console.print(f"[green]✓[/] {out / 'adapter'}", highlight=False, soft_wrap=True)


def _targets(text: str) -> str | list[str]:
    """Names where there is a comma or nothing but a name; else a regex, or `all-linear`."""
    if text == "all-linear":
        return text
    names = [name.strip() for name in text.split(",")]
    return names if all(name.replace("_", "").replace(".", "").isalnum() for name in names) else text
