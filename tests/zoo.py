"""Small models in every style that people write, for the tests of the core: params, a pure function, an example.

A case says what the fast path should make of each adapted weight (`dense`: those that it has no rule for), and which
weights the function's head is. Built when first asked for; `CASES` holds the names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import freeze
from jax.ad_checkpoint import checkpoint_name

import jpeft

D, HEADS, HEAD, FF, LAYERS, VOCAB = 8, 2, 4, 12, 3, 11


@dataclass(frozen=True, eq=False)
class Case:
    """A model.

    Attributes:
      params: the base, a pytree.
      fn: `fn(params, x)`.
      x: the example input.
      dense: paths of adapted weights for which the fast path has no rule.
      kernels: paths of the weights that meet a product, a lookup or a convolution.
      heads: those that are the output head.
      reverse: JAX can differentiate the function in reverse mode.
      by_hand: square weights adapted though no product was found for them.
    """

    params: Any
    fn: Callable[[Any, Any], Any]
    x: Any
    kernels: tuple[str, ...]
    dense: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    reverse: bool = True
    by_hand: tuple[str, ...] = ()

    @cached_property
    def found(self) -> jpeft.Kernels:
        """What `jpeft.kernels` reports."""
        return jpeft.kernels(self.fn, self.params, self.x)

    @property
    def adapted(self) -> jpeft.Kernels:
        by_hand = tuple((path, jpeft.Kernel((D, D), (0,), (1,))) for path in self.by_hand)
        return jpeft.Kernels((*self.found.entries, *by_hand))


BUILDERS: dict[str, Callable[[], Case]] = {}


def case(build: Callable[[], Case]) -> Callable[[], Case]:
    BUILDERS[build.__name__] = cache(build)
    return BUILDERS[build.__name__]


def get(name: str) -> Case:
    return BUILDERS[name]()


def normal(*shape: int, seed: int = 0, scale: float = 0.35) -> jax.Array:
    """Random weights, scaled so that a chain of products stays near one. Drawn by numpy, which compiles nothing."""
    return jnp.asarray(np.float32(scale * np.random.default_rng(seed).standard_normal(shape)))


def filled(shapes: Any, seed: int = 0) -> Any:
    """Random arrays in place of shapes: no zero biases, no constant scales. Variances stay positive."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        sign = 1 if "var" in str(path) else rng.choice([-1, 1], leaf.shape)
        return jnp.asarray((np.abs(0.5 + 0.3 * rng.standard_normal(leaf.shape)) * sign).astype(leaf.dtype))

    return jax.tree_util.tree_map_with_path(draw, shapes)


X = normal(2, 3, D, seed=5, scale=1)
IMAGE = normal(2, 7, 6, 4, seed=6, scale=1)
TOKENS = jnp.array([[1, 4, 10], [0, 4, 2]])


def linen(model: nn.Module, x: Any, *kernels: str, **more: Any) -> Case:
    params = filled(jax.eval_shape(model.init, jax.random.key(0), x)["params"])
    return Case(params, lambda params, x: model.apply({"params": params}, x), x, kernels, **more)


def of_nnx(build: Callable[[nnx.Rngs], nnx.Module], x: Any, *kernels: str, **more: Any) -> Case:
    graph, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    return Case(filled(state), lambda state, x: nnx.merge(graph, state)(x), x, kernels, **more)


def plain(
    fn: Callable[[Any, Any], Any], x: Any = X, *, dense: Any = (), heads: Any = (), reverse: Any = True, **params
):
    return Case(params, fn, x, tuple(sorted(params)), dense, heads, reverse)


# ---- Linen ----


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.tanh(nn.Dense(D, name="down")(nn.silu(nn.Dense(FF, name="up")(x))))


class Step(nn.Module):
    block: Any = Mlp

    @nn.compact
    def __call__(self, carry, _):
        return carry + self.block(name="mlp")(carry), None


class Stack(nn.Module):
    axis: int | None = None
    block: Any = Mlp

    @nn.compact
    def __call__(self, x):
        if self.axis is None:
            for i in range(2):
                x = Step(self.block, name=f"layers_{i}")(x, None)[0]
            return x
        scan = nn.scan(Step, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=LAYERS)
        return scan(self.block, name="layers")(x, None)[0]


UNROLLED = tuple(f"layers_{i}/mlp/{n}/kernel" for i in range(2) for n in ("up", "down"))
SCANNED = ("layers/mlp/up/kernel", "layers/mlp/down/kernel")


@case
def linen_dense() -> Case:
    return linen(Mlp(), X, "up/kernel", "down/kernel")


@case
def linen_frozen_dict() -> Case:
    one = linen(Mlp(), X, "up/kernel", "down/kernel")
    return Case(freeze(one.params), one.fn, X, one.kernels)


@case
def linen_loop() -> Case:
    return linen(Stack(), X, *UNROLLED)


@case
def linen_remat() -> Case:
    return linen(Stack(block=nn.remat(Mlp)), X, *UNROLLED)


@case
def linen_scan() -> Case:
    return linen(Stack(axis=0), X, *SCANNED)


@case
def linen_scan_axis_1() -> Case:
    return linen(Stack(axis=1), X, *SCANNED)


@case
def linen_scan_remat() -> Case:
    block = nn.remat(Mlp, prevent_cse=False, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    return linen(Stack(axis=0, block=block), X, *SCANNED)


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(D, name="dense")
        return jnp.sin(dense(jnp.tanh(dense(x))))


@case
def linen_shared() -> Case:
    return linen(Shared(), X, "dense/kernel")


class Repeated(nn.Module):
    """One layer, again and again: its weights are broadcast to every turn of the scan, and used once more after it."""

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(Step, variable_broadcast="params", split_rngs={"params": False}, length=2)
        layer = scan(Shared, name="layer")
        return layer(layer(x, None)[0], None)[0]


@case
def linen_shared_in_scan() -> Case:
    return linen(Repeated(), X, "layer/mlp/dense/kernel")


class HeadsStep(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = jnp.tanh(nn.DenseGeneral((HEADS, HEAD), use_bias=False, name="query")(x))
        return x + jnp.tanh(nn.DenseGeneral(D, axis=(-2, -1), use_bias=False, name="out")(y)), None


class HeadsStack(nn.Module):
    """Stacked on axis 1 of every kernel: (d, layers, heads, head_dim) and (heads, layers, head_dim, d)."""

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(HeadsStep, variable_axes={"params": 1}, split_rngs={"params": True}, length=LAYERS)
        return scan(name="layers")(x, None)[0]


@case
def linen_scan_axis_1_heads() -> Case:
    return linen(HeadsStack(), X, "layers/query/kernel", "layers/out/kernel")


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCAB, D, name="embed")
        return embed.attend(nn.Dense(D, name="dense")(embed(tokens)))


@case
def linen_tied() -> Case:
    return linen(Tied(), TOKENS, "embed/embedding", "dense/kernel", heads=("embed/embedding",))


class Lm(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = jnp.tanh(nn.Dense(D, name="dense")(nn.Embed(VOCAB, D, name="embed")(tokens)))
        return nn.Dense(VOCAB, name="lm_head")(nn.LayerNorm(name="norm")(x)).astype(jnp.float32)


@case
def linen_lm() -> Case:
    return linen(Lm(), TOKENS, "embed/embedding", "dense/kernel", "lm_head/kernel", heads=("lm_head/kernel",))


@case
def linen_attention() -> Case:
    model = nn.MultiHeadDotProductAttention(HEADS, use_bias=False)
    names = ("query", "key", "value", "out")
    return linen(model, X, *(f"{n}/kernel" for n in names), heads=("out/kernel",))


class General(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = jnp.tanh(nn.DenseGeneral((HEADS, HEAD), name="split")(x))
        y = jnp.tanh(nn.DenseGeneral(D, axis=(-2, -1), name="join")(y))
        y = jnp.tanh(nn.DenseGeneral((2, 3), axis=-2, name="middle")(y))
        return jnp.tanh(nn.DenseGeneral(5, axis=-1, batch_dims=(0,), name="batched")(y))


@case
def linen_dense_general() -> Case:
    return linen(General(), X, *(f"{n}/kernel" for n in ("split", "join", "middle", "batched")))


class Convs(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.tanh(nn.Conv(5, (3, 2), strides=(2, 1), name="strided")(x))
        y = nn.tanh(nn.Conv(6, (2, 3), kernel_dilation=(1, 2), padding="VALID", name="dilated")(y))
        y = nn.tanh(nn.Conv(6, (3, 3), padding="CIRCULAR", name="circular")(y))
        return nn.tanh(nn.Conv(4, (1, 1), name="pointwise")(y))


@case
def linen_conv_2d() -> Case:
    return linen(Convs(), IMAGE, *(f"{n}/kernel" for n in ("strided", "dilated", "circular", "pointwise")))


@case
def linen_conv_1d() -> Case:
    return linen(nn.Conv(5, (3,), padding=[(1, 2)]), X, "kernel", heads=("kernel",))


@case
def linen_conv_grouped() -> Case:
    model = nn.Conv(6, (3,), feature_group_count=2)
    return linen(model, X, "kernel", dense=("kernel",), heads=("kernel",))


@case
def linen_conv_transposed() -> Case:
    return linen(nn.ConvTranspose(5, (3,), strides=(2,)), X, "kernel", heads=("kernel",))


@case
def linen_experts() -> Case:
    model = nn.vmap(Mlp, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2)()
    return linen(model, X, "up/kernel", "down/kernel")


@case
def linen_rnn() -> Case:
    return linen(nn.RNN(nn.SimpleCell(D)), X, "cell/i/kernel", "cell/h/kernel")


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        return nn.tanh(nn.Dense(FF, kernel_init=init, name="dense")(x))


@case
def linen_partitioned() -> Case:
    return linen(Boxed(), X, "dense/kernel")


# ---- NNX ----


class NnxMlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(D, FF, rngs=rngs)
        self.down = nnx.Linear(FF, D, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.down(nnx.silu(self.up(x))))


class NnxNet(nnx.Module):
    """With other kinds of variables beside the params: batch statistics, dropout's keys."""

    def __init__(self, rngs: nnx.Rngs, remat: bool = False):
        self.layers = nnx.List([NnxMlp(rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(D, use_running_average=True, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.remat = remat

    def __call__(self, x):
        run = nnx.remat(lambda layer, x: layer(x)) if self.remat else lambda layer, x: layer(x)
        for layer in self.layers:
            x = self.dropout(self.norm(x + run(layer, x)))
        return x


NNX_LAYERS = tuple(f"layers/{i}/{n}/kernel" for i in range(2) for n in ("up", "down"))


@case
def nnx_state() -> Case:
    return of_nnx(NnxNet, X, *NNX_LAYERS)


@case
def nnx_remat() -> Case:
    return of_nnx(lambda rngs: NnxNet(rngs, remat=True), X, *NNX_LAYERS)


@case
def nnx_pure_dict() -> Case:
    graph, state = nnx.split(nnx.eval_shape(lambda: NnxMlp(nnx.Rngs(0))))
    params = nnx.to_pure_dict(filled(state))
    return Case(params, lambda p, x: nnx.merge(graph, p)(x), X, ("up/kernel", "down/kernel"))


class NnxScan(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, axis: int = 0):
        self.layers = nnx.vmap(NnxMlp, in_axes=0, out_axes=axis)(rngs.split(LAYERS))
        self.axis = axis

    def __call__(self, x):
        scan = nnx.scan(lambda x, layer: x + layer(x), in_axes=(nnx.Carry, self.axis), out_axes=nnx.Carry)
        return scan(x, self.layers)


@case
def nnx_scan() -> Case:
    return of_nnx(NnxScan, X, "layers/up/kernel", "layers/down/kernel")


@case
def nnx_scan_axis_1() -> Case:
    return of_nnx(lambda rngs: NnxScan(rngs, 1), X, "layers/up/kernel", "layers/down/kernel")


class NnxShared(nnx.Module):
    """One layer in two places, under two names; and in every turn of a scan, beside the layers of the stack."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(D, D, rngs=rngs)
        self.second = self.first
        self.layers = nnx.vmap(NnxMlp, in_axes=0, out_axes=0)(rngs.split(LAYERS))

    def __call__(self, x):
        x = jnp.tanh(self.second(jnp.tanh(self.first(x))))
        step = lambda x, shared, layer: x + layer(jnp.tanh(shared(x)))
        return nnx.scan(step, in_axes=(nnx.Carry, None, 0), out_axes=nnx.Carry)(x, self.first, self.layers)


@case
def nnx_shared() -> Case:
    return of_nnx(NnxShared, X, "first/kernel", "layers/up/kernel", "layers/down/kernel")


@case
def nnx_attention() -> Case:
    model = lambda rngs: nnx.MultiHeadAttention(HEADS, D, use_bias=False, decode=False, rngs=rngs)
    return of_nnx(model, X, *(f"{n}/kernel" for n in ("query", "key", "value", "out")), heads=("out/kernel",))


class NnxControl(nnx.Module):
    """NNX's own control flow hands modules in and out: through branches, and carried through loops."""

    def __init__(self, rngs: nnx.Rngs):
        self.chosen, self.looped, self.carried = (nnx.Linear(D, D, rngs=rngs) for _ in range(3))

    def __call__(self, x):
        x = nnx.cond(x.sum() > 1e6, lambda m, x: x, lambda m, x: jnp.tanh(m(x)), self.chosen, x)
        x = nnx.fori_loop(0, 2, lambda i, state: (state[0], jnp.tanh(state[0](state[1]))), (self.looped, x))[1]
        step = lambda state, _: ((state[0], jnp.tanh(state[0](state[1]))), None)
        return nnx.scan(step, length=2, in_axes=(nnx.Carry, None), out_axes=(nnx.Carry, 0))((self.carried, x), None)[0][
            1
        ]


@case
def nnx_control() -> Case:
    return of_nnx(NnxControl, X, *(f"{n}/kernel" for n in ("chosen", "looped", "carried")), reverse=False)


class NnxEinsum(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.split = nnx.Einsum("td,dhk->htk", (D, HEADS, HEAD), (HEADS, 1, HEAD), rngs=rngs)
        self.join = nnx.Einsum("htk,hkd->td", (HEADS, HEAD, D), (D,), rngs=rngs)

    def __call__(self, x):
        return jax.vmap(lambda x: self.join(jnp.tanh(self.split(x))))(x)


@case
def nnx_einsum() -> Case:
    return of_nnx(NnxEinsum, X, "split/kernel", "join/kernel", heads=("join/kernel",))


# ---- plain functions: geometries ----


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k)), v)


@case
def einsum_attention() -> Case:
    """(d, heads, head_dim) and (heads, head_dim, d)."""

    def fn(p, x):
        q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[n]) for n in "qkv")
        return jnp.tanh(jnp.einsum("bthk,hkd->btd", attention(q, k, v), p["o"]))

    square = lambda seed: normal(D, HEADS, HEAD, seed=seed)
    return plain(fn, q=square(1), k=square(2), v=square(3), o=normal(HEADS, HEAD, D, seed=4))


@case
def gemma_attention() -> Case:
    """Fused key and value (2, kv, d, h), one product; queries (heads, d, head_dim)."""

    def fn(p, x):
        k, v = jnp.einsum("bsd,ckdh->cbskh", x, p["kv"])
        return jnp.tanh(jnp.einsum("bthk,hkd->btd", attention(jnp.einsum("btd,ndh->btnh", x, p["q"]), k, v), p["o"]))

    kv, q = normal(2, HEADS, D, HEAD, seed=1), normal(HEADS, D, HEAD, seed=2)
    return plain(fn, kv=kv, q=q, o=normal(HEADS, HEAD, D, seed=3))


@case
def gemma_gating() -> Case:
    """Fused gate and up (2, d, f), one product whose first axis comes out; the same stored (2, f, d), and sliced."""

    def fn(p, x):
        gate, up = jnp.einsum("bsd,cdf->cbsf", x, p["gating"])
        x = jnp.tanh(jax.nn.gelu(gate) * up @ p["linear"])
        gate, up = jnp.einsum("bsd,cfd->cbsf", x, p["transposed"])
        x = jnp.tanh(jax.nn.gelu(gate) * up @ p["linear"])
        return jnp.tanh(jax.nn.gelu(x @ p["sliced"][0]) * (x @ p["sliced"][1]))

    wide = {"gating": normal(2, D, FF, seed=1), "transposed": normal(2, FF, D, seed=2), "sliced": normal(2, D, FF)}
    return plain(fn, linear=normal(FF, D, seed=3), **wide)


@case
def grouped_attention() -> Case:
    """Queries in groups, one for each key: (d, kv, groups, head_dim), and back by (kv, groups, head_dim, d)."""

    def fn(p, x):
        q = jnp.einsum("btd,dkgh->btkgh", x, p["q"])
        k, v = (jnp.einsum("bsd,dkh->bskh", x, p[name]) for name in "kv")
        mixed = jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(jnp.einsum("btkgh,bskh->bkgts", q, k)), v)
        return jnp.tanh(jnp.einsum("btkgh,kghd->btd", mixed, p["attn_vec"]))

    one = {name: normal(D, 2, HEAD, seed=seed) for seed, name in enumerate("kv")}
    return plain(fn, q=normal(D, 2, 3, HEAD, seed=3), attn_vec=normal(2, 3, HEAD, D, seed=4), **one)


@case
def fused_kv_by_slices() -> Case:
    def fn(p, x):
        k, v = (jnp.einsum("bsd,kdh->bskh", x, p["kv"][i]) for i in range(2))
        return attention(jnp.tanh(k), k, v)

    return plain(fn, kv=normal(2, HEADS, D, HEAD, seed=1))


@case
def experts_batched() -> Case:
    def fn(p, x):
        hidden = jax.nn.silu(jnp.einsum("etd,edf->etf", x, p["up"]))
        return jnp.tanh(jnp.einsum("etf,efd->etd", hidden, p["down"]))

    return plain(fn, up=normal(2, D, FF, seed=1), down=normal(2, FF, D, seed=2))


@case
def experts_all() -> Case:
    """Every expert on every token: the expert axis comes out, it is no batch axis of the product."""
    return plain(lambda p, x: jnp.tanh(jnp.einsum("btd,edf->btef", x, p["up"])), up=normal(4, D, FF, seed=1))


@case
def experts_transposed() -> Case:
    """Experts as (in, experts, out), tokens first."""
    fn = lambda p, x: jnp.tanh(jnp.einsum("etd,def->tef", x, p["up"]))
    return plain(fn, up=normal(D, 2, FF, seed=1))


@case
def batches_joined() -> Case:
    """(layers, experts) joined into one batch axis by a reshape."""

    def fn(p, x):
        x = jnp.tanh(jnp.einsum("gtd,gdf->gtf", jnp.stack([x, 2 * x]).reshape(4, 3, D), p["up"].reshape(4, D, FF)))
        y = jnp.einsum("abtf,abfd->abtd", x.reshape(2, 2, 3, FF), p["down"])
        return jnp.tanh(y), jnp.tanh(jnp.einsum("abtd,abdf->abtf", y, p["up"]))

    return plain(fn, up=normal(2, 2, D, FF, seed=1), down=normal(2, 2, FF, D, seed=2))


# ---- plain functions: experts with sorted tokens ----

SIZES = np.int32([2, 0, 3, 1])
E = len(SIZES)


def experts(x: jax.Array, up: jax.Array, down: jax.Array, sizes: Any = SIZES) -> jax.Array:
    """A feed-forward layer of experts on tokens sorted by expert."""
    return jnp.tanh(jax.lax.ragged_dot(jax.nn.silu(jax.lax.ragged_dot(x, up, sizes)), down, sizes))


@case
def experts_ragged() -> Case:
    """Tokens sorted by a router, and back in their order afterwards."""

    def fn(p, x):
        x = x.reshape(6, D)
        gates = jax.nn.softmax(x @ p["router"])
        chosen = jnp.argmax(gates, -1)
        order = jnp.argsort(chosen)
        y = experts(x[order], p["up"], p["down"], jnp.bincount(chosen, length=E))
        return y[jnp.argsort(order)] * gates.max(-1, keepdims=True)

    return plain(fn, up=normal(E, D, FF, seed=1), down=normal(E, FF, D, seed=2), router=normal(D, E, seed=3))


@case
def experts_ragged_swapped() -> Case:
    """Stored (experts, out, in), swapped before the product; and contracted along the last axis by the product."""

    def fn(p, x):
        hidden = jnp.tanh(jax.lax.ragged_dot(x.reshape(6, D), p["up"].swapaxes(1, 2), SIZES))
        last = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), (0,), (0,))
        return jnp.tanh(jax.lax.ragged_dot_general(hidden, p["down"], SIZES, last))

    return plain(fn, up=normal(E, FF, D, seed=1), down=normal(E, D, FF, seed=2))


@case
def experts_ragged_moved() -> Case:
    """(in, experts, heads, head_dim), joined and reordered on its way; the last rows belong to no expert."""

    def fn(p, x):
        w = p["w"].reshape(D, E, HEADS * HEAD).transpose(1, 0, 2)
        return jnp.tanh(jax.lax.ragged_dot(x.reshape(6, D), w, jnp.array([1, 2, 0, 2])))

    return plain(fn, w=normal(D, E, HEADS, HEAD, seed=1))


@case
def experts_ragged_scanned() -> Case:
    """Layers of experts, stacked on axis 1 as MaxText does, under scan, remat and jit."""
    weights = {"up": normal(E, LAYERS, D, FF, seed=1), "down": normal(E, LAYERS, FF, D, seed=2)}
    layer = jax.checkpoint(jax.jit(lambda x, w: (x + experts(x, w["up"], w["down"]), None)))

    def fn(p, x):
        stacked = jax.tree.map(lambda w: jnp.moveaxis(w, 1, 0), p)
        return jnp.tanh(jax.lax.scan(layer, x.reshape(6, D), stacked)[0])

    return plain(fn, **weights)


@case
def experts_ragged_vmapped() -> Case:
    """Each example with its own experts and its own groups: a product with a batch axis besides."""
    sizes = jnp.array([[1, 2], [3, 0]])
    fn = lambda p, x: jnp.tanh(jax.vmap(jax.lax.ragged_dot)(x, p["w"], sizes))
    return plain(fn, w=normal(2, 2, D, FF, seed=1))


@case
def experts_ragged_rows() -> Case:
    """Rows of several axes, of which a later one is in groups: each batch entry has its own or all the same."""

    def fn(p, x):
        numbers = jax.lax.RaggedDotDimensionNumbers((((2,), (1,)), ((), ())), (1,), (0,))
        hidden = jnp.tanh(jax.lax.ragged_dot_general(x, p["up"], jnp.array([[1, 2], [0, 3]]), numbers))
        return jnp.tanh(jax.lax.ragged_dot_general(hidden, p["down"], jnp.array([2, 1]), numbers))

    return plain(fn, up=normal(2, D, FF, seed=1), down=normal(2, FF, D, seed=2))


# ---- plain functions: the way to the product ----


@case
def transposed() -> Case:
    """Stored (out, in), used by `.T`; a square one too."""
    fn = lambda p, x: jnp.tanh(jnp.tanh(x @ p["square"].T) @ p["w"].T)
    return plain(fn, w=normal(FF, D, seed=1), square=normal(D, D, seed=2))


@case
def square() -> Case:
    """Contracted and output axes of one size; a reshape and a transpose between."""

    def fn(p, x):
        w = p["w"].reshape(4, 4, 4, 4).transpose(1, 0, 3, 2)
        x = jnp.einsum("nij,ijkl->nkl", jnp.concatenate([x, x], -1).reshape(6, 4, 4), w)
        return jnp.tanh(x.transpose(0, 2, 1).reshape(6, 16) @ p["v"])

    return plain(fn, w=normal(16, 16, seed=1), v=normal(16, 16, seed=2))


@case
def reshaped() -> Case:
    """(d, heads * head_dim) used as (d, heads, head_dim), and back."""

    def fn(p, x):
        y = jnp.einsum("btd,dhk->bhtk", x, p["split"].reshape(D, HEADS, HEAD))
        return jnp.tanh(jnp.tanh(y.swapaxes(1, 2).reshape(2, 3, -1)) @ p["join"].reshape(-1, D))

    return plain(fn, split=normal(D, HEADS * HEAD, seed=1), join=normal(HEADS, HEAD, D, seed=2))


@case
def cast() -> Case:
    """Through a cast that loses nothing, so that fp32 tolerances hold."""
    fn = lambda p, x: jnp.tanh(x @ p["w"].astype(jnp.float32).astype(x.dtype))
    return plain(fn, w=normal(D, FF, seed=1))


@case
def weight_first() -> Case:
    def fn(p, x):
        y = jnp.einsum("fd,btd->fbt", p["up"], x)
        return jnp.tanh(jax.lax.dot_general(p["down"], jnp.tanh(y), (((1,), (0,)), ((), ()))))

    return plain(fn, up=normal(FF, D, seed=1), down=normal(5, FF, seed=2))


@case
def size_one_axes() -> Case:
    """in = 1, out = 1, both; one head, kept or joined to its neighbour."""

    def fn(p, x):
        y = jnp.einsum("btd,dhk->bthk", x, p["one_head"]) + (x @ p["joined"].reshape(D, HEAD))[:, :, None]
        one = y[:, :, 0] @ p["out_1"]
        return y, one, jnp.tanh(one) @ p["in_1"], x[..., :1] @ p["one_by_one"]

    shapes = {
        "one_head": (D, 1, HEAD),
        "joined": (D, 1, HEAD),
        "out_1": (HEAD, 1),
        "in_1": (1, D),
        "one_by_one": (1, 1),
    }
    params = {name: normal(*shape, seed=i, scale=1) for i, (name, shape) in enumerate(shapes.items())}
    return plain(fn, dense=("one_by_one",), heads=("in_1", "one_by_one"), **params)


@case
def stacks_of_one() -> Case:
    """One layer or one expert: scanned, indexed, batched, reshaped."""

    def fn(p, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["scanned"])
        x = jnp.einsum("ebtd,edf->ebtf", x[None], p["batched"])[0]
        x = jnp.tanh(x @ p["indexed"][0]) + x @ p["squeezed"].squeeze(0)
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["joined"].reshape(3, D, D))
        return jnp.tanh(jnp.einsum("ebtd,edf->ebtf", x[None], p["added"].reshape(1, D, D)))

    shapes = {"joined": (1, 3, D, D), "added": (D, D)}
    names = ("scanned", "batched", "indexed", "squeezed", "joined", "added")
    params = {name: normal(*shapes.get(name, (1, D, D)), seed=i) for i, name in enumerate(names)}
    return plain(fn, **params)


@case
def stacked_by_hand() -> Case:
    """`w[i]`, with an index that is known."""

    def fn(p, x):
        for i in range(LAYERS):
            x = jnp.tanh(x @ p["w"][i]) + x @ p["v"][:, i]
        return x

    return plain(fn, w=normal(LAYERS, D, D, seed=1), v=normal(D, LAYERS, D, seed=2))


@case
def stacked_in_fori() -> Case:
    """`w[i]` with the loop's own index."""

    def fn(p, x):
        step = lambda i, x: jnp.tanh(x @ p["w"][i]) + x @ jax.lax.dynamic_index_in_dim(p["v"], i, 1, keepdims=False)
        return jax.lax.fori_loop(0, LAYERS, step, x)

    return plain(fn, w=normal(LAYERS, D, D, seed=1), v=normal(D, LAYERS, D, seed=2))


@case
def unstacked_by_vmap() -> Case:
    """A stack under vmap: one product with a batch axis."""
    fn = lambda p, x: jax.vmap(lambda w, b: jnp.tanh(x @ w) @ b)(p["w"], p["v"])
    return plain(fn, w=normal(LAYERS, D, FF, seed=1), v=normal(LAYERS, FF, D, seed=2), heads=("v",))


@case
def scan_of_scan() -> Case:
    """Two stacked axes, scanned one inside the other, the last in reverse; a shared weight closed over."""

    def fn(p, x):
        inner = lambda x, w: (jnp.tanh(x @ w + x @ p["shared"]), None)
        return jax.lax.scan(lambda x, w: jax.lax.scan(inner, x, w, reverse=True), x, p["w"])[0]

    return plain(fn, w=normal(2, 3, D, D, seed=1), shared=normal(D, D, seed=2))


@case
def inner_jit() -> Case:
    @jax.jit
    def cast(p):
        return jax.tree.map(lambda w: w.T, p)

    product = jax.jit(lambda w, x: jnp.tanh(x @ w.T))
    return plain(lambda p, x: product(cast(p)["w"], x), w=normal(D, FF, seed=1))


@case
def jax_checkpoint() -> Case:
    policy = jax.checkpoint_policies.save_only_these_names("hidden")

    def fn(p, x):
        hidden = checkpoint_name(jnp.tanh(x @ p["up"]), "hidden")
        return jnp.tanh(hidden @ p["down"])

    return plain(jax.checkpoint(fn, policy=policy), up=normal(D, FF, seed=1), down=normal(FF, D, seed=2))


@case
def vmapped_model() -> Case:
    fn = lambda p, x: jax.vmap(lambda x: jnp.tanh(x @ p["up"]) @ p["down"])(x)
    return plain(fn, up=normal(D, FF, seed=1), down=normal(FF, D, seed=2), heads=("down",))


class Pair(NamedTuple):
    left: Any
    right: Any


@case
def containers() -> Case:
    """Lists, tuples, named tuples and integer keys."""
    w = lambda seed: normal(D, D, seed=seed)
    params = {"list": [{"kernel": w(1)}, {"kernel": w(2)}], "ints": {7: (w(3),)}, "pair": Pair(w(4), {"kernel": w(5)})}

    def fn(p, x):
        of_list = [layer["kernel"] for layer in p["list"]]
        for kernel in (*of_list, p["ints"][7][0], p["pair"].left, p["pair"].right["kernel"]):
            x = jnp.tanh(x @ kernel)
        return x

    return Case(params, fn, X, ("list/0/kernel", "list/1/kernel", "ints/7/0", "pair/left", "pair/right/kernel"))


# ---- plain functions: control flow ----


@case
def cond() -> Case:
    def fn(p, x):
        x = jax.lax.cond(x.sum() > 1e6, lambda: x @ p["left"], lambda: jnp.tanh(x @ p["right"]))
        return jax.lax.switch(
            2, [lambda x: x, lambda x: x @ p["left"], lambda x: jnp.tanh(x @ p["last"] @ p["left"])], x
        )

    return plain(fn, left=normal(D, D, seed=1), right=normal(D, D, seed=2), last=normal(D, D, seed=3))


@case
def while_loop() -> Case:
    def fn(p, x):
        test = lambda state: state[0] < jnp.where((x @ p["test"]).sum() > 1e6, 0, LAYERS)
        step = lambda state: (state[0] + 1, jnp.tanh(state[1] @ p["w"][state[0]]))
        return jax.lax.while_loop(test, step, (0, x))[1]

    return plain(fn, w=normal(LAYERS, D, D, seed=1), test=normal(D, D, seed=2), reverse=False)


@case
def carried() -> Case:
    """Weights that a loop carries: as they are, and changing (dense)."""

    def fn(p, x):
        step = lambda c, _: ((jnp.tanh(c[0] @ c[1] @ c[2]), c[1], 0.9 * c[2]), None)
        return jnp.tanh(jax.lax.scan(step, (x, p["kept"], p["changed"]), None, length=2)[0][0] @ p["kept"])

    case = plain(fn, kept=normal(D, D, seed=1), changed=normal(D, D, seed=2), dense=("changed",))
    return replace(case, kernels=("kept",), by_hand=("changed",))


@case
def handed_back() -> Case:
    """Stacked weights that a scan returns as it got them, and uses afterwards."""

    def fn(p, x):
        x, stack = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), w), x, p["w"])
        return jnp.tanh(x @ stack[0])

    return plain(fn, w=normal(LAYERS, D, D, seed=1))


@jax.custom_vjp
def odd_product(x, w):
    return x @ w


odd_product.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda saved, g: (7 * (g @ saved[1].T), jnp.einsum("btd,btf->df", saved[0], g))
)


@case
def custom_vjp() -> Case:
    """The model's own rule takes the weight; another sees activations only."""
    fn = lambda p, x: jnp.tanh(odd_product(x, p["odd"])) @ p["w"]
    return plain(fn, odd=normal(D, FF, seed=1), w=normal(FF, D, seed=2), dense=("odd",), heads=("w",))


@case
def logits() -> Case:
    """A head under remat, with a bias, a scale, a soft cap and a mask, the last of them read; a pooler beside it."""

    @jax.checkpoint
    def head(p, x):
        logits = 3 * jnp.tanh((x @ p["lm_head"] + p["bias"]) * 0.5 / 3)
        return jnp.where(jnp.arange(VOCAB) < VOCAB - 1, logits, -1e3)

    def fn(p, x):
        x = jax.nn.silu(x @ p["w"])
        return head(p, x)[jnp.arange(2), jnp.array([0, 2])], jnp.tanh(x[:, 0] @ p["pooler"])

    weights = {"w": normal(D, FF, seed=1), "lm_head": normal(FF, VOCAB, seed=2), "pooler": normal(FF, D, seed=3)}
    case = plain(fn, heads=("lm_head",), bias=normal(VOCAB), **weights)
    return replace(case, kernels=tuple(sorted(weights)))


@case
def both_ways() -> Case:
    """One weight in a product and in something else: factored there, dense here."""
    fn = lambda p, x: jnp.tanh(x @ p["w"]) + 0.1 * jnp.abs(p["w"]).sum()
    return plain(fn, w=normal(D, D, seed=1), dense=("w",))


@case
def lookups() -> Case:
    """Rows by `take` and by an index, a one-hot product, and one row alone."""

    def fn(p, tokens):
        x = p["a"][tokens] + jnp.take(p["b"], tokens, axis=0, mode="clip")
        return jnp.tanh(x + jax.nn.one_hot(tokens, VOCAB) @ p["c"]) + p["d"][tokens[0, 0]]

    params = {name: normal(VOCAB, D, seed=i) for i, name in enumerate("abcd")}
    return Case(params, fn, TOKENS, ("a", "b", "c"))


CASES = tuple(BUILDERS)
