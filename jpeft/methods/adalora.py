"""AdaLoRA: low-rank adaptation in the form of an SVD, whose ranks a budget shares out.

    W' = W + s A diag(E) B,    s = alpha / (r + 1e-5)

with A (in, r), E (r), B (r, out); the factors are kept near orthogonal by a penalty, and entries of E set to zero take
their direction out. Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
arXiv:2303.10512. s is PEFT's: by the rank at the start, whatever is pruned. `jpeft.adalora` is the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jpeft.draws import gaussian
from jpeft.kernel import Kernel
from jpeft.method import Axes, Leaves, Meeting, Method, Shapes, Weights
from jpeft.methods import lora
from jpeft.site import Site
from jpeft.spec import Spec, names_of
from jpeft.targets import Patterns, frozen_mapping, pattern_value


@dataclass(frozen=True, repr=False)
class AdaLoRA(Spec):
    """The AdaLoRA spec: hyperparameters, schedule and targets.

    Args:
      rank: r of every kernel at the start.
      target_rank: the mean rank at the end.
      alpha: the numerator of the scaling; `rank` if None.
      dropout: the rate on the branch's input; acts where `attach` gets a `dropout_key`.
      total_steps: optimizer steps of the whole run.
      initial_steps: steps at the start (the paper's t_i) in which nothing is pruned.
      final_steps: steps at the end (t_f) in which the ranks stay.
      every: steps between allocations (Δ_T).
      beta1: of the moving average of the sensitivity.
      beta2: of the moving average of its uncertainty.
      orthogonality: the weight of the penalty (γ).
      ranks: real ranks by module name or regex suffix, once pruned.

    Raises:
      SpecError: a value out of range.

    Example:
      >>> AdaLoRA(rank=12, target_rank=4, total_steps=1000)
      AdaLoRA(rank=12, target_rank=4, total_steps=1000, targets='all-linear')
    """

    rank: int = 12
    target_rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    total_steps: int | None = None
    initial_steps: int = 0
    final_steps: int = 0
    every: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.5
    ranks: Patterns[int] = ()

    method = "adalora"
    shown: ClassVar = ("rank", "target_rank", "total_steps", "targets")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.freeze("ranks", frozen_mapping(self.ranks))
        for name, rank, least in (("rank", self.rank, 1), ("target_rank", self.target_rank, 0)):
            self.check_ranks(name, rank, least)
        for name, rank in frozen_mapping(self.ranks):
            self.check_ranks(name, rank)
        self.check_regexes(*self.patterns)
        for name in ("dropout", "beta1", "beta2"):
            self.check_rate(name)
        for name in ("alpha", "orthogonality"):
            self.check_number(name, getattr(self, name) or 0)
        self._check_schedule()

    def _check_schedule(self) -> None:
        for name, least in (("initial_steps", 0), ("final_steps", 0), ("every", 1)):
            self.check_ranks(name, getattr(self, name), least)
        if self.total_steps is None:
            return
        self.check_ranks("total_steps", self.total_steps, 1)
        if self.initial_steps + self.final_steps >= self.total_steps:
            raise self.fail(
                f"initial_steps and final_steps must leave some of the {self.total_steps} total_steps for pruning; "
                f"found {self.initial_steps} + {self.final_steps}"
            )

    @property
    def patterns(self) -> tuple[str, ...]:
        """The names of the ranks."""
        return names_of(self.ranks)

    @property
    def dropout_rate(self) -> float:
        """Of the dropout on the input of the branch."""
        return self.dropout

    @property
    def penalty_weight(self) -> float:
        """γ, of the orthogonality penalty."""
        return self.orthogonality

    def rank_of(self, *names: str) -> int:
        """r of the weight in a module, or by its other names."""
        return pattern_value(self.ranks, names, self.rank)

    @property
    def scaling(self) -> float:
        """s: by the rank at the start."""
        return (self.rank if self.alpha is None else self.alpha) / (self.rank + 1e-5)


def init(key: Array, site: Site, spec: AdaLoRA, weight: Array, dtype: jnp.dtype) -> Leaves:
    """`a` and `b`, N(0, 0.02²), and `e`, zero."""
    shape = shapes(spec, site)
    key_a, key_b = jax.random.split(key)
    a = gaussian(key_a, shape["a"], 0.02, dtype)
    b = gaussian(key_b, shape["b"], 0.02, dtype)
    return {"a": a, "b": b, "e": jnp.zeros(shape["e"], dtype)}


def shapes(spec: AdaLoRA, site: Site) -> Shapes:
    """`a` (*batch, *contracted, r), `b` (*batch, r, *output), `e` (*batch, r), `scaling` (*batch,)."""
    del spec
    kernel, batch, rank = site.kernel, site.kernel.batch_shape, site.rank
    a, b = (*batch, *kernel.sizes(kernel.contracted), rank), (*batch, rank, *kernel.sizes(kernel.output))
    return {"a": a, "b": b, "e": (*batch, rank), "scaling": batch}


def axes(kernel: Kernel) -> dict[str, Axes]:
    """LoRA's, and those of E."""
    return lora.axes(kernel) | {"e": (*kernel.batch, None)}


def constant(spec: AdaLoRA, site: Site) -> Leaves:
    """`scaling` (*batch,): s of each matrix; 0 where `layers` leaves a slice of a stack alone."""
    return {"scaling": jnp.asarray(site.chosen * np.float32(spec.scaling))}


def matrices(leaves: Leaves, kernel: Kernel) -> Leaves:
    """A (*batch, in, r), B (*batch, r, out), E (*batch, r)."""
    return lora.matrices(leaves, kernel)


def as_lora(leaves: Leaves) -> Leaves:
    """The same change as a LoRA's: A diag(E) for A."""
    return {"a": leaves["a"] * leaves["e"][..., None, :], "b": leaves["b"], "scaling": leaves["scaling"]}


def delta(leaves: Leaves) -> Array:
    """ΔW = s A diag(E) B, (*batch, in, out)."""
    return lora.delta(as_lora(leaves))


def transform(w: Array, leaves: Leaves) -> Array:
    """W' = W + s A diag(E) B."""
    return w + delta(leaves)


def product(x: Array, y: Array, w: Weights, leaves: Leaves, *, forward_mode: bool) -> Array:
    """y = x W + s (x A diag(E)) B."""
    return lora.product(x, y, w, as_lora(leaves), forward_mode=forward_mode)


def lookup(meeting: Meeting, y: Array, w: Weights, leaves: Leaves) -> Array:
    """As LoRA's."""
    return lora.lookup(meeting, y, w, as_lora(leaves))


def penalty(group: Sequence[Leaves]) -> Array:
    """The mean of ‖AᵀA - I‖_F and ‖B Bᵀ - I‖_F over all matrices: how far the factors are from orthogonal."""
    norms = [_off_identity(gram) for leaves in group for gram in _grams(leaves)]
    return jnp.concatenate([norm.ravel() for norm in norms]).mean() if norms else jnp.zeros(())


def _grams(leaves: Leaves) -> tuple[Array, Array]:
    a, b = leaves["a"], leaves["b"]
    return jnp.matmul(a.mT, a, precision="highest"), jnp.matmul(b, b.mT, precision="highest")


def _off_identity(gram: Array) -> Array:
    """‖G - I‖_F, (*batch,); its derivative at zero is zero."""
    square = jnp.sum((gram - jnp.eye(gram.shape[-1], dtype=gram.dtype)) ** 2, (-2, -1))
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


METHOD = Method(
    transform,
    matrices,
    init=init,
    shapes=shapes,
    axes=axes,
    constant=constant,
    delta=delta,
    weighted=lora.weighted,
    product=product,
    transposed=lora.transposed,
    lookup=lookup,
    penalty=penalty,
)
