"""What does a LoRA training step of jpeft's own models cost, against PEFT's on torch?

    python benchmarks/models.py [--rounds 2] [--models llama bert]

SmolLM2-135M, 4 x 128 tokens, and MiniLM with a classifier on top, 16 x 128 tokens; real weights, fp32, rank 8 on every
linear layer but the head, AdamW. A step is forward, backward and update. Each row is a process of its own, so that two
runtimes' threads do not meet; they take turns, and one that waits does nothing. The losses of the first step, where the
adapter does nothing yet, are compared for SmolLM2: both train the same model.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from tables import publish, table
from timing import ratios

from jpeft_interop.packaged import minilm_folder, smollm2_folder

RANK, ALPHA, RATE = 8, 16, 1e-4
SHAPES = {"llama": (4, 128), "bert": (16, 128)}
NAMES = {"llama": "SmolLM2-135M, 4 × 128 tokens", "bert": "MiniLM, 16 × 128 tokens"}
ROWS = {"PEFT, eager": "eager", "PEFT, sdpa": "sdpa", "jpeft": "jpeft"}


def main() -> None:
    """One table, or one row of it, on demand of standard input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--models", nargs="*", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        work(*options.row)
        return
    lines = [line for model in options.models for line in measured(model, options.rounds)]
    header = ["model", "step", "s", "× PEFT eager", "10th to 90th percentile"]
    publish("models", table(header, lines), ("torch", "peft"))


def measured(model: str, rounds: int) -> list[list[str]]:
    """The rows of one model."""
    workers = {name: Worker(model, how) for name, how in ROWS.items()}
    losses = [worker.first_loss() for worker in workers.values()]
    if model == "llama":
        assert np.ptp(losses) < 1e-3, f"not the same model: {losses}"
    turns = [{name: worker.step() for name, worker in workers.items()} for _ in range(rounds + 1)][1:]
    times = {name: [turn[name] for turn in turns] for name in workers}
    for worker in workers.values():
        worker.close()
    found = ratios(times, "PEFT, eager")
    line = lambda name, ratio: [f"{ratio.median:.2f}", f"{ratio.low:.2f} to {ratio.high:.2f}"]
    return [[NAMES[model], name, f"{np.median(times[name]):.2f}", *line(name, ratio)] for name, ratio in found.items()]


class Worker:
    """A process that does one step whenever it is told to."""

    def __init__(self, model: str, how: str):
        """It starts, compiles and does a first step."""
        command = [sys.executable, __file__, "--row", model, how]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def _answer(self) -> float:
        assert self.process.stdout is not None
        return float(self.process.stdout.readline())

    def first_loss(self) -> float:
        """The loss of the step that it began with."""
        return self._answer()

    def step(self) -> float:
        """Seconds of one more."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """It ends with its input."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def work(model: str, how: str) -> None:
    """A worker's life: the first loss, then seconds for each line that comes in."""
    step = jpeft_step(model) if how == "jpeft" else peft_step(model, how)
    print(step(), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)


def data(model: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, and what is to be learnt of them."""
    ids = np.random.default_rng(0).integers(1000, 30000, SHAPES[model])
    return ids, ids if model == "llama" else np.arange(len(ids)) % 2


def peft_step(model: str, attention: str) -> Callable[[], float]:
    """PEFT's, on torch."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind, folder, task = {
        "llama": (AutoModelForCausalLM, smollm2_folder, "CAUSAL_LM"),
        "bert": (AutoModelForSequenceClassification, minilm_folder, "SEQ_CLS"),
    }[model]
    base = kind.from_pretrained(folder(), attn_implementation=attention, dtype=torch.float32)
    config = LoraConfig(task_type=task, r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    adapted = get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=RATE)
    ids, labels = map(torch.tensor, data(model))

    def step() -> float:
        loss = adapted(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def jpeft_step(model: str) -> Callable[[], Any]:
    """jpeft's, of `jpeft_interop.train`."""
    import jax
    import jax.numpy as jnp
    import optax

    import jpeft
    from jpeft_interop import train
    from jpeft_interop.base import CAUSAL_LM, CLASSIFICATION, load_base

    task, folder = (CAUSAL_LM, smollm2_folder()) if model == "llama" else (CLASSIFICATION, minilm_folder())
    labels = None if model == "llama" else 2
    base = load_base(folder, task, dtype="float32", labels=labels, key=jax.random.key(0))
    ids, wanted = data(model)
    if model == "llama":
        wanted = np.pad(ids[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
    batch = {"input_ids": jnp.asarray(ids), "attention_mask": jnp.ones(ids.shape, int), "labels": jnp.asarray(wanted)}
    kernels = jpeft.kernels(lambda params, ids: base.forward(params, ids).logits, base.params, ids)
    spec = jpeft.LoRA(RANK, ALPHA, modules_to_save=tuple(base.heads))
    adapter = jpeft.init(jax.random.key(1), spec, base.params, kernels=kernels)
    optimizer = optax.adamw(RATE, weight_decay=0.01)
    loss = train.next_token_loss if model == "llama" else train.loss_of_logits
    state = train.start(adapter, optimizer, jax.random.key(2))
    run = train.step(base.forward, optimizer, loss=loss)

    def step() -> float:
        nonlocal state
        state, metrics = run(state, base.params, batch)
        return float(metrics.loss)

    return step


if __name__ == "__main__":
    main()
