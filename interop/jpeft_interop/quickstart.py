"""The whole way, once: a pretrained model, a LoRA trained in JAX, a PEFT folder, and torch saying the same.

SmolLM2-135M learns the Python language reference (`pydoc_data.topics`), of which some topics are held out. This is also
the example of how the pieces are used, so it calls nothing that is not there for everyone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

import jpeft
from jpeft.errors import JpeftError
from jpeft_interop import data, train
from jpeft_interop.generate import generate
from jpeft_interop.load_model import load_model
from jpeft_interop.load_peft import load_peft
from jpeft_interop.packaged import smollm2_folder
from jpeft_interop.plot import plot_loss
from jpeft_interop.progress import watched
from jpeft_interop.save_peft import save_peft
from jpeft_interop.tokenizer import Tokenizer, load_tokenizer
from jpeft_interop.torch_check import differences, jax_logits, torch_logits

LENGTH, BATCH = 128, 4  # tokens in a block, blocks in a batch
RATE = 2e-3
HELD_OUT = 0.05  # of the topics
SAMPLE = 48  # tokens
MOST_PERPLEXITY = 0.75  # of what it was before
MOST_DIFFERENCE = 1e-3  # between logits here and in torch
SPEC = jpeft.LoRA(rank=8, alpha=16, targets="all-linear")


class QuickstartError(JpeftError):
    """The run did not do what it promises."""


@dataclass(frozen=True)
class Result:
    """What came of it: held-out perplexity before and after, and the largest logit difference to PEFT on torch."""

    before: float
    after: float
    difference: float


def quickstart(
    out: str | Path, *, steps: int, seed: int = 0, model: str | Path | None = None, console: Console
) -> Result:
    """Trains, shows, saves and checks; `out` gets `adapter/` and `loss.png`.

    Args:
      out: a folder; what an earlier run left there is replaced.
      steps: of training, `BATCH` blocks of `LENGTH` tokens each.
      seed: of the topics held out, the adapter's first values and the order of the data.
      model: a Hugging Face folder of a causal language model, SmolLM2-135M from its package if None.
      console: where to show it.

    Raises:
      QuickstartError: the held-out perplexity did not fall by a quarter, or torch's logits differ by more than 1e-3.
    """
    out, key = Path(out), jax.random.key(seed)
    with console.status("Loading the model (the first time, it is converted from its package) …"):
        folder = Path(model) if model else smollm2_folder()
        name = folder.name if model else "SmolLM2-135M-Instruct"
        forward, params = load_model(folder, dtype="float32")
        tokenizer = load_tokenizer(folder)
    learnt, held_out = data.split(topics(), HELD_OUT, seed)
    rows, held_out_rows = data.packed(learnt, tokenizer, LENGTH), data.packed(held_out, tokenizer, LENGTH)
    adapter = jpeft.init(key, SPEC, params)
    _introduce(console, name, adapter, params, learnt, held_out)

    score = train.scorer(forward, loss=train.next_token_loss)
    with console.status(
        "Reading the held-out topics …"
    ):  # the adapter changes nothing yet: this is the model as it came
        before = score(params, adapter, data.in_order(held_out_rows, BATCH))

    optimizer = train.adamw(RATE, steps)
    state, losses = train.start(adapter, optimizer, key), []
    step = train.step(forward, optimizer, loss=train.next_token_loss)
    run = train.run(step, state, params, data.shuffled(rows, BATCH, seed))
    for state, metrics in watched(run, steps, console):  # noqa: B007  # the last state is what was trained
        losses.append(float(metrics.loss))

    with console.status("Reading the held-out topics again …"):
        after = score(params, state.adapter, data.in_order(held_out_rows, BATCH))
    with console.status("Writing a sample of each …"):
        prompt = _prompt(held_out[0], tokenizer)
        samples = [_sample(forward, p, prompt, tokenizer) for p in (params, jpeft.merge(params, state.adapter))]
    _show_samples(console, tokenizer.decode(prompt), samples)

    save_peft(out / "adapter", state.adapter, params=params, base_model=str(folder), task_type="CAUSAL_LM")
    plot_loss(out / "loss.png", losses, {0: before.loss, steps: after.loss}, f"LoRA on {name}")
    with console.status("Loading the folder with PEFT, on torch …"):
        ids = [held_out_rows["input_ids"][0]]
        theirs = torch_logits(folder, out / "adapter", ids)
        ours = jax_logits(forward, params, load_peft(out / "adapter", params), ids)
        difference = differences(ours, theirs, ids)[0].largest
    result = Result(before.perplexity, after.perplexity, difference)
    _conclude(console, result, out)
    return result


def topics() -> list[data.Document]:
    """The Python language reference as the standard library carries it, a document a topic."""
    from pydoc_data.topics import topics as texts

    return [data.Document(text, f"pydoc_data.topics:{name}") for name, text in sorted(texts.items())]


def _prompt(document: data.Document, tokenizer: Tokenizer) -> np.ndarray:
    return tokenizer.encode(document.text)[:24]


def _sample(forward: Any, params: Any, prompt: np.ndarray, tokenizer: Tokenizer) -> str:
    ids = generate(forward, params, prompt[None], max_new_tokens=SAMPLE, eos_token_id=tokenizer.eos)
    return tokenizer.decode(np.asarray(ids)[0, len(prompt) :])


def _introduce(
    console: Console, name: str, adapter: jpeft.Adapter, params: Any, learnt: list[Any], held_out: list[Any]
) -> None:
    topics = ", ".join(document.where.partition(":")[2] for document in held_out)
    table = Table.grid(padding=(0, 2))
    table.add_row("[bold]model", name)
    table.add_row("[bold]adapter", f"LoRA of rank {SPEC.rank} on {len(adapter.sites)} kernels")
    table.add_row("[bold]data", f"the Python language reference: {len(learnt)} topics to learn from")
    table.add_row("[bold]held out", topics)
    console.print(table, str(jpeft.count(params, adapter)), highlight=False)


def _show_samples(console: Console, prompt: str, samples: list[str]) -> None:
    for title, text in zip(("before", "after"), samples, strict=True):
        body = Text.assemble((prompt, "dim"), text)
        console.print(Panel(body, title=f"a greedy sample, {title}", title_align="left", border_style="dim"))


def _conclude(console: Console, result: Result, out: Path) -> None:
    """Says what came of it.

    Raises:
      QuickstartError: it is not what was promised.
    """
    learnt, same = result.after <= MOST_PERPLEXITY * result.before, result.difference <= MOST_DIFFERENCE
    fall = 1 - result.after / result.before
    table = Table.grid(padding=(0, 2))
    figures = f"{result.before:.2f} → {result.after:.2f}, {'down' if fall > 0 else 'up'} {abs(fall):.0%}"
    table.add_row(_mark(learnt), "held-out perplexity", figures, f"at least {1 - MOST_PERPLEXITY:.0%} down")
    table.add_row(
        _mark(same),
        "logits, JAX against PEFT on torch",
        f"max |d| {result.difference:.1e}",
        f"at most {MOST_DIFFERENCE:g}",
    )
    console.print(table, highlight=False)
    console.print(f"adapter  {out / 'adapter'}\nplot     {out / 'loss.png'}", highlight=False, soft_wrap=True)
    if not learnt:
        raise QuickstartError(
            f"held-out perplexity went from {result.before:.2f} to {result.after:.2f}; expected a fall of a quarter"
        )
    if not same:
        raise QuickstartError(
            f"PEFT's logits on torch differ by {result.difference:.2e}; expected at most {MOST_DIFFERENCE:g}"
        )


def _mark(good: bool) -> str:
    return "[green]✓" if good else "[red]✗"
