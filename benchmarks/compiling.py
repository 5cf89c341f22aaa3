"""What do tracing and compiling a lifted step cost, over full fine-tuning of the plain model? And calling it?

    python benchmarks/compiling.py [--unrolled 4 16] [--scanned 4 32] [--rounds 2] [--calls 1000]

Each step is traced and compiled anew every round, the two in turns, with no compilation cache: `jax.clear_caches()`
before each. A call is timed on a model so small that there is nearly nothing to compute: the lifted step beside
`jax.jit` of a plain function that evaluates the very program the lifted one was traced to.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun
from llama_linen import LM
from tables import publish, table
from timing import Compiled, compiled
from training import Row, Subject, linen, trained

import jpeft

SMALL = partial(LM, vocab=512, d=128, ff=344, heads=4)
TINY = LM(vocab=16, d=8, ff=16, heads=2, layers=2)


def lora(model: LM, subject: Subject, batch: int, time: int) -> Row:
    """LoRA of rank 8 on the layers' kernels."""
    kernels = jpeft.kernels(model.apply, {"params": subject.params}, jnp.zeros((batch, time), int))
    return subject.adapted(trained(jpeft.LoRA(8, 16), subject, kernels=kernels))


def anew(row: Row) -> Compiled:
    """Traced and compiled as for the first time."""
    jax.clear_caches()
    loss, *arguments = row
    return compiled(jax.value_and_grad(loss), *arguments)


def compiling(depths: list[int], scan: bool, rounds: int) -> Iterator[list[object]]:
    """A table row a depth."""
    for layers in depths:
        model = SMALL(layers=layers, scan=scan)
        subject = linen(model, 2, 64)
        rows = subject.full(), lora(model, subject, 2, 64)
        pairs = [[anew(row) for row in rows] for _ in range(rounds)]
        middle = lambda read, column, pairs=pairs: median(read(pair[column]) for pair in pairs)
        trace, compile_ = lambda done: done.trace_s, lambda done: done.compile_s
        over = median(total(lifted) / total(full) for full, lifted in pairs)
        seconds = [f"{middle(read, column):.2f}" for read in (trace, compile_) for column in (0, 1)]
        print("scanned" if scan else "unrolled", layers, *seconds, f"{over:.2f}", flush=True)
        yield ["scanned" if scan else "unrolled", layers, *seconds, f"{over:.2f}"]


def total(done: Compiled) -> float:
    """Seconds before the first step."""
    return done.trace_s + done.compile_s


def calling(calls: int) -> tuple[float, float, int]:
    """Microseconds of a call of the lifted step, and of a plain function of the same program; its argument leaves."""
    subject = linen(TINY, 1, 4)
    loss, theta, params = lora(TINY, subject, 1, 4)
    step = jax.value_and_grad(loss)
    lifted, plain = jax.jit(step), jax.jit(same_program(step, theta, params))
    times = [(call(lifted, theta, params), call(plain, theta, params)) for _ in range(calls + 10)][10:]
    lifted_us, plain_us = (1e6 * median(column) for column in zip(*times, strict=True))
    return lifted_us, plain_us, len(jax.tree.leaves((theta, params)))


def same_program(step: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """A function that evaluates the program of another: the same arithmetic and leaves, and nothing of jpeft in it."""
    program, out = jax.make_jaxpr(step, return_shape=True)(*arguments)
    tree = jax.tree.structure(out)
    return lambda *args: jax.tree.unflatten(tree, jaxpr_as_fun(program)(*jax.tree.leaves(args)))


def call(step: Callable[..., Any], *arguments: Any) -> float:
    """Seconds until the call returns, not until its results are there: Python's part and the dispatch."""
    start = time.perf_counter()
    out = step(*arguments)
    seconds = time.perf_counter() - start
    jax.block_until_ready(out)
    return seconds


def main() -> None:
    """Prints a table, and a sentence about calls."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unrolled", type=int, nargs="*", default=[4, 16])
    parser.add_argument("--scanned", type=int, nargs="*", default=[4, 32])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--calls", type=int, default=1000)
    options = parser.parse_args()
    rows = [*compiling(options.unrolled, False, options.rounds), *compiling(options.scanned, True, options.rounds)]
    header = ["form", "layers", "trace s, full", "LoRA", "compile s, full", "LoRA", "LoRA's sum × full"]
    lifted, plain, leaves = calling(options.calls)
    sentence = (
        f"A call with {leaves} argument leaves returns after {lifted:.0f} µs when lifted, after {plain:.0f} µs in "
        f"plain JAX (medians of {options.calls}; {lifted / plain:.2f} ×)."
    )
    publish("compiling", f"{table(header, rows)}\n\n{sentence}")


if __name__ == "__main__":
    main()
