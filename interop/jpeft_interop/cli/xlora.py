"""`jpeft xlora`: experts, and a classifier that mixes them token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from jpeft_interop.cli.arguments import TrainOn, TrainOnOption, require_adapter, require_model

CLASSIFIER, TRAINING, RUN = "The classifier", "Training", "The run"


def xlora(
    out: Annotated[
        Path, Option(help="Where everything goes; an earlier run's is replaced.", rich_help_panel=RUN)
    ] = Path("xlora"),
    experts: Annotated[
        list[Path] | None,
        Option(
            help="A PEFT folder of a LoRA for the model; again for each expert.",
            show_default="one is trained on each kind of text",
            rich_help_panel=RUN,
        ),
    ] = None,
    data: Annotated[
        list[Path] | None,
        Option(
            help="A file of one kind of text (.txt, .jsonl, .csv); again for each kind.",
            show_default="Python's documentation, and its source code",
            rich_help_panel=RUN,
        ),
    ] = None,
    train_on: TrainOnOption = TrainOn.assistant,
    model: Annotated[
        Path | None,
        Option(
            help="A causal language model's folder.",
            show_default="SmolLM2-135M, from its package",
            rich_help_panel=RUN,
        ),
    ] = None,
    seed: Annotated[int, Option(min=0, help="Of everything that is drawn.", rich_help_panel=RUN)] = 0,
    expert_steps: Annotated[
        int, Option(min=1, help="Steps for each expert, 256 tokens each.", rich_help_panel=TRAINING)
    ] = 20,
    steps: Annotated[int, Option(min=1, help="Steps for the classifier.", rich_help_panel=TRAINING)] = 30,
    train_experts: Annotated[
        bool, Option("--train-experts", help="The experts go on learning, too.", rich_help_panel=TRAINING)
    ] = False,
    depth: Annotated[int, Option(min=1, help="Dense layers in it.", rich_help_panel=CLASSIFIER)] = 1,
    hidden: Annotated[int, Option(min=1, help="Their width, from depth 2 on.", rich_help_panel=CLASSIFIER)] = 256,
    layerwise: Annotated[
        bool,
        Option("--layerwise/--shared", help="Scalings for each weight, or for all alike.", rich_help_panel=CLASSIFIER),
    ] = True,
    temperature: Annotated[float, Option(help="Lower is more decided.", rich_help_panel=CLASSIFIER)] = 1.0,
    top_k: Annotated[
        int | None,
        Option(min=1, help="Experts used for a token.", show_default="all", rich_help_panel=CLASSIFIER),
    ] = None,
) -> None:
    """Mix LoRA experts token by token (X-LoRA), and see which one is used where.

    A first pass without experts gives each token's last hidden state; a small
    classifier makes of it how much of each expert the token gets, in each
    adapted weight; a second pass uses them. Experts may differ in what they
    adapt, in rank and in scaling. The classifier is told nothing but the next
    token.

    OUT gets mixture/ (all of it; jpeft.xlora.load reads it), scalings.png (a
    heat map for each kind of text), scalings.json, and experts/, the PEFT
    folders of those that were trained. A few minutes on two cores.

    [bold]Examples[/]

      jpeft xlora --out first-mixture

      jpeft xlora --experts law --experts code --data law.txt --data code.txt
    """
    if model is not None:
        require_model(model)
    for folder in experts or ():
        require_adapter(folder)
    from rich.console import Console

    from jpeft.xlora import XLoRA
    from jpeft_interop.xlora_run import Settings, run

    spec = XLoRA(
        depth=depth,
        hidden=hidden,
        layerwise=layerwise,
        temperature=temperature,
        top_k=top_k,
        train_experts=train_experts,
    )
    settings = Settings(spec, expert_steps, steps, seed, model, tuple(data or ()), tuple(experts or ()), train_on.value)
    run(out, settings, console=Console())
