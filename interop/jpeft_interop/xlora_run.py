"""An X-LoRA, once, on a real model: an expert for each of two kinds of text, and a classifier that tells them apart.

SmolLM2-135M gets an expert on Python's documentation and one on Python's own source code, then a classifier learns,
from the loss of the next token alone, which of them to use, token by token and layer by layer.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import jpeft
from jpeft import xlora
from jpeft.atomic import write_text
from jpeft.errors import JpeftError
from jpeft_interop import data, train, xlora_train
from jpeft_interop.examples import learnt_tokens, unused_fields
from jpeft_interop.load_model import load_model
from jpeft_interop.load_peft import load_peft
from jpeft_interop.packaged import smollm2_folder
from jpeft_interop.progress import watched
from jpeft_interop.quickstart import topics
from jpeft_interop.save_peft import save_peft
from jpeft_interop.tokenizer import Tokenizer, load_tokenizer
from jpeft_interop.train import S
from jpeft_interop.xlora_plot import plot_scalings

LENGTH, BATCH = 128, 2  # tokens in a block, blocks in a batch; of a mixture's batch, half are of each kind
HELD_OUT, HELD_OUT_BATCHES = 0.1, 4
EXPERT_RATE, RATE = 2e-3, 5e-3
# Of different ranks, on different weights: what an X-LoRA may be made of.
SPECS = (
    jpeft.LoRA(rank=8, alpha=16, targets=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]),
    jpeft.LoRA(rank=4, alpha=8, targets=["q_proj", "k_proj", "v_proj", "gate_proj", "down_proj"], rank_stabilized=True),
)
MOST_FILES, MOST_CHARACTERS = 40, 40_000  # of the standard library
MIXTURE, EXPERTS, PLOT, FIGURES = "mixture", "experts", "scalings.png", "scalings.json"


class MixtureError(JpeftError):
    """The run can't be, or did not do what it promises."""


@dataclass(frozen=True)
class Text:
    """One kind of text, in batches of rows.

    Attributes:
      name: what it is called.
      rows: to learn from.
      held_out: to look at.
      learnt: by who says them, how many tokens are learnt and how many there are.
      unused: the fields of its file that nothing uses, and how many rows have them.
    """

    name: str
    rows: data.Rows
    held_out: data.Rows
    learnt: Mapping[str, tuple[int, int]]
    unused: Mapping[str, int]


@dataclass(frozen=True)
class Settings:
    """How the run is done.

    Attributes:
      spec: of the mixture.
      expert_steps: of training, for each expert.
      steps: of training the classifier.
      seed: of what is held out, first values, order and dropout.
      model: a Hugging Face folder of a causal language model, SmolLM2-135M from its package if None.
      texts: files, one a kind of text; the documentation and the source of Python if empty.
      experts: PEFT folders of experts; if empty, one is trained on each kind of text.
      train_on: what is learnt of a conversation: what the `assistant` says, or `all` of it.
    """

    spec: xlora.XLoRA
    expert_steps: int
    steps: int
    seed: int = 0
    model: Path | None = None
    texts: tuple[Path, ...] = ()
    experts: tuple[Path, ...] = ()
    train_on: str = data.ASSISTANT


def run(out: str | Path, settings: Settings, *, console: Console) -> dict[str, xlora_train.Usage]:
    """Trains experts and classifier, shows who is used for what, and writes `mixture/`, `scalings.png` and `.json`.

    Args:
      out: a folder; what an earlier run left there is replaced.
      settings: how.
      console: where to show it.

    Returns:
      the usage of the trained mixture on each kind of text, held out.

    Raises:
      MixtureError: an expert that was trained on a text is not the one most used for it, held out.
      AdapterError: an expert that was given is broken, or not for this model.
    """
    out, key = Path(out), jax.random.key(settings.seed)
    _check(settings)
    with console.status("Loading the model (the first time, it is converted from its package) …"):
        folder = settings.model or smollm2_folder()
        forward, params = load_model(folder, dtype="float32")
        texts = _texts(settings, load_tokenizer(folder))
    given = {path.name: load_peft(path, params) for path in settings.experts}
    experts = given or {
        text.name: _expert(text, number, forward, params, settings, console) for number, text in enumerate(texts)
    }
    hidden = jax.eval_shape(forward, params, texts[0].rows["input_ids"][:1]).last_hidden_state.shape[-1]
    made = xlora.init(jax.random.fold_in(key, 1), settings.spec, experts, features=hidden)
    _introduce(console, made, texts)
    look = xlora_train.usage(forward)
    with console.status("Reading what is held out …"):
        before = {text.name: look(params, made, _held_out(text)) for text in texts}
    made = _learn(made, texts, forward, params, settings, console)
    with console.status("Reading what is held out again …"):
        after = {text.name: look(params, made, _held_out(text)) for text in texts}
    _write(out, made, {} if given else experts, params, after, folder)
    _conclude(console, made, before, after, out, promised=not given)
    return after


def _check(settings: Settings) -> None:
    """Names tell experts and texts apart."""
    for what, paths in (("--experts", settings.experts), ("--data", settings.texts)):
        names = [path.stem if what == "--data" else path.name for path in paths]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise MixtureError(f"{what}: expected different names; found {twice[0]!r} twice")
    if len(settings.texts) == 1:
        raise MixtureError(f"--data: expected two or more kinds of text; found only {settings.texts[0]}")


def _texts(settings: Settings, tokenizer: Tokenizer) -> list[Text]:
    documents: dict[str, list[Any]] = {"prose": list(topics()), "code": source()}
    if settings.texts:
        documents = {path.stem: list(data.read(path)) for path in settings.texts}
    return [_text(name, found, tokenizer, settings) for name, found in documents.items()]


def _text(name: str, documents: list[Any], tokenizer: Tokenizer, settings: Settings) -> Text:
    lessons = [data.lesson(document, tokenizer, settings.train_on) for document in documents]
    learnt, held_out = data.split(lessons, HELD_OUT, settings.seed)
    rows = lambda part: data.blocks(part, tokenizer.eos, LENGTH)
    unused = data.unused(one.fields for one in lessons)
    return Text(name, rows(learnt), rows(held_out), data.learnt_by_role(learnt), unused)


def source() -> list[data.Document]:
    """Some modules of the standard library, a document a file."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = ((path, path.read_text(encoding="utf-8", errors="replace")) for path in files)
    some = ((path, text) for path, text in texts if 1000 < len(text) < MOST_CHARACTERS)
    return [data.Document(text, str(path)) for path, text in itertools.islice(some, MOST_FILES)]


def _held_out(text: Text) -> Iterator[Any]:
    return itertools.islice(data.in_order(text.held_out, BATCH), HELD_OUT_BATCHES)


def _expert(text: Text, number: int, forward: Any, params: Any, settings: Settings, console: Console) -> jpeft.Adapter:
    """A LoRA that learns one kind of text."""
    spec = SPECS[number % len(SPECS)]
    console.print(f"[bold]expert {text.name}[/]  {spec}", highlight=False)
    key = jax.random.fold_in(jax.random.key(settings.seed), 10 + number)
    adapter = jpeft.init(key, spec, params)
    optimizer = train.adamw(EXPERT_RATE, settings.expert_steps)
    state = train.start(adapter, optimizer, key)
    batches = data.shuffled(text.rows, BATCH, settings.seed)
    steps = train.run(train.step(forward, optimizer), state, params, batches)
    return _last(watched(steps, settings.expert_steps, console), state).adapter


def _learn(
    made: xlora.Mixture, texts: Sequence[Text], forward: Any, params: Any, settings: Settings, console: Console
) -> xlora.Mixture:
    """The classifier, on batches of all kinds of text."""
    console.print("[bold]classifier[/]  told nothing but the next token", highlight=False)
    optimizer = train.adamw(RATE, settings.steps)
    state = xlora_train.start(made, optimizer, jax.random.fold_in(jax.random.key(settings.seed), 2))
    steps = train.run(xlora_train.step(forward, optimizer), state, params, _mixed(texts, settings.seed))
    return _last(watched(steps, settings.steps, console), state).mixture


def _last(steps: Iterable[tuple[S, Any]], start: S) -> S:
    """The state after the last of the steps; the one before them, if there are none."""
    return reduce(lambda _, step: step[0], steps, start)


def _mixed(texts: Sequence[Text], seed: int) -> Iterator[Any]:
    """Batches with as many rows of each kind."""
    each = [data.shuffled(text.rows, max(1, BATCH // len(texts)), seed) for text in texts]
    for parts in zip(*each, strict=True):
        yield {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _write(
    out: Path, made: xlora.Mixture, trained: Mapping[str, jpeft.Adapter], params: Any, after: Any, folder: Path
) -> None:
    for name, expert in trained.items():
        save_peft(out / EXPERTS / name, expert, params=params, base_model=str(folder), task_type="CAUSAL_LM")
    xlora.save(out / MIXTURE, made)
    plot_scalings(out / PLOT, made, {name: one.scalings for name, one in after.items()}, "Mean scalings, held out")
    figures = {
        "experts": made.names,
        "layers": [layer.path for layer in xlora.layers_of(made.experts) for _ in range(layer.size)],
        "spec": dataclasses.asdict(made.spec),
        "texts": {name: {"loss": one.loss, "scalings": one.scalings.tolist()} for name, one in after.items()},
    }
    write_text(out / FIGURES, json.dumps(figures))


def mean_of(made: xlora.Mixture, scalings: np.ndarray) -> np.ndarray:
    """(K,): the mean scaling of each expert on the weights that all of them adapt; if there are none, on its own."""
    layers = [layer.path for layer in xlora.layers_of(made.experts) for _ in range(layer.size)]
    acts = np.array([[path in made.experts[name].trained for name in made.names] for path in layers])
    shared = acts.all(axis=1, keepdims=True)
    chosen = acts & shared if np.any(shared) else acts
    return (scalings * chosen).sum(0) / chosen.sum(0)


def _introduce(console: Console, made: xlora.Mixture, texts: Sequence[Text]) -> None:
    table = Table.grid(padding=(0, 2))
    for name, expert in made.experts.items():
        table.add_row(f"[bold]expert {name}", f"{len(expert.sites)} weights, {expert.spec}")
    for text in texts:
        sizes = (data.size_of(text.rows), data.size_of(text.held_out))
        table.add_row(f"[bold]text {text.name}", f"{sizes[0]} blocks of {LENGTH} tokens, {sizes[1]} held out")
        table.add_row("", escape(learnt_tokens(text.learnt)))
        for line in unused_fields(text.unused):
            table.add_row("", escape(line), style="yellow")
    kind = "its own scalings for each adapted weight" if made.spec.layerwise else "one scaling for all weights"
    table.add_row("[bold]classifier", f"depth {made.spec.depth}, {kind}")
    console.print(table, highlight=False)


def _conclude(
    console: Console,
    made: xlora.Mixture,
    before: Mapping[str, xlora_train.Usage],
    after: Mapping[str, xlora_train.Usage],
    out: Path,
    promised: bool,
) -> None:
    """Says what came of it.

    Raises:
      MixtureError: it is not what was promised.
    """
    table = Table("text, held out", *(f"expert {name}" for name in made.names), "loss", box=None)
    for name, usage in after.items():
        shares = (mean_of(made, one.scalings) for one in (before[name], usage))
        cells = [f"{was:.2f} → {is_:.2f}" for was, is_ in zip(*shares, strict=True)]
        table.add_row(name, *cells, f"{before[name].loss:.3f} → {usage.loss:.3f}")
    console.print("mean scalings where the experts meet, before → after:", table, highlight=False)
    console.print(f"mixture  {out / MIXTURE}\nplot     {out / PLOT}", highlight=False, soft_wrap=True)
    for name, usage in after.items() if promised else ():
        most = made.names[int(np.argmax(mean_of(made, usage.scalings)))]
        if most != name:
            raise MixtureError(f"on {name}, held out, the expert {most!r} is used most; expected the one trained on it")
    if promised:
        console.print("[green]✓[/] each kind of text, held out, uses the expert that was trained on it")
