"""Which form of the frozen product with a low-rank branch, `x W + s (x A) B`, costs least on this device?

    python benchmarks/products.py [--rank 8] [--rounds 3] [--shapes 1024x512x512 ...] [--dtype float32]

Forms, each for one kernel and for three that share their input (q, k and v), forward alone, and forward and backward
through the activations and the factors; all rows are timed in turns, and divided by the frozen product's of the round:

    plain         as everyone writes it, differentiated by JAX
    plain, held   the same, `optimization_barrier` around the skinny products
    fused         its derivative written out (a `custom_vjp`)
    fused, held   both
    one A         fused; the kernels that share their input have one skinny product with all their A side by side
    lift          what `jpeft.lift` makes of `x @ W` here

For a TPU that is not here, its compiler says what it makes of the same forms, in an environment of its own:

    python -m venv .venv-tpu && .venv-tpu/bin/pip install --constraint constraints.txt jax flax optax safetensors libtpu
    PYTHONPATH=. .venv-tpu/bin/python benchmarks/products.py --tpu v5e:2x2 [--dtype bfloat16] [--shapes 8192x4096x4096]
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

if "--tpu" in sys.argv:  # before JAX looks for one: it is only compiled for
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}

import jax
import jax.numpy as jnp
from jax import Array
from tables import publish, table
from timing import in_turns, ratios

import jpeft

S = 2.0
SMALL = ("512x576x576", "512x576x1536", "512x1536x576", "1024x1024x2816")
LARGE = ("8192x4096x4096", "8192x4096x14336", "8192x14336x4096")

Arrays = Sequence[Array]
Form = Callable[[Array, Arrays, Arrays, Arrays], Arrays]


def base(x: Array, ws: Arrays, as_: Arrays, bs: Arrays) -> Arrays:
    """The frozen products alone."""
    return [x @ w for w in ws]


def plain(hold: Callable[[Array], Array], x: Array, ws: Arrays, as_: Arrays, bs: Arrays) -> Arrays:
    """The branch as it is written in a paper."""
    return [x @ w + hold(S * hold(x @ a) @ b) for w, a, b in zip(ws, as_, bs, strict=True)]


def fused(hold: Callable[[Array], Array], x: Array, ws: Arrays, as_: Arrays, bs: Arrays) -> Arrays:
    """The branch with its derivative written out."""

    @jax.custom_vjp
    def branch(x: Array, a: Array, b: Array) -> Array:
        return hold(hold(x @ a) @ (S * b))

    def forward(x: Array, a: Array, b: Array) -> tuple[Array, Arrays]:
        h = hold(x @ a)
        return hold(h @ (S * b)), (x, a, b, h)

    def backward(saved: Arrays, g: Array) -> tuple[Array, Array, Array]:
        x, a, b, h = saved
        dh = hold(g @ (S * b).T)
        return hold(dh @ a.T), hold(dh.T @ x).T, S * hold(h.T @ g)

    branch.defvjp(forward, backward)
    return [x @ w + branch(x, a, b) for w, a, b in zip(ws, as_, bs, strict=True)]


def one_a(hold: Callable[[Array], Array], x: Array, ws: Arrays, as_: Arrays, bs: Arrays) -> Arrays:
    """`fused`, with one skinny product each way for all the kernels."""
    split = lambda h: jnp.split(h, len(ws), axis=-1)

    @jax.custom_vjp
    def branches(x: Array, a: Array, bs: Arrays) -> Arrays:
        return [hold(h @ (S * b)) for h, b in zip(split(hold(x @ a)), bs, strict=True)]

    def forward(x: Array, a: Array, bs: Arrays) -> tuple[Arrays, tuple]:
        h = hold(x @ a)
        return [hold(part @ (S * b)) for part, b in zip(split(h), bs, strict=True)], (x, a, bs, h)

    def backward(saved: tuple, gs: Arrays) -> tuple[Array, Array, Arrays]:
        x, a, bs, h = saved
        dh = jnp.concatenate([hold(g @ (S * b).T) for g, b in zip(gs, bs, strict=True)], -1)
        return hold(dh @ a.T), hold(dh.T @ x).T, [S * hold(part.T @ g) for part, g in zip(split(h), gs, strict=True)]

    branches.defvjp(forward, backward)
    added = branches(x, jnp.concatenate(as_, -1), list(bs))
    return [x @ w + z for w, z in zip(ws, added, strict=True)]


def lifted(x: Array, ws: Arrays, as_: Arrays, bs: Arrays) -> Arrays:
    """What `jpeft.lift` makes of the frozen products."""
    params = {f"l{i}": {"kernel": w} for i, w in enumerate(ws)}
    shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), params)
    rank = as_[0].shape[-1]
    adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank, S * rank, targets="all-linear"), shapes)
    trained = {f"l{i}/kernel": {"a": a, "b": b} for i, (a, b) in enumerate(zip(as_, bs, strict=True))}
    products = lambda params, x: [x @ layer["kernel"] for layer in params.values()]
    return jpeft.lift(products)(jpeft.attach(params, adapter.replace(trained=trained)), x)


held, free = jax.lax.optimization_barrier, lambda x: x
FORMS: dict[str, Form] = {
    "base": base,
    "plain": partial(plain, free),
    "plain, held": partial(plain, held),
    "fused": partial(fused, free),
    "fused, held": partial(fused, held),
    "one A": partial(one_a, free),
    "one A, held": partial(one_a, held),
    "lift": lifted,
}


def forward_only(form: Form) -> Callable[..., Any]:
    """The form, as a function of all that is timed."""
    return lambda x, ws, as_, bs, gs: form(x, ws, as_, bs)


def with_backward(form: Form) -> Callable[..., Any]:
    """The form and its derivatives: by the activations, and by the factors where there are some."""

    def step(x: Array, ws: Arrays, as_: Arrays, bs: Arrays, gs: Arrays) -> Any:
        by = (x,) if form is base else (x, as_, bs)
        ys, pull = jax.vjp(lambda x, as_=as_, bs=bs: form(x, ws, as_, bs), *by)
        return ys, pull(gs)

    return step


PASSES = {"forward": forward_only, "forward, backward": with_backward}


def inputs(shape: str, rank: int, kernels: int, dtype: Any) -> tuple[Any, ...]:
    """The shapes of x, W, A, B and the gradients that come in."""
    rows, wide, out = map(int, shape.split("x"))
    of = lambda *sizes: jax.ShapeDtypeStruct(sizes, dtype)
    several = lambda *sizes: [of(*sizes)] * kernels
    return of(rows, wide), several(wide, out), several(wide, rank), several(rank, out), several(rows, out)


def drawn(shapes: Any) -> Any:
    """Random arrays of such shapes."""
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    draw = lambda key, leaf: (jax.random.normal(key, leaf.shape) * leaf.shape[0] ** -0.5).astype(leaf.dtype)
    return jax.tree.unflatten(tree, [draw(key, leaf) for key, leaf in zip(keys, leaves, strict=True)])


def cases(options: argparse.Namespace) -> Iterator[tuple[list[str], tuple[Any, ...], dict[str, Callable[..., Any]]]]:
    """What a row says first, the shapes, and the steps by the name of the form."""
    for shape in options.shapes:
        for kernels in (1, 3):
            for name, wrap in PASSES.items():
                forms = {form: wrap(function) for form, function in FORMS.items() if kernels > 1 or "one" not in form}
                yield [shape, str(kernels), name], inputs(shape, options.rank, kernels, options.dtype), forms


def measure(options: argparse.Namespace) -> str:
    """One row a case: seconds of the frozen product, and how many times as long each form takes."""
    others = [form for form in FORMS if form != "base"]
    rows = []
    for about, shapes, forms in cases(options):
        arrays = drawn(shapes)
        steps = {name: jax.jit(form).lower(*arrays).compile() for name, form in forms.items()}
        times = in_turns({name: partial(step, *arrays) for name, step in steps.items()}, options.rounds)
        found = ratios(times, "base")
        cell = lambda form, found=found: (
            f"{found[form].median:.2f} ({found[form].low:.2f}-{found[form].high:.2f})" if form in found else ""
        )
        rows.append([*about, f"{1e3 * sorted(times['base'])[len(times['base']) // 2]:.2f}", *map(cell, others)])
        print(*rows[-1], file=sys.stderr, flush=True)
    return table(["rows x in x out", "kernels", "pass", "base, ms", *others], rows)


def compile_for_tpu(options: argparse.Namespace) -> str:
    """One row a form: what the TPU's compiler says about the program that it made."""
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name=options.tpu).devices[0]
    there = jax.sharding.SingleDeviceSharding(device)
    rows = []
    for about, shapes, forms in cases(options):
        floor = None
        placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there), shapes)
        for name, form in forms.items():
            if name == "lift":
                continue  # which asks JAX what platform it runs on
            found = facts(jax.jit(form).lower(*placed).compile())
            floor = floor or found
            relative = [f"{found[key] / floor[key]:.3f}" if floor[key] else "" for key in ("cycles", "bytes", "flops")]
            counts = [str(found[key]) for key in ("products", "fusions", "copies")]
            rows.append(
                [*about, name, f"{found['cycles'] / 1e3:.0f}", *relative, *counts, f"{found['temp'] / 2**20:.0f}"]
            )
            print(*rows[-1], file=sys.stderr, flush=True)
    return table(
        ["rows x in x out", "kernels", "pass", "form", "1000 cycles", "x base", "bytes x", "flops x"]
        + ["products", "fusions", "copies", "temporary MiB"],
        rows,
    )


def facts(step: Any) -> dict[str, float]:
    """What the compiler estimates, and what it made: of the entry computation alone, which calls all others."""
    text = step.as_text()
    entry = text[text.index("\nENTRY ") :]
    cost = step.cost_analysis()
    return {
        "cycles": sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', entry))),
        "bytes": cost.get("bytes accessed", 0.0),
        "flops": cost.get("flops", 0.0),
        "products": len(re.findall(r" (?:convolution|dot)\(", text)),
        "fusions": len(re.findall(r" fusion\(", entry)),
        "copies": len(re.findall(r" (?:copy|copy-start|transpose)\(", entry)),
        "temp": step.memory_analysis().temp_size_in_bytes,
    }


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--shapes", nargs="*", help="rows x in x out; by default small ones on a CPU, an LLM's elsewhere"
    )
    parser.add_argument("--dtype", help="float32 on a CPU, bfloat16 elsewhere, if not given")
    parser.add_argument("--tpu", metavar="TOPOLOGY", help="compile for such a TPU (v5e:2x2), and run nothing")
    options = parser.parse_args()
    small = not options.tpu and jax.default_backend() == "cpu"
    options.shapes = options.shapes or (SMALL if small else LARGE)
    options.dtype = jnp.dtype(options.dtype or ("float32" if small else "bfloat16"))
    about = f"Rank {options.rank}, {options.dtype.name}.\n\n"
    if options.tpu:
        publish("products-tpu", f"Compiled for {options.tpu}, not run. {about}{compile_for_tpu(options)}")
    else:
        publish("products", about + measure(options))


if __name__ == "__main__":
    main()
