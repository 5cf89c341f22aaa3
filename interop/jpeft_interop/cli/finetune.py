"""`jpeft finetune`: a model folder and a file of examples in, a PEFT folder out."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import BadParameter, Exit, Option

from jpeft_interop.cli.arguments import ModelArgument, TrainOn, TrainOnOption, require_model

if TYPE_CHECKING:
    from jpeft.spec import Spec

ADAPTER, TRAINING, DATA, RUN = "The adapter", "Training", "Data", "The run"
DEVICES = "Devices and processes"


class Task(StrEnum):
    """What is learnt."""

    causal_lm = "causal-lm"
    classification = "classification"


class Method(StrEnum):
    """How weights are adapted."""

    lora = "lora"
    dora = "dora"
    adalora = "adalora"
    ia3 = "ia3"


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
    train_on: TrainOnOption = TrainOn.assistant,
    method: Annotated[
        Method, Option(help="How: low-rank (lora, dora, adalora) or by scaling (ia3).", rich_help_panel=ADAPTER)
    ] = Method.lora,
    rank: Annotated[
        int, Option(min=0, help="The rank r; of adalora, the mean rank at the end.", rich_help_panel=ADAPTER)
    ] = 8,
    initial_rank: Annotated[
        int | None,
        Option(min=1, help="Of adalora: every kernel's at the start.", show_default="1.5 r", rich_help_panel=ADAPTER),
    ] = None,
    alpha: Annotated[
        float | None, Option(help="The scaling's numerator.", show_default="2 r", rich_help_panel=ADAPTER)
    ] = None,
    targets: Annotated[
        str,
        Option(
            help="all-linear, names with commas (q_proj,v_proj), or a regex of the whole path. "
            "ia3 takes what is usual for the model.",
            show_default="all-linear",
            rich_help_panel=ADAPTER,
        ),
    ] = "all-linear",
    dropout: Annotated[float, Option(help="On the input of the branch.", rich_help_panel=ADAPTER)] = 0.0,
    rslora: Annotated[bool, Option("--rslora", help="Scale by alpha / sqrt(r).", rich_help_panel=ADAPTER)] = False,
    lr: Annotated[
        float | None,
        Option(
            help="The highest learning rate; it warms up, then falls.",
            show_default="5e-4; adalora 2e-3, ia3 5e-3",
            rich_help_panel=TRAINING,
        ),
    ] = None,
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
    mesh: Annotated[
        str | None,
        Option(
            help="How devices share the work: data=N splits batches, fsdp=N the base's weights too: data=2,fsdp=4.",
            show_default="data=all of them",
            rich_help_panel=DEVICES,
        ),
    ] = None,
    coordinator: Annotated[
        str | None,
        Option(
            help="HOST:PORT where process 0 is reached. TPU pods, SLURM and Open MPI need none of these.",
            show_default=False,
            rich_help_panel=DEVICES,
        ),
    ] = None,
    processes: Annotated[
        int | None,
        Option(
            min=1,
            help="How many there are; 1 for this one alone, in a cluster too.",
            show_default=False,
            rich_help_panel=DEVICES,
        ),
    ] = None,
    process_id: Annotated[
        int | None, Option(min=0, help="Which one this is, from 0.", show_default=False, rich_help_panel=DEVICES)
    ] = None,
    heartbeat: Annotated[
        int, Option(min=1, help="Seconds after which a silent process counts as lost.", rich_help_panel=DEVICES)
    ] = 10,
    stop_code: Annotated[
        int,
        Option(min=0, max=255, help="Exit code when SIGTERM ended it; XPK restarts on 42.", rich_help_panel=DEVICES),
    ] = 0,
) -> None:
    """Train an adapter on your data, and write it as a PEFT folder.

    OUT gets adapter/ (PEFT and transformers read it; a LoRA, vLLM too),
    metrics.jsonl, loss.png (of adalora, ranks.png) and checkpoints/. The same
    command, given again after an interruption, goes on where it was, to the
    same result bit for bit. SIGTERM makes it save the step at hand and end.

    Several processes run this same command: under srun, mpirun or on a TPU pod
    just so, elsewhere with --coordinator, --processes and --process-id. OUT is
    then a folder that all of them see; process 0 writes and prints.

    Of a conversation what the assistant says is learnt, as far as the model's
    chat template lets one tell; a template that does not is an error.

    [bold]Examples[/]

      jpeft finetune SmolLM2 --data notes.txt --out run --epochs 3

      jpeft finetune SmolLM2 --data chats.jsonl --out run --rank 16

      jpeft finetune SmolLM2 --data notes.txt --out run --method dora

      jpeft finetune MiniLM --data reviews.csv --task classification --out run

      srun jpeft finetune LLAMA --data notes.txt --out run --mesh data=2,fsdp=4
    """
    require_model(model)
    from rich.console import Console

    from jpeft_interop.finetune import Settings
    from jpeft_interop.finetune import finetune as run
    from jpeft_interop.processes import first, joined
    from jpeft_interop.run_place import make_run_place

    spec = _spec(method, rank, initial_rank, alpha, targets, dropout, rslora)
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
        train_on=train_on.value,
        remat=remat,
    )
    console = Console()
    try:
        with joined(coordinator, processes, process_id, heartbeat=heartbeat):
            console = Console(quiet=not first())
            result = run(model, data, out, settings, console=console, resume=resume, place=make_run_place(mesh))
    except KeyboardInterrupt:
        console.print("Interrupted. The same command goes on from the last checkpoint.")
        raise Exit(130) from None
    if result.stopped:
        console.print(f"Stopped after step {result.steps}, as asked. The same command goes on.", highlight=False)
        raise Exit(stop_code)
    for name, score in (("before", result.before), ("after", result.after)):
        if score is not None:
            perplexity = f"perplexity {score.perplexity:.2f}  " if task is Task.causal_lm else ""
            figures = f"loss {score.loss:.3f}  {perplexity}accuracy {score.accuracy:.1%}"
            console.print(f"held out, {name:6}  {figures}", highlight=False)
    console.print(f"[green]✓[/] {out / 'adapter'}", highlight=False, soft_wrap=True)


def _spec(
    method: Method,
    rank: int,
    initial_rank: int | None,
    alpha: float | None,
    targets: str,
    dropout: float,
    rslora: bool,
) -> Spec:
    """The spec that the options mean.

    Raises:
      BadParameter: an option of another method.
    """
    import jpeft

    allowed = {"--dropout": method is not Method.ia3, "--rslora": method in (Method.lora, Method.dora)}
    given = {"--dropout": dropout, "--rslora": rslora, "--initial-rank": initial_rank, "--alpha": alpha}
    allowed |= {"--initial-rank": method is Method.adalora, "--alpha": method is not Method.ia3}
    for option, value in given.items():
        if value and not allowed[option]:
            raise BadParameter(f"{option} has no meaning with --method {method.value}")
    alpha = 2 * rank if alpha is None else alpha
    where: Any = {"targets": targets_of(targets)}
    if method is Method.ia3:
        return jpeft.IA3(**where)
    if method is Method.adalora:
        start = max(rank + 1, rank * 3 // 2) if initial_rank is None else initial_rank
        return jpeft.AdaLoRA(rank=start, target_rank=rank, alpha=alpha, dropout=dropout, **where)
    kind = jpeft.DoRA if method is Method.dora else jpeft.LoRA
    return kind(rank=rank, alpha=alpha, dropout=dropout, rank_stabilized=rslora, **where)


def targets_of(text: str) -> str | list[str]:
    """Names where there is a comma or nothing but a name; else a regex, or `all-linear`."""
    if text == "all-linear":
        return text
    names = [name.strip() for name in text.split(",")]
    return names if all(name.replace("_", "").replace(".", "").isalnum() for name in names) else text
