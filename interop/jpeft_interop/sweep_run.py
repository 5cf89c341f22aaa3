"""A grid of runs on one model and one file, all of them trained at the same time; what `jpeft sweep` does."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import jpeft
from jpeft.atomic import write_text
from jpeft.spec import Spec
from jpeft_interop import data, finetune, sweep, train
from jpeft_interop.base import CLASSIFICATION, TASKS, Base
from jpeft_interop.examples import described, examples_for, unused_fields
from jpeft_interop.load_model import hf_folder
from jpeft_interop.metrics import MetricsLog
from jpeft_interop.progress import watched
from jpeft_interop.run_settings import Settings, SettingsError
from jpeft_interop.save_peft import save_peft
from jpeft_interop.sweep_plot import Curve, plot_sweep, smoothed
from jpeft_interop.tokenizer import load_tokenizer
from jpeft_interop.train import Metrics, Score, State

ADAPTERS, METRICS, FIGURES, PLOT = "adapters", "metrics", "sweep.json", "sweep.png"
States = dict[Spec, State]
Found = Mapping[str, Metrics]


@dataclass(frozen=True)
class Outcome:
    """What came of one run.

    Attributes:
      name: of the run, and of its adapter's folder.
      lr: its learning rate.
      seed: of its first values, order of data and dropout.
      spec: of its adapter.
      losses: of step 1, 2 and so on, up to one that is not finite.
      score: on what is held out; None if nothing is, or if it diverged.
      diverged: the step whose loss, or after which the held-out one, is not finite; None if all are.
    """

    name: str
    lr: float
    seed: int
    spec: Spec
    losses: tuple[float, ...]
    score: Score | None
    diverged: int | None = None

    @property
    def train_loss(self) -> float:
        """The mean over the last steps."""
        return float(smoothed(self.losses)[-1]) if self.losses and self.diverged is None else math.nan

    @property
    def loss(self) -> float:
        """What runs are compared by: held out, where anything is."""
        return self.train_loss if self.score is None else self.score.loss


def grid(
    shared: Settings, specs: Mapping[str, Spec], rates: Sequence[float], seeds: Sequence[int]
) -> dict[str, Settings]:
    """The settings of every run, by name: each spec at each rate with each seed.

    Raises:
      SettingsError: the same rate or seed twice, or none at all.

    Example:
      >>> list(grid(Settings(jpeft.LoRA()), {"rank8": jpeft.LoRA()}, [1e-4, 1e-3], [0]))
      ['rank8-lr0.0001-seed0', 'rank8-lr0.001-seed0']
    """
    for what, values in (("learning rate", rates), ("seed", seeds)):
        if not values or len(set(values)) < len(values):
            raise SettingsError(f"expected one {what} or more, each once; found {list(values)}")
    return {
        f"{name}-lr{lr:g}-seed{seed}": replace(shared, spec=spec, lr=lr, seed=seed)
        for (name, spec), lr, seed in itertools.product(specs.items(), rates, seeds)
    }


def run(
    model: str | Path, file: str | Path, out: str | Path, runs: Mapping[str, Settings], *, console: Console
) -> list[Outcome]:
    """Trains all runs, over one base, and compares them; what was in `out` of another sweep is replaced.

    `out` gets `adapters/NAME/` (PEFT's format), `metrics/NAME.jsonl`, `sweep.json` and `sweep.png`. Examples are held
    out once, for all runs the same. Runs of the same spec are one program.

    Args:
      model: a Hugging Face folder, or a GGUF file.
      file: a .txt, .jsonl or .csv file, see `data.read`.
      out: a folder, made if need be.
      runs: of `grid`.
      console: where to show it.

    Returns:
      the outcomes, the best one first.

    Raises:
      OSError: a file can't be read or written.
      JpeftError: of the kind that says what is wrong: data, tokenizer, weights, spec, or that every run diverged.
    """
    out, shared = Path(out), next(iter(runs.values()))
    with console.status("Reading the data …"):
        examples = examples_for(file, load_tokenizer(hf_folder(model)), shared)
    with console.status("Loading the model …"):
        base = finetune.base_for(model, shared, examples.labels)
        steps = finetune.steps_for(shared, examples.rows)
        adapters = {name: finetune.adapter_for(base, one, examples.rows, steps) for name, one in runs.items()}
    programs = len(_groups(adapters))
    compiled = "one compiled step" if programs == 1 else f"{programs} compiled steps"
    console.print(f"{len(runs)} runs over one base, {compiled}", highlight=False)
    console.print(described(examples, steps, shared), highlight=False, markup=False)
    for line in unused_fields(examples.unused):
        console.print(line, style="yellow", highlight=False, markup=False)
    score = finetune.scorer_for(base, examples, shared, console)
    before = score(next(iter(adapters.values())))
    states, logs = _train(base, adapters, runs, examples.rows, steps, out, console)
    trained = _apart(states, adapters)
    outcomes = [_outcome(name, one, logs[name], score, trained[name], steps) for name, one in runs.items()]
    outcomes.sort(key=lambda one: (math.isnan(one.loss), one.loss))
    _write(out, outcomes, trained, base, before)
    if examples.labels is not None:
        _write_json(out / finetune.LABELS, {n: getattr(examples.labels, n) for n in ("id2label", "label2id")})
    _conclude(console, outcomes, before, out, base)
    return outcomes


def _train(
    base: Base,
    adapters: Mapping[str, jpeft.Adapter],
    runs: Mapping[str, Settings],
    rows: data.Rows,
    steps: int,
    out: Path,
    console: Console,
) -> tuple[States, dict[str, MetricsLog]]:
    """The last states, and each run's figures; a run that diverges is noted no further."""
    shared = next(iter(runs.values()))
    adamw = train.adamw(1.0, steps, warmup=shared.warmup, clip=shared.clip, weight_decay=shared.weight_decay)
    start = lambda name: _start(adapters[name], adamw, runs[name])
    states = {spec: sweep.stacked([start(name) for name in names]) for spec, names in _groups(adapters).items()}
    options = {"accumulate": shared.accumulate, "remat": shared.remat, "loss": finetune.loss_for(base)}
    step = sweep.step(base.forward, sweep.at_rate(adamw), **options)
    advance = lambda states, params, batches: _advance(step, states, params, batches, _groups(adapters))
    logs = {name: MetricsLog(out / METRICS / f"{name}.jsonl", done=0) for name in runs}
    begun = train.run(advance, (states, {}), base.params, _batches(rows, runs))
    for number, ((last, found), _) in enumerate(watched(begun, steps, console)):
        states = last
        for name, metrics in found.items():
            if logs[name].done == number and math.isfinite(metrics.loss):
                logs[name].step(metrics)
    return states, logs


def _batches(rows: data.Rows, runs: Mapping[str, Settings]) -> Iterator[dict[str, train.Batch]]:
    """Of every run, the next batch of its seed; without end."""
    feeds = {one.seed: data.shuffled(rows, one.batch_size, one.seed) for one in runs.values()}
    while True:
        batches = {seed: next(feed) for seed, feed in feeds.items()}
        yield {name: batches[one.seed] for name, one in runs.items()}


def _groups(adapters: Mapping[str, jpeft.Adapter]) -> dict[Spec, list[str]]:
    """The names of the runs that can be one program: those of the same spec."""
    groups: dict[Spec, list[str]] = {}
    for name, adapter in adapters.items():
        groups.setdefault(adapter.spec, []).append(name)
    return groups


def _start(adapter: jpeft.Adapter, optimizer: Any, settings: Settings) -> State:
    assert settings.lr is not None
    key = jax.random.fold_in(jax.random.key(settings.seed), 2)
    return train.start(adapter, sweep.at_rate(optimizer, settings.lr), key)


def _advance(
    step: Callable[..., tuple[State, Metrics]],
    before: tuple[States, Found],
    params: Any,
    batches: Mapping[str, train.Batch],
    groups: Mapping[Spec, Sequence[str]],
) -> tuple[tuple[States, Found], Metrics]:
    """One step of every run, on its batch; the metrics of each, and those of all."""
    states: States = {}
    found: dict[str, Metrics] = {}
    for spec, names in groups.items():
        batch = sweep.stacked([batches[name] for name in names])
        states[spec], metrics = step(before[0][spec], params, batch)
        metrics = jax.device_get(metrics)
        found |= {name: sweep.one_of(metrics, number) for number, name in enumerate(names)}
    return (states, found), _of_all(found)


def _of_all(found: Found) -> Metrics:
    """The mean loss of the runs that have not diverged, and the tokens of all."""
    some = next(iter(found.values()))
    losses = [one.loss for one in found.values() if math.isfinite(one.loss)]
    return replace(
        some,
        loss=np.mean(losses) if losses else some.loss,
        tokens=np.sum([one.tokens for one in found.values()]),
    )


def _apart(states: States, adapters: Mapping[str, jpeft.Adapter]) -> dict[str, jpeft.Adapter]:
    """Each run's adapter, in the host's memory."""
    found = {}
    for spec, names in _groups(adapters).items():
        group = jax.device_get(states[spec].adapter)
        found |= {name: sweep.one_of(group, number) for number, name in enumerate(names)}
    return found


def _outcome(
    name: str,
    settings: Settings,
    log: MetricsLog,
    score: Callable[[jpeft.Adapter], Score | None],
    adapter: jpeft.Adapter,
    steps: int,
) -> Outcome:
    assert settings.lr is not None
    outcome = Outcome(name, settings.lr, settings.seed, settings.spec, tuple(log.losses), None)
    if log.done < steps:
        return replace(outcome, diverged=log.done + 1)
    final = score(adapter)
    if final is not None and not math.isfinite(final.loss):
        return replace(outcome, diverged=steps)
    log.held_out(steps, lambda: final)
    return replace(outcome, score=final)


def _write(
    out: Path, outcomes: Sequence[Outcome], adapters: Mapping[str, jpeft.Adapter], base: Base, before: Score | None
) -> None:
    options: Any = {"params": base.params, "base_model": str(base.folder), "task_type": base.task.peft}
    for one in outcomes:
        if one.diverged is None:
            save_peft(out / ADAPTERS / one.name, adapters[one.name], **options)
    figures = {
        "model": str(base.folder),
        "best": _best(outcomes),
        "held out before": before and _figures(before),
        "runs": [_row(one) for one in outcomes],
    }
    _write_json(out / FIGURES, figures)
    curves = {one.name: _curve(one) for one in sorted(outcomes, key=lambda one: (one.lr, one.name))}
    compared_by = "training loss at the end" if before is None else "held-out loss"
    plot_sweep(out / PLOT, curves, _best(outcomes), compared_by, f"{len(curves)} runs on {base.folder.name}")


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def _best(outcomes: Sequence[Outcome]) -> str | None:
    """The name of the first of the sorted outcomes, unless that diverged, too."""
    return None if math.isnan(outcomes[0].loss) else outcomes[0].name


def _row(one: Outcome) -> dict[str, Any]:
    return {
        "name": one.name,
        "lr": one.lr,
        "seed": one.seed,
        "spec": asdict(one.spec),
        "training loss": None if one.diverged else one.train_loss,
        "held out": one.score and _figures(one.score),
        "diverged at step": one.diverged,
    }


def _figures(score: Score) -> dict[str, float]:
    return {**asdict(score), "perplexity": score.perplexity}


def _curve(one: Outcome) -> Curve:
    return Curve(one.lr, one.name.partition("-lr")[0], one.losses, None if math.isnan(one.loss) else one.loss)


def _conclude(console: Console, outcomes: Sequence[Outcome], before: Score | None, out: Path, base: Base) -> None:
    classes = base.task is TASKS[CLASSIFICATION.name]
    tell = (lambda s: f"{s.accuracy:.1%}") if classes else (lambda s: f"{s.perplexity:.2f}")
    of = lambda score: (f"{score.loss:.4f}", tell(score)) if score else ("", "")
    table = Table("", "run", "training loss", "held-out loss", "accuracy" if classes else "perplexity", box=None)
    for column in table.columns[2:]:
        column.justify = "right"
    for one in outcomes:
        best = one.name == _best(outcomes)
        training = f"{one.train_loss:.4f}" if one.diverged is None else f"diverged at step {one.diverged}"
        table.add_row("[green]★[/]" if best else "", one.name, training, *of(one.score), style="bold" if best else "")
    if before is not None:
        table.add_row("", "[dim]untrained[/]", "", *of(before), style="dim")
    console.print(table, highlight=False)
    best = _best(outcomes)
    if best is not None:
        console.print(f"[green]✓[/] {out / ADAPTERS / best}", highlight=False, soft_wrap=True)
    console.print(f"  {out / PLOT}, {out / FIGURES}", highlight=False, soft_wrap=True)
