"""How does the cost of a LoRA step grow with rank, tokens, layers, adapters and targets?

    python benchmarks/growth.py [--rounds 1] [--all] [--questions rank tokens layers adapters targets] [--folder .]

A small Linen Llama (d = 256; one question's size is varied, the others stay at 4 layers, 512 tokens, rank 8, the
layers' seven kernels), every step over its own floor, timed in turns with it. Several adapters are trained by one batch
of 64 examples of 8 tokens, one each in turn, gathered from a stack. Takes every other
size, or `--all`. Writes `growth-QUESTION.png`, and slopes in words.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from jax import Array
from llama_linen import LM
from tables import publish, table
from training import Measured, Row, Subject, linen, measure, trained

import jpeft
from jpeft.stacked import stack

matplotlib.use("Agg")
MODEL = partial(LM, vocab=1024, d=256, ff=688, heads=4)
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
TARGETS = {"attention": ATTENTION, "mlp": MLP, "all-linear": ATTENTION + MLP}


@dataclass(frozen=True)
class Point:
    """One size of a step."""

    rank: int = 8
    tokens: int = 512
    layers: int = 4
    adapters: int = 1
    targets: str = "all-linear"


QUESTIONS: Mapping[str, Sequence[Any]] = {
    "rank": (4, 8, 16, 32, 64, 128, 256),
    "tokens": (256, 512, 1024, 2048, 4096),
    "layers": (4, 8, 16, 32),
    "adapters": (1, 2, 4, 8, 16, 32, 64),
    "targets": tuple(TARGETS),
}


def base(question: str, point: Point) -> Subject:
    """The model; at 64 examples of 8 tokens where the question is how many adapters, else of at most 256."""
    time = 8 if question == "adapters" else min(256, point.tokens)
    return linen(MODEL(layers=point.layers), point.tokens // time, time)


def lora(subject: Subject, point: Point) -> Row:
    """LoRA on the targets; of several adapters, example i has number i modulo their count."""
    spec = jpeft.LoRA(point.rank, 2 * point.rank, targets=TARGETS[point.targets])
    one = trained(spec, subject)
    if point.adapters == 1:
        return subject.adapted(one)
    return several(subject, one, point)


def several(subject: Subject, one: jpeft.Adapter, point: Point) -> Row:
    """Copies of an adapter stacked, all of them trained, each example's gathered from there."""
    examples = jnp.arange(point.tokens // 8) % point.adapters
    lifted = jpeft.lift(subject.forward)

    def loss(leaves: Any, params: Any) -> Array:
        def example(own: Any, tokens: Array) -> Array:
            return lifted({"params": jpeft.attach(params, one.replace(trained=own))}, tokens[None])[0]

        gathered = jax.tree.map(lambda leaf: leaf[examples], leaves)
        return subject.loss(lambda _, tokens: jax.vmap(example)(gathered, tokens), params, None)

    return loss, stack([one] * point.adapters).trained, subject.params


def ask(question: str, rounds: int, every: int) -> dict[Any, tuple[Measured, Measured]]:
    """A floor and a step at each size, or at one in so many and the last."""
    sizes = QUESTIONS[question]
    asked = (*sizes[:-1:every], sizes[-1])
    return {size: pair(question, Point(**{question: size}), rounds) for size in asked}


def pair(question: str, point: Point, rounds: int) -> tuple[Measured, Measured]:
    """The two rows of one size."""
    subject = base(question, point)
    found = measure({"floor": subject.floor(), "LoRA": lora(subject, point)}, rounds)
    return found["floor"], found["LoRA"]


READ: Mapping[str, Callable[[Measured], float]] = {
    "seconds": lambda row: row.seconds,
    "GFLOP": lambda row: row.program.gflop,
    "temporary MiB": lambda row: row.program.temp_mib,
}


def draw(question: str, found: Mapping[Any, tuple[Measured, Measured]], path: Path) -> None:
    """Three panels, LoRA beside the floor."""
    figure, panels = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    for panel, (name, read) in zip(panels, READ.items(), strict=True):
        for column, (label, style) in enumerate((("floor", "o--"), ("LoRA", "o-"))):
            panel.plot(range(len(found)), [read(rows[column]) for rows in found.values()], style, label=label)
        panel.set(title=name, xlabel=question, ylim=(0, None))
        panel.set_xticks(range(len(found)), [str(size) for size in found])
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def slope(question: str, found: Mapping[Any, tuple[Measured, Measured]]) -> str:
    """What a doubling does, by the least squares of the logarithms; of the targets, which costs most."""
    if question == "targets":
        over = ", ".join(f"{name} {lora.ratio.median:.2f} ×" for name, (_, lora) in found.items())
        return f"Targets, over the floor: {over}."
    sizes = np.log2(list(found))
    factor = lambda read, i: 2 ** np.polyfit(sizes, np.log2([read(rows[i]) for rows in found.values()]), 1)[0]
    parts = (f"{name} × {factor(read, 1):.2f} (the floor's × {factor(read, 0):.2f})" for name, read in READ.items())
    return f"Doubling {question}: {', '.join(parts)}."


def lines(question: str, found: Mapping[Any, tuple[Measured, Measured]]) -> list[list[object]]:
    """The table's rows."""
    return [
        [question, size, f"{lora.seconds:.3f}", f"{lora.ratio.median:.2f}", f"{lora.program.gflop:.4g}"]
        + [f"{lora.program.gflop / floor.program.gflop:.2f}", f"{lora.program.temp_mib:.0f}"]
        + [f"{lora.program.temp_mib / floor.program.temp_mib:.2f}"]
        for size, (floor, lora) in found.items()
    ]


def main() -> None:
    """Prints one table and a sentence for each question, and draws a picture of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--all", action="store_true", help="sizes, not every other one")
    parser.add_argument("--questions", nargs="*", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    rows, words = [], []
    for question in options.questions:
        jax.clear_caches()
        found = ask(question, options.rounds, 1 if options.all else 2)
        draw(question, found, options.folder / f"growth-{question}.png")
        rows += lines(question, found)
        words.append(f"- {slope(question, found)}")
        print(words[-1], flush=True)
    header = ["varied", "to", "s", "× floor", "GFLOP", "× floor's", "temporary MiB", "× floor's"]
    sentences = "\n".join(words)
    publish("growth", f"{table(header, rows)}\n\n{sentences}")


if __name__ == "__main__":
    main()
