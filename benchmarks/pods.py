"""What an adapter adds to a step of a pod: a model shaped like Llama 3 70B on 256 and on 4,096 chips that are not here.

    python -m venv .venv-tpu && .venv-tpu/bin/pip install --constraint constraints.txt jax flax optax safetensors libtpu
    PYTHONPATH=. .venv-tpu/bin/python benchmarks/pods.py [--topology v5e:16x16 --mesh data=1,fsdp=32,tensor=8 ...]

libtpu's compiler needs no TPU: it is given the topology, and says what each chip holds and what moves between them. The
layers are scanned, each checkpointed; the base is split along `fsdp` and `tensor`, the batch along `data` and `fsdp`.
Of what moves, "like the base" is what has the sizes of a weight, whole or in parts: under `fsdp` each layer's are
gathered when it runs, with an adapter and without. (Rank 24, as 8192 × 16 is a part of 8192 × 8192.)
The steps: the frozen model, forward and backward through its activations; the same with an adapter's gradients and
AdamW; and the whole model trained, for comparison. Nothing is run.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tables import publish, table

import jpeft
from jpeft.testing import base_bytes, collectives

LAYERS, D, FF, HEADS, KV, HEAD, VOCAB = 80, 8192, 28672, 64, 8, 128, 128256
ROWS = P(("data", "fsdp"))
STREAM = P(("data", "fsdp"), "tensor")  # between layers the tokens are split too, as what is kept of each layer is
KERNELS = {  # each: its shape, and how it is split
    "q": ((D, HEADS, HEAD), P(None, "fsdp", "tensor")),
    "k": ((D, KV, HEAD), P(None, "fsdp", "tensor")),
    "v": ((D, KV, HEAD), P(None, "fsdp", "tensor")),
    "o": ((HEADS, HEAD, D), P(None, "tensor", None, "fsdp")),
    "gate": ((D, FF), P(None, "fsdp", "tensor")),
    "up": ((D, FF), P(None, "fsdp", "tensor")),
    "down": ((FF, D), P(None, "tensor", "fsdp")),
}


class Pod(NamedTuple):
    """Chips, and how the step is spread over them."""

    topology: str
    mesh: str
    rows: int
    tokens: int


PODS = (
    Pod("v5e:16x16", "data=1,fsdp=32,tensor=8", 128, 2048),
    Pod("v5p:16x16x16", "data=8,fsdp=64,tensor=8", 2048, 4096),
)


def norm(x: Array, scale: Array) -> Array:
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-5)).astype(x.dtype) * scale


def turned(x: Array) -> Array:
    """Rotary positions."""
    angle = jnp.arange(x.shape[1])[:, None] / 500000 ** (jnp.arange(HEAD // 2) / (HEAD // 2))
    sin, cos = jnp.sin(angle)[:, None], jnp.cos(angle)[:, None]
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def block(x: Array, w: Any) -> tuple[Array, None]:
    """A layer of Llama's."""
    kernel = lambda name: w[name]["kernel"]
    y = norm(x, w["norm1"])
    q, k, v = (jnp.einsum("btd,dnh->btnh", y, kernel(name)) for name in "qkv")
    o = jax.nn.dot_product_attention(turned(q), turned(k), v, is_causal=True)
    x = x + jnp.einsum("btnh,nhd->btd", o, kernel("o"))
    y = norm(x, w["norm2"])
    x = x + (jax.nn.silu(y @ kernel("gate")) * (y @ kernel("up"))) @ kernel("down")
    return jax.lax.with_sharding_constraint(x, STREAM), None


def loss_from(params: Any, x: Array, labels: Array) -> Array:
    """The mean cross-entropy of the next token, from embedded tokens."""
    x = jax.lax.with_sharding_constraint(x, STREAM)
    x = jax.lax.scan(jax.checkpoint(block), x, params["layers"])[0]
    logits = norm(x, params["norm"]) @ params["head"]["kernel"]
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()


def loss_of(params: Any, tokens: Array, labels: Array) -> Array:
    """The same from the tokens' numbers."""
    return loss_from(params, jnp.take(params["embed"]["embedding"], tokens, axis=0), labels)


def frozen_step(params: Any, tokens: Array, labels: Array) -> tuple[Array, Array]:
    """Forward, and backward through the activations down to the embeddings."""
    x = jnp.take(params["embed"]["embedding"], tokens, axis=0)
    return jax.value_and_grad(lambda x: loss_from(params, x, labels))(x)


def adapted_step(optimizer: Any, state: Any, adapter: jpeft.Adapter, params: Any, tokens: Array, labels: Array) -> Any:
    """The adapter's gradient, and its update."""
    lifted = jpeft.lift(loss_of)
    of = lambda trained: lifted(jpeft.attach(params, adapter.replace(trained=trained)), tokens, labels)
    loss, gradient = jax.value_and_grad(of)(adapter.trained)
    updates, state = optimizer.update(gradient, state, adapter.trained)
    return loss, state, optax.apply_updates(adapter.trained, updates)


def full_step(optimizer: Any, state: Any, params: Any, tokens: Array, labels: Array) -> Any:
    """The whole model's."""
    loss, gradient = jax.value_and_grad(loss_of)(params, tokens, labels)
    updates, state = optimizer.update(gradient, state, params)
    return loss, state, optax.apply_updates(params, updates)


def mesh_of(pod: Pod) -> Mesh:
    """A mesh of the topology's devices."""
    sizes = {name: int(size) for name, size in (part.split("=") for part in pod.mesh.split(","))}
    devices = topologies.get_topology_desc(platform="tpu", topology_name=pod.topology).devices
    return Mesh(np.array(devices).reshape(tuple(sizes.values())), tuple(sizes))


def base(mesh: Mesh, layers: int) -> Any:
    """The params' shapes, and where they are."""
    new = lambda shape, spec: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
    stack = {name: {"kernel": new((layers, *shape), spec)} for name, (shape, spec) in KERNELS.items()}
    norms = {name: new((layers, D), P()) for name in ("norm1", "norm2")}
    return {
        "embed": {"embedding": new((VOCAB, D), P("tensor", "fsdp"))},
        "layers": stack | norms,
        "norm": new((D,), P()),
        "head": {"kernel": new((D, VOCAB), P("fsdp", "tensor"))},
    }


def described(tree: Any, where: Any) -> Any:
    """Shapes, with their homes."""
    return jax.tree.map(lambda leaf, home: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=home), tree, where)


def programs(pod: Pod, mesh: Mesh, layers: int, ranks: list[int]) -> Iterator[tuple[str, Any, Any]]:
    """Each step: its name, its jitted function, its arguments."""
    params = base(mesh, layers)
    tokens = jax.ShapeDtypeStruct((pod.rows, pod.tokens), jnp.int32, sharding=NamedSharding(mesh, ROWS))
    optimizer = optax.adamw(1e-4)
    yield "frozen", jax.jit(frozen_step), (params, tokens, tokens)
    for rank in ranks:
        spec = jpeft.LoRA(rank=rank, alpha=2 * rank)
        with jax.set_mesh(mesh):
            kernels = jpeft.kernels(loss_of, params, tokens, tokens)
        key = jax.eval_shape(jax.random.key, 0)  # nothing is run on that mesh
        adapter = jax.eval_shape(partial(jpeft.init, spec=spec, params=params, kernels=kernels), key)
        where = jpeft.shardings(params, adapter)
        state = jax.eval_shape(optimizer.init, adapter.trained)
        home = jpeft.optimizer_shardings(state, where)
        step = jax.jit(
            lambda *args: adapted_step(optimizer, *args),
            donate_argnums=0,
            out_shardings=(NamedSharding(mesh, P()), home, where.trained),
        )
        yield f"LoRA, rank {rank}", step, (described(state, home), described(adapter, where), params, tokens, tokens)
    state, there = jax.eval_shape(optimizer.init, params), jax.tree.map(lambda leaf: leaf.sharding, params)
    whole = NamedSharding(mesh, P())
    homes = optax.tree.map_params(optimizer, lambda _, home: home, state, there, transform_non_params=lambda _: whole)
    step = jax.jit(
        lambda *args: full_step(optimizer, *args), donate_argnums=(0, 1), out_shardings=(whole, homes, there)
    )
    yield "full fine-tuning", step, (described(state, homes), params, tokens, tokens)


def measured(pod: Pod, layers: int, ranks: list[int]) -> Iterator[list[object]]:
    """A row for each step."""
    mesh = mesh_of(pod)
    row: list[object]
    for name, step, args in programs(pod, mesh, layers, ranks):
        begun = time.perf_counter()
        try:
            compiled, text = compiled_for(mesh, step, args)
        except jax.errors.JaxRuntimeError as error:  # it fits no chip: the compiler says by how much
            row = [pod.topology, name, " ".join(str(error).split())[:120], *[""] * 5]
        else:
            row = [pod.topology, name, *figures(compiled, text, args[-3]), ""]
        row[-1] = f"{time.perf_counter() - begun:.0f}"
        print(*row, sep=" | ", flush=True)
        yield row


def compiled_for(mesh: Mesh, step: Any, args: Any) -> tuple[Any, str]:
    """The program and its text, as libtpu writes it: JAX's own reader of it knows less than libtpu 0.0.52 says."""
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        compiled = step.lower(*args).compile(compiler_options={"xla_dump_to": folder})
        return compiled, next(Path(folder).glob("*.after_optimizations.txt")).read_text()


def figures(compiled: Any, text: str, params: Any) -> list[object]:
    """Of one chip: GiB of arguments, of temporaries, moved, and moved in the base's shapes; how many collectives."""
    memory, moved = compiled.memory_analysis(), collectives(text)
    held = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    sizes = (*held, sum(one.bytes * one.times for one in moved), base_bytes(text, params))
    return [*(f"{size / 2**30:.2f}" for size in sizes), sum(one.times for one in moved)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", help="one of libtpu's (v5e:16x16, v5p:16x16x16), in place of both")
    parser.add_argument("--mesh", default="data=1,fsdp=32,tensor=8", help="of that topology")
    parser.add_argument("--rows", type=int, default=128, help="rows of a batch there")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a row there")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--ranks", type=int, nargs="*", default=[24])
    options = parser.parse_args()
    own = Pod(options.topology, options.mesh, options.rows, options.tokens)
    pods = [own] if options.topology else PODS
    header = [
        "chips",
        "step",
        "arguments GiB",
        "temporary GiB",
        "moved GiB",
        "like the base",
        "collectives",
        "compiled s",
    ]
    rows = [row for pod in pods for row in measured(pod, options.layers, options.ranks)]
    about = "; ".join(f"{pod.topology}: {pod.mesh}, {pod.rows} × {pod.tokens} tokens" for pod in pods)
    publish("pods", f"All but the last column is of one chip and one step. {about}.\n\n{table(header, rows)}")


if __name__ == "__main__":
    main()
