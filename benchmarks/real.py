"""What does LoRA cost over the frozen model's own step, on real models: SmolLM2-135M and MiniLM?

    python benchmarks/real.py [--rounds 2] [--models smollm2 minilm scanned] [--dtypes float32 bfloat16]

The weights are those of the packages that `jpeft_interop.packaged` finds, LoRA of rank 8 all-linear in fp32 by
`jpeft.lift`. Each row has its own floor, timed beside it: the same model with the same dtype and the same
rematerialisation, forward and backward through the activations. Rematerialised is the whole loss, products apart, as
`jpeft_interop.train.step(remat=True)` does it. The interop's models have no scanned form: that one is the Linen Llama
at SmolLM2's sizes (but for its grouped keys and values), with random weights.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from llama_linen import LM
from tables import publish, table
from training import HEADER, Subject, cells, linen, measure, next_token, trained

import jpeft
from jpeft_interop import load_model
from jpeft_interop.packaged import minilm_folder, smollm2_folder

SCANNED = LM(vocab=49152, d=576, ff=1536, layers=30, heads=9, scan=True)


def smollm2() -> Subject:
    """Next-token loss of 2 x 256 tokens."""
    forward, params = load_model(smollm2_folder())
    tokens = jax.random.randint(jax.random.key(0), (2, 256), 0, SCANNED.vocab)

    def loss(forward: Callable[..., Any], params: Any, shift: Array | None) -> Array:
        if shift is None:
            return next_token(forward(params, tokens).logits, tokens)
        embedded = params["model"]["embed_tokens"]["embedding"][tokens] + shift
        return next_token(forward(params, inputs_embeds=embedded).logits, tokens)

    return Subject(forward, loss, params, SCANNED.d)


def minilm() -> Subject:
    """Mean-pooled embeddings of 16 pairs of 32 tokens: each to find the other half of its pair."""
    forward, params = load_model(minilm_folder())
    tokens = jax.random.randint(jax.random.key(0), (32, 32), 1000, 30000)

    def loss(forward: Callable[..., Any], params: Any, shift: Array | None) -> Array:
        table = params["embeddings"]["word_embeddings"]["embedding"]
        inputs = {"input_ids": tokens} if shift is None else {"inputs_embeds": table[tokens] + shift}
        pooled = forward(params, **inputs).last_hidden_state.astype(jnp.float32).mean(1)
        unit = pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True)
        left, right = jnp.split(unit, 2)
        return -jnp.diag(jax.nn.log_softmax(20 * left @ right.T)).mean()

    return Subject(forward, loss, params, 384)


def scanned() -> Subject:
    """The Linen Llama, its layers one."""
    return linen(SCANNED, 2, 256)


MODELS = {"smollm2": smollm2, "minilm": minilm, "scanned": scanned}


def cast(subject: Subject, dtype: Any) -> Subject:
    """The same with params of another dtype; the adapter stays in fp32."""
    return dataclasses.replace(subject, params=jax.tree.map(lambda leaf: leaf.astype(dtype), subject.params))


def remat(subject: Subject) -> Subject:
    """The same, all but the products worked out again in the backward pass."""
    policies = jax.checkpoint_policies
    keep = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, jpeft.adapted_saveable)

    def loss(forward: Callable[..., Any], params: Any, shift: Array | None) -> Array:
        return jax.checkpoint(partial(subject.loss, forward), policy=keep)(params, shift)

    return dataclasses.replace(subject, loss=loss)


def variants(name: str, dtypes: list[str]) -> Iterator[tuple[str, Subject]]:
    """The model at each dtype, without and with rematerialisation."""
    whole = MODELS[name]()
    for dtype in dtypes:
        subject = cast(whole, jnp.dtype(dtype))
        yield f"{name}, {dtype}", subject
        yield f"{name}, {dtype}, remat", remat(subject)


def lora(subject: Subject) -> jpeft.Adapter:
    """Rank 8 on all linear layers, in fp32."""
    # Of a stack of layers only the program tells which axes are a kernel's.
    kernels = jpeft.kernels(lambda params: subject.loss(subject.forward, params, None), subject.params)
    adapter = trained(jpeft.LoRA(8, 16, targets="all-linear", exclude="lm_head"), subject, kernels=kernels)
    return adapter.replace(trained=jax.tree.map(lambda leaf: leaf.astype(jnp.float32), adapter.trained))


def lines(name: str, subject: Subject, rounds: int) -> Iterator[list[object]]:
    """A floor's row and LoRA's."""
    measured: Mapping[str, Any] = measure({"floor": subject.floor(), "LoRA": subject.adapted(lora(subject))}, rounds)
    for row, found in measured.items():
        yield [name, *cells(row, found, measured["floor"])]


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtypes", nargs="*", default=["float32"])
    options = parser.parse_args()
    rows = []
    for model in options.models:
        for name, subject in variants(model, options.dtypes):
            rows += lines(name, subject, options.rounds)
            print(*rows[-1], sep=" | ", flush=True)
    publish("real", table(["model", *HEADER], rows))


if __name__ == "__main__":
    main()
