"""Several LoRAs made one: PEFT's `add_weighted_adapter` as a pure function.

With factors A_i, B_i, scalings s_i and weights w_i (v_i = w_i s_i):

    linear             A = Σ sign(v_i) √|v_i| A_i,  B = Σ √|v_i| B_i      (cross terms A_i B_j and all)
    cat                A = [v_1 A_1, v_2 A_2, …],   B = [B_1; B_2; …]     (exactly Σ w_i ΔW_i)
    svd                the best A B of rank r for Σ w_i ΔW_i
    ties, dare_ties    the elected mean of the pruned A_i, and of the B_i
    dare_linear, magnitude_prune   the weighted sum of the pruned A_i, and of the B_i
    …_svd              the same with the ΔW_i, then the best A B of rank r

The result has scaling 1.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array

from jpeft.adapter import Adapter
from jpeft.algebra import sparsify
from jpeft.algebra.ia3 import combine_ia3
from jpeft.algebra.sparsify import MajoritySign
from jpeft.algebra.svd import factors, svd, thin_svd
from jpeft.algebra.terms import (
    Part,
    Term,
    check_lora,
    check_same_kernel,
    lora_from,
    lora_site,
    same_targets,
    term,
    union_of_layers,
)
from jpeft.effects import Weighted, weighted_adapters
from jpeft.errors import KernelError, SpecError
from jpeft.methods.ia3 import IA3
from jpeft.methods.lora import LoRA
from jpeft.site import Site
from jpeft.targets import frozen_mapping

Kind = Literal[
    "linear",
    "cat",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_ties",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
KINDS: tuple[str, ...] = get_args(Kind)
Group = list[tuple[Site, Term, Array]]


class _How(NamedTuple):
    """What was asked for."""

    kind: str
    density: float
    sign: MajoritySign
    rank: int
    key: Array | None

    @property
    def pruning(self) -> str:
        return self.kind.removesuffix("_svd")

    def at(self, path: str) -> _How:
        """With a key of the weight's own."""
        return self if self.key is None else self._replace(key=jax.random.fold_in(self.key, zlib.crc32(path.encode())))


def combine(
    adapters: Sequence[Adapter] | Mapping[str, Adapter],
    weights: Sequence[Any] | Mapping[str, Any] | Array | None = None,
    kind: Kind = "linear",
    *,
    density: float | None = None,
    majority_sign: MajoritySign = "total",
    rank: int | None = None,
    key: Array | None = None,
) -> Adapter:
    """One LoRA for several, weighted; equal to PEFT 0.21.2's `add_weighted_adapter`.

    A weight of the model that only some of them adapt gets what those do. A kernel of rank 0 counts as not adapted.
    Of stacked kernels, each matrix is combined by itself; where a smaller rank was padded to the stack's, the zeros
    count as entries to prune. `linear` and `cat` are differentiable in the weights; all kinds run under jit.

    Where PEFT is wrong, this is not PEFT: rsLoRA gives scaling 1 here (there √r too much); a bias of B adds up exactly
    with `linear`, `cat` and `svd` (there it is lost); a single adapter is pruned and cut as asked (there it is always
    `linear`). Leaves that are trained whole are refused (there they are lost).

    Args:
      adapters: LoRAs, or with `linear` IA³s, whose scalings are added.
      weights: how much of each; numbers or arrays, negative ones subtract. 1 if None.
      kind: see the top of the module. `cat` has the sum of the ranks, `linear` and the pruned kinds need equal ranks.
      density: the share of entries that are kept, in (0, 1]; for ties, dare and magnitude_prune.
      majority_sign: how ties elects a sign: `total` (by sum) or `frequency` (by count).
      rank: the most that the svd kinds keep; the largest rank of all if None.
      key: a JAX key for dare's random choice.

    Returns:
      a LoRA with scaling 1, and the dropout of the first.

    Raises:
      SpecError: an adapter of another method, leaves trained whole, or an option missing, out of range or unused.
      KernelError: unequal ranks at a weight, or one seen differently.

    Example:
      >>> import jpeft
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> one, two = (jpeft.init(jax.random.key(i), jpeft.LoRA(rank=2), params) for i in range(2))
      >>> combine([one, two], [0.7, -0.3], "cat").spec.rank
      4
    """
    pairs = weighted_adapters(adapters, weights)
    if not pairs:
        raise SpecError("combine takes at least one adapter; found none")
    how = _how(pairs, kind, density, majority_sign, rank, key)
    if all(isinstance(adapter.spec, IA3) for adapter, _ in pairs):
        if kind != "linear":
            raise SpecError(f"IA3 adapters are added: kind='linear'; found {kind!r}")
        return combine_ia3(pairs)
    groups = _groups(pairs)
    parts = [_part(path, group, how.at(path)) for path, group in groups.items()]
    specs: list[Any] = [adapter.spec for adapter, _ in pairs]
    return lora_from(parts, same_targets(specs[0], specs[1:], groups))


def _groups(pairs: Sequence[Weighted]) -> dict[str, Group]:
    """What each adapter does at each weight, and how much of it is wanted."""
    groups: dict[str, Group] = {}
    for adapter, weight in pairs:
        check_lora(adapter, "combine")
        amount = jnp.asarray(1 if weight is None else weight, jnp.float32)
        for site in adapter.sites:
            groups.setdefault(site.path, []).append((site, term(adapter, site), amount))
    return groups


def _how(
    pairs: Sequence[Weighted], kind: str, density: float | None, sign: MajoritySign, rank: int | None, key: Array | None
) -> _How:
    """The options, each needed and in range, none to be ignored."""
    if kind not in KINDS:
        raise SpecError(f"kind must be one of {KINDS}; found {kind!r}")
    if sign not in get_args(MajoritySign):
        raise SpecError(f"majority_sign must be one of {get_args(MajoritySign)}; found {sign!r}")
    is_sparse = kind.startswith(("ties", "dare", "magnitude"))
    _check_given("density", density, is_sparse, kind, "the share of entries to keep, as in density=0.5")
    _check_given("key", key, kind.startswith("dare"), kind, "a key for its random choice: key=jax.random.key(0)")
    if density is not None and not 0 < density <= 1:
        raise SpecError(f"density must be in (0, 1]; found {density}")
    if rank is not None and not kind.endswith("svd"):
        raise SpecError(f"rank is for the svd kinds; {kind!r} has the rank that it has")
    if rank is not None and rank < 1:
        raise SpecError(f"rank must be at least 1; found {rank}")
    most = max((_largest_rank(adapter.spec) for adapter, _ in pairs if isinstance(adapter.spec, LoRA)), default=0)
    return _How(kind, 1 if density is None else density, sign, most if rank is None else rank, key)


def _check_given(name: str, value: Any, needed: bool, kind: str, hint: str) -> None:
    if needed and value is None:
        raise SpecError(f"kind={kind!r} needs {hint}")
    if not needed and value is not None:
        raise SpecError(f"kind={kind!r} has no use for {name}=; leave it out")


def _largest_rank(spec: LoRA) -> int:
    return max(spec.rank, *(rank for _, rank in frozen_mapping(spec.rank_pattern)), 0)


def _part(path: str, group: Group, how: _How) -> Part:
    """The combination at one weight."""
    site = check_same_kernel(site for site, *_ in group)
    acting = [(site, one, weight) for site, one, weight in group if one.rank > 0] or group[:1]
    terms, weights = [one for _, one, _ in acting], [weight for *_, weight in acting]
    dtype = jnp.result_type(*(one.dtype for one in terms))
    if terms[0].rank == 0:
        a, b = terms[0].a, terms[0].b
    elif how.kind.endswith("svd"):
        a, b = _by_svd(terms, weights, how)
    elif how.kind == "cat":
        a = jnp.concatenate([w * one.s * one.a for one, w in zip(terms, weights, strict=True)], -1)
        b = jnp.concatenate([one.b for one in terms], -2)
    else:
        a, b = _by_factor(path, terms, weights, how)
    bias = _bias(path, terms, weights, how)
    new = lora_site(site, a.shape[-1], union_of_layers(site for site, *_ in acting))
    return Part(new, a, b, bias, dtype)


def _bias(path: str, terms: Sequence[Term], weights: Sequence[Array], how: _How) -> Array | None:
    """Σ w_i s_i b_i."""
    biases = [w * one.bias for one, w in zip(terms, weights, strict=True) if one.bias is not None]
    if biases and how.kind not in ("linear", "cat", "svd"):
        raise SpecError(
            f"{path!r} has a bias of B (factor_bias), for which {how.kind!r} means nothing; use linear, cat or svd"
        )
    return sum(biases[1:], start=biases[0]) if biases else None


def _by_svd(terms: Sequence[Term], weights: Sequence[Array], how: _How) -> tuple[Array, Array]:
    """The best factors of rank `how.rank` for the combined ΔW; formed only where it is pruned."""
    if how.kind == "svd":
        a = jnp.concatenate([w * one.s * one.a for one, w in zip(terms, weights, strict=True)], -1)
        return factors(thin_svd(a, jnp.concatenate([one.b for one in terms], -2)), how.rank)
    batch = terms[0].scaling.shape
    each = [jnp.broadcast_to(w, batch) for w in weights]
    return factors(svd(_mixed([one.dense() for one in terms], each, how)), how.rank)


def _by_factor(path: str, terms: Sequence[Term], weights: Sequence[Array], how: _How) -> tuple[Array, Array]:
    """A from the A_i and B from the B_i."""
    if len({one.rank for one in terms}) > 1:
        raise KernelError(
            f"{path!r}: {how.kind!r} adds factors, so their ranks must be equal; found "
            f"{[one.rank for one in terms]}. Use kind='cat' or an svd kind, or shrink(adapter, rank) first"
        )
    v = [w * one.scaling for one, w in zip(terms, weights, strict=True)]
    root = [jnp.sqrt(jnp.abs(one)) for one in v]
    signed = [jnp.where(one >= 0, r, -r) for one, r in zip(v, root, strict=True)]
    # A slice that an adapter leaves alone is none of its tensors: it must not vote.
    present = [(one.s != 0).astype(one.a.dtype) for one in terms]
    key_a, key_b = (None, None) if how.key is None else jax.random.split(how.key)
    a = _mixed([p * one.a for p, one in zip(present, terms, strict=True)], signed, how._replace(key=key_a))
    b = _mixed([p * one.b for p, one in zip(present, terms, strict=True)], root, how._replace(key=key_b))
    return a, b


def _mixed(tensors: Sequence[Array], weights: Sequence[Array], how: _How) -> Array:
    """Tensors (*batch, rows, columns) pruned and put together with weights (*batch,)."""
    if how.pruning.startswith("dare"):
        assert how.key is not None
        keys = jax.random.split(how.key, len(tensors))
        tensors = [sparsify.random(key, x, how.density) for key, x in zip(keys, tensors, strict=True)]
    elif how.pruning != "linear":
        tensors = [sparsify.largest(x, how.density) for x in tensors]
    if how.pruning.endswith("ties"):
        return sparsify.elected_mean(tensors, weights, how.sign)
    return sparsify.weighted_sum(tensors, weights)
