"""What does a training step with an adapter cost, over the frozen model's own?

    python benchmarks/step.py [--ranks 8 64] [--rounds 4] [--rows lora dora ...] [--layers 8]

The floor is the frozen base: forward, and backward through the activations only. All rows of a rank are compiled by one
process and timed in turns; ratios are to the floor of the same round, their median and their 10th to 90th percentile.
Qwix is there if it is installed, on the same model, with the same kernels and the same rank.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from llama_linen import LM
from tables import publish, table
from training import HEADER, Measured, Row, Subject, cells, linen, measure, trained

import jpeft

BATCH, TIME = 4, 256
EXTRA = ("adalora", "ia3", "qwix")  # at the first rank only
OTHERS = ("lora, forward mode", "lora, dense", "dora, dense")  # on request
ROWS = ("lora", "dora", *EXTRA)


def rows(model: LM, subject: Subject, rank: int, names: tuple[str, ...]) -> dict[str, Row]:
    """The floor, and the rows that are asked for."""
    kernels = jpeft.kernels(model.apply, {"params": subject.params}, jnp.zeros((BATCH, TIME), int))
    adapter = lambda spec: trained(spec, subject, kernels=kernels)
    lora, dora = jpeft.LoRA(rank, 2 * rank), jpeft.DoRA(rank, 2 * rank)
    forward_mode = lambda forward: jpeft.lift(forward, forward_mode=True)
    make = {
        "lora": lambda: subject.adapted(adapter(lora)),
        "dora": lambda: subject.adapted(adapter(dora)),
        "adalora": lambda: subject.adapted(adapter(jpeft.AdaLoRA(rank, max(1, rank // 2), 2 * rank))),
        "ia3": lambda: subject.adapted(adapter(jpeft.IA3())),
        "qwix": lambda: qwix_lora(model, subject, rank),
        "lora, forward mode": lambda: subject.adapted(adapter(lora), forward_mode),
        "lora, dense": lambda: subject.dense(adapter(lora)),
        "dora, dense": lambda: subject.dense(adapter(dora)),
    }
    made = {"floor": subject.floor()} | {name: make[name]() for name in names}
    return {name: row for name, row in made.items() if row is not None}


def qwix_lora(model: LM, subject: Subject, rank: int) -> Row | None:
    """Qwix's LoRA on the kernels that jpeft adapts; None where Qwix isn't installed."""
    if find_spec("qwix") is None:
        print("no row for Qwix: it isn't installed here; `make bench` has an environment with it", flush=True)
        return None
    qwix = import_module("qwix")
    rule = qwix.LoraRule(module_path=r".*_proj", rank=rank, alpha=2 * rank)
    wrapped = qwix.apply_lora_to_model(model, qwix.LoraProvider([rule]))
    made = wrapped.init(jax.random.key(1), jnp.zeros((BATCH, TIME), int))["params"]
    flat = {path: leaf for path, leaf in flatten(made).items() if path[-1].endswith(("_lora_a", "_lora_b"))}
    loss = lambda flat, params: subject.loss(wrapped.apply, nest(flatten(params) | flat), None)
    base = subject.loss(subject.forward, subject.params, None)
    assert jnp.allclose(loss(flat, subject.params), base, rtol=1e-4), "Qwix's model is another one"
    noise = lambda leaf: leaf + 0.01 * jax.random.normal(jax.random.key(3), leaf.shape)
    return loss, jax.tree.map(noise, flat), subject.params


def flatten(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Leaves by path."""
    parts = [flatten(v, (*path, k)) if isinstance(v, Mapping) else {(*path, k): v} for k, v in tree.items()]
    return {key: leaf for part in parts for key, leaf in part.items()}


def nest(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Its inverse."""
    heads = dict.fromkeys(path[0] for path in flat)
    below = {head: {path[1:]: leaf for path, leaf in flat.items() if path[0] == head} for head in heads}
    return {head: paths[()] if () in paths else nest(paths) for head, paths in below.items()}


def factored(subject: Subject, rank: int) -> float:
    """GFLOP that LoRA adds to the floor, counted by hand: 6 n r (in + out) a kernel for n tokens.

    2 n r (in + out) each for the two skinny products forward, their two inputs' gradients, and the two factors'. The
    first layer's q, k and v read the frozen embedding: neither they nor their branch need their input's gradient, which
    the floor works out (its shift is there).
    """
    n = BATCH * TIME
    kernels = {path: leaf for path, leaf in flatten(subject.params).items() if path[-2].endswith("_proj")}
    first = [kernels["layers_0", name, "kernel"] for name in ("q_proj", "k_proj", "v_proj")]
    added = sum(6 * n * rank * sum(leaf.shape) for leaf in kernels.values())
    saved = sum(2 * n * (prod(leaf.shape) + rank * leaf.shape[0]) for leaf in first)
    return (added - saved) / 1e9


def lines(measured: Mapping[str, Measured], added: float) -> Iterator[list[object]]:
    """The table's rows, FLOPs over the factored count's beside them."""
    floor = measured["floor"]
    for name, row in measured.items():
        hand = floor.program.gflop + added
        yield [*cells(name, row, floor), "" if name in ("floor", "ia3") else f"{row.program.gflop / hand - 1:+.1%}"]


def main() -> None:
    """Prints a table for each rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 64])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", nargs="*", choices=[*ROWS, *OTHERS], default=ROWS, help="beside the floor")
    options = parser.parse_args()
    model = LM(layers=options.layers)
    subject = linen(model, BATCH, TIME)
    parts = []
    for i, rank in enumerate(options.ranks):
        names = tuple(name for name in options.rows if not i or name not in EXTRA)
        measured = measure(rows(model, subject, rank, names), options.rounds)
        shown = table([*HEADER, "FLOP, to the count"], lines(measured, factored(subject, rank)))
        parts.append(f"Rank {rank}:\n\n{shown}{over_qwix(measured)}")
    publish("step", "\n\n".join(parts), peers=["qwix"])


def over_qwix(measured: Mapping[str, Measured]) -> str:
    """A sentence, where both were there."""
    if not {"qwix", "lora"} <= set(measured):
        return ""
    ratio = measured["qwix"].ratio.median / measured["lora"].ratio.median
    return f"\n\nQwix's step takes {ratio:.2f} × that of jpeft's LoRA."


if __name__ == "__main__":
    main()
