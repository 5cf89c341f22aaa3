"""Fine-tuning a model folder on a file of examples, from the one to a PEFT folder; what `jpeft finetune` does."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

import jpeft
from jpeft.atomic import write_text
from jpeft_interop import data, processes, train
from jpeft_interop.base import CAUSAL_LM, TASKS, Base, load_base
from jpeft_interop.examples import Examples, described, examples_for, unused_fields
from jpeft_interop.load_model import hf_folder, read_config
from jpeft_interop.method_defaults import for_run
from jpeft_interop.metrics import MetricsLog
from jpeft_interop.plot import plot_loss, plot_ranks
from jpeft_interop.progress import watched
from jpeft_interop.run_place import RunPlace
from jpeft_interop.run_settings import Settings as Settings
from jpeft_interop.run_settings import SettingsError as SettingsError
from jpeft_interop.save_peft import save_peft
from jpeft_interop.snapshots import Snapshots, discard, fingerprint, fingerprint_of_rows
from jpeft_interop.tokenizer import load_tokenizer

ADAPTER, METRICS, LABELS, SNAPSHOTS = "adapter", "metrics.jsonl", "labels.json", "checkpoints"
PLOT, RANKS = "loss.png", "ranks.png"


@dataclass(frozen=True)
class Result:
    """What came of it.

    Attributes:
      steps: done.
      before: the held-out score at the start; None where nothing is held out.
      after: the same at the end.
      stopped: whether somebody asked to stop (SIGTERM) before the end; then there are snapshots, and no adapter yet.
    """

    steps: int
    before: train.Score | None
    after: train.Score | None
    stopped: bool = False


def finetune(
    model: str | Path,
    file: str | Path,
    out: str | Path,
    settings: Settings,
    *,
    console: Console,
    resume: bool = True,
    place: RunPlace | None = None,
) -> Result:
    """Trains an adapter; `out` gets `adapter/` (PEFT's format), `metrics.jsonl`, `loss.png` and `checkpoints/`.

    A run that was interrupted goes on where its last snapshot was, to the same result bit for bit; on another mesh, or
    with another number of processes, to the same but for the order of sums. Several processes (see `processes.joined`)
    all call this; process 0 alone writes and prints. SIGTERM ends the run after the step at hand, with a snapshot.

    Args:
      model: a Hugging Face folder, or a GGUF file.
      file: a .txt, .jsonl or .csv file, see `data.read`.
      out: a folder, made if need be; one that all processes see.
      settings: how.
      console: where to show it.
      resume: go on with a run that is there; otherwise its snapshots are dropped.
      place: the mesh to run on; None is one device.

    Raises:
      OSError: a file can't be read or written.
      JpeftError: of the kind that says what is wrong: data, tokenizer, weights, spec, or a run that can't be resumed.
    """
    out = Path(out)
    if place is not None:
        place.check_batch(settings.batch_size, settings.accumulate)
    with console.status("Reading the data …"):
        tokenizer = load_tokenizer(hf_folder(model))
        examples = examples_for(file, tokenizer, settings)
    with console.status("Loading the model …"):
        base = base_for(model, settings, examples.labels, place)
        steps = steps_for(settings, examples.rows)
        adapter = adapter_for(base, settings, examples.rows, steps)
    console.print(f"{jpeft.count(base.params, adapter)}", highlight=False)
    console.print(described(examples, steps, settings), highlight=False, markup=False)
    for line in unused_fields(examples.unused):
        console.print(line, style="yellow", highlight=False, markup=False)
    if not resume and processes.first():
        discard(out / SNAPSHOTS)
    processes.together("snapshots are dropped, or stay")
    state, log = _train(base, adapter, examples, steps, settings, out, console, place)
    if log.done < steps:
        return Result(log.done, log.scores.get(0), None, stopped=True)
    _write(out, state, base, examples, log, place)
    processes.together("all is written")
    return Result(steps, log.scores.get(0), log.scores.get(steps))


def base_for(model: str | Path, settings: Settings, labels: data.Labels | None, place: RunPlace | None = None) -> Base:
    """The model under the head of the task, on the mesh if there is one."""
    count = len(labels.names) if labels else None
    key = jax.random.fold_in(jax.random.key(settings.seed), 1)
    home = place and place.weight
    base = load_base(model, TASKS[settings.task], dtype=settings.dtype, labels=count, key=key, home=home)
    return base if place is None else dataclasses.replace(base, params=place.base(base.params))


def adapter_for(base: Base, settings: Settings, rows: data.Rows, steps: int) -> jpeft.Adapter:
    """A classifier's head is new, so it is trained whole."""
    spec = for_run(settings.spec, read_config(base.folder)["model_type"], steps)
    spec = dataclasses.replace(spec, modules_to_save=(*spec.modules_to_save, *base.heads))
    kernels = jpeft.kernels(lambda params, ids: base.forward(params, ids).logits, base.params, rows["input_ids"][:2])
    return jpeft.init(jax.random.key(settings.seed), spec, base.params, kernels=kernels)


def steps_for(settings: Settings, rows: data.Rows) -> int:
    """How many steps the run has."""
    if settings.steps is not None:
        return settings.steps
    return max(1, math.ceil(settings.epochs * data.size_of(rows) / settings.batch_size))


def _train(
    base: Base,
    adapter: jpeft.Adapter,
    examples: Examples,
    steps: int,
    settings: Settings,
    out: Path,
    console: Console,
    place: RunPlace | None,
) -> tuple[train.State, MetricsLog]:
    assert settings.lr is not None
    adamw = train.adamw(
        settings.lr, steps, warmup=settings.warmup, clip=settings.clip, weight_decay=settings.weight_decay
    )
    optimizer = train.budgeted(adamw, adapter)
    batches = _batches(examples, settings, place)
    homes = place and partial(place.state, base.params)
    state = train.start(adapter, optimizer, jax.random.fold_in(jax.random.key(settings.seed), 2), homes=homes)
    score = scorer_for(base, examples, settings, console, place)
    made_of = _run(base, adapter, examples, steps, settings)
    with processes.asked_to_stop() as asked, Snapshots(out / SNAPSHOTS, made_of) as snapshots:
        state = snapshots.restore(state, batches)
        log = MetricsLog(out / METRICS, int(state.step), writes=processes.first(), agreed=processes.agreed)
        if log.done:
            console.print(f"going on after step {log.done}", highlight=False)
        log.held_out(0, lambda: score(state.adapter))
        step = train.step(
            base.forward,
            optimizer,
            accumulate=settings.accumulate,
            remat=settings.remat,
            loss=loss_for(base),
            homes=place and (place.state(base.params, state), place.whole),
            parts=place and place.parts,
        )
        run = train.run(step, state, base.params, batches)
        for state, metrics in watched(run, steps, console, done=log.done):
            log.step(metrics)
            stop = asked(log.done)
            if stop or log.done % settings.save_every == 0 or log.done == steps:
                snapshots.save(state, batches)
                if isinstance(adapter.spec, jpeft.AdaLoRA):
                    log.ranks(jpeft.ranks(_here(state.adapter, place)))
            if stop:
                break
        if log.done == steps:
            log.held_out(steps, lambda: score(state.adapter))
    return state, log


def _batches(examples: Examples, settings: Settings, place: RunPlace | None) -> Any:
    size = settings.batch_size
    if place is None:
        return data.shuffled(examples.rows, size, settings.seed)
    return place.batches(data.shuffled(examples.rows, size, settings.seed, place.rows_here(size)), size)


def _here(tree: Any, place: RunPlace | None) -> Any:
    return tree if place is None else place.everywhere(tree)


def loss_for(base: Base) -> train.Loss:
    """Of language models the one that needs no logits all at once."""
    return train.next_token_loss if base.task is CAUSAL_LM else train.loss_of_logits


def scorer_for(
    base: Base, examples: Examples, settings: Settings, console: Console, place: RunPlace | None = None
) -> Callable[[Any], Any]:
    """What scores an adapter on the rows held out; None where there are none."""
    score = train.scorer(base.forward, loss=loss_for(base), home=place and place.whole)
    put = (lambda batch: batch) if place is None else place.batch

    def held_out(adapter: jpeft.Adapter) -> train.Score | None:
        if examples.held_out is None:
            return None
        with console.status("Scoring what is held out …"):
            return score(base.params, adapter, map(put, data.in_order(examples.held_out, settings.batch_size)))

    return held_out


def _run(base: Base, adapter: jpeft.Adapter, examples: Examples, steps: int, settings: Settings) -> dict[str, Any]:
    """What the run is made of: whatever changes its result."""
    made_elsewhere = ("spec", "steps", "epochs", "holdout", "seq_len", "save_every", "whole_txt", "train_on")
    plain = {name: value for name, value in vars(settings).items() if name not in made_elsewhere}
    return {
        "spec": dataclasses.asdict(adapter.spec),
        "base": fingerprint(base.params),
        "data": fingerprint_of_rows(examples.rows),
        "number of steps": steps,
        **plain,
    }


def _write(
    out: Path, state: train.State, base: Base, examples: Examples, log: MetricsLog, place: RunPlace | None
) -> None:
    """All processes give what they have of the adapter and its base; process 0 writes."""
    adapter = _here(state.adapter, place)
    is_adalora = isinstance(adapter.spec, jpeft.AdaLoRA)
    kept = jpeft.prune(adapter) if is_adalora else adapter
    save_peft(out / ADAPTER, kept, params=base.params, base_model=str(base.folder), task_type=base.task.peft)
    if not processes.first():
        return
    if is_adalora:
        plot_ranks(out / RANKS, jpeft.ranks(adapter), f"AdaLoRA on {base.folder.name}: the rank of each kernel")
    held_out = {step: score.loss for step, score in log.scores.items()}
    plot_loss(out / PLOT, log.losses, held_out, f"{type(adapter.spec).__name__} on {base.folder.name}")
    if examples.labels is not None:
        names = {"id2label": examples.labels.id2label, "label2id": examples.labels.label2id}
        write_text(out / LABELS, json.dumps(names, indent=2) + "\n")
