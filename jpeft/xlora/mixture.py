"""A mixture: experts by name, and the classifier that mixes them. A pytree, apart from the params it was made for."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jpeft.adapter import Adapter
from jpeft.errors import SpecError
from jpeft.gates import ROUTABLE
from jpeft.xlora import classifier as mlp
from jpeft.xlora.spec import XLoRA

DIGITS = 20  # of a number in a path; more are letters


class Layer(NamedTuple):
    """One weight that some expert adapts.

    Attributes:
      path: of the leaf.
      shape: of the leaf's batch axes: `()`, or that of the stack of weights that it is, each a layer of its own.
    """

    path: str
    shape: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """How many weights the leaf holds."""
        return math.prod(self.shape)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mixture:
    """Experts and their classifier.

    Attributes:
      experts: adapters by name. An expert that has nothing at a weight adds nothing there.
      classifier: its dense layers, first to last, each `kernel` (in, out) and perhaps `bias` (out,). The last one's
        outputs are (K,), or (layers, K) if `spec.layerwise`.
      spec: static.
      names: static; expert k of the classifier is `names[k]`.
    """

    experts: dict[str, Adapter]
    classifier: mlp.Classifier
    spec: XLoRA = field(metadata={"static": True})
    names: tuple[str, ...] = field(metadata={"static": True})

    not_an_adapter: ClassVar[str] = (
        "an X-LoRA mixture is no adapter: it differs from token to token, so no single weight does it, and it can't be "
        "applied, merged or attached; run it with jpeft.xlora.lift(model)(params, mixture, ...)"
    )

    @property
    def trained(self) -> dict[str, Any]:
        """What an optimizer updates: the classifier's leaves, and those of the experts if `spec.train_experts`."""
        if not self.spec.train_experts:
            return {"classifier": self.classifier}
        return {"classifier": self.classifier, "experts": {name: one.trained for name, one in self.experts.items()}}

    def replace(self, *, trained: Mapping[str, Any] | None = None, **parts: Any) -> Mixture:
        """The mixture with other parts; `trained` is a tree like the property of that name."""
        new = replace(self, **parts)
        if trained is None:
            return new
        leaves = trained.get("experts", {})
        experts = {name: e.replace(trained=leaves[name]) if leaves else e for name, e in new.experts.items()}
        return replace(new, classifier=trained["classifier"], experts=experts)

    @property
    def features(self) -> int:
        """The size of the hidden states that the classifier reads."""
        return self.classifier[0]["kernel"].shape[0]


def init(key: Array, spec: XLoRA, experts: Mapping[str, Adapter], features: int, dtype: Any = jnp.float32) -> Mixture:
    """A mixture of trained experts under a new classifier.

    Args:
      key: a JAX PRNG key.
      spec: what kind of mixture.
      experts: LoRA adapters by name, any strings; of any targets, ranks and scalings.
      features: the size of the model's hidden states.
      dtype: of the classifier.

    Raises:
      TypeError: an expert that is no adapter.
      SpecError: an expert that can't be mixed; no experts, or fewer than `top_k`.

    Example:
      >>> import jpeft
      >>> params = {"dense": {"kernel": jnp.ones((3, 2))}}
      >>> expert = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=1), params)
      >>> init(jax.random.key(1), XLoRA(), {"a": expert, "b": expert}, features=3).classifier[0]["kernel"].shape
      (3, 2)
    """
    check_experts(spec, experts)
    return Mixture(dict(experts), mlp.init(key, spec, features, outputs_of(spec, experts), dtype), spec, tuple(experts))


def check_experts(spec: XLoRA, experts: Mapping[str, Adapter]) -> None:
    """Raises what `init` says."""
    if not isinstance(experts, Mapping):
        raise TypeError(f"expected the experts as a mapping, {{name: adapter}}; found {type(experts).__name__}")
    for name, expert in experts.items():
        if not isinstance(name, str) or not isinstance(expert, Adapter):
            raise TypeError(f"expert {name!r:.100}: expected an adapter under a string; found {type(expert).__name__}")
        _check_expert(name, expert)
    if len(experts) < (least := spec.top_k or 1):
        kind = "a mixture" if spec.top_k is None else f"a mixture of the top {least}"
        raise SpecError(f"{kind} needs at least {least} experts; found {len(experts)}")


def _check_expert(name: str, expert: Adapter) -> None:
    for site in expert.sites:
        if site.method == "replacement":
            raise SpecError(
                f"expert {name!r:.100} replaces {site.path!r:.200} whole (bias=, modules_to_save=), and that can't "
                "differ from token to token; make it an expert without, and put such leaves into the params"
            )
        if site.method not in ROUTABLE:
            raise SpecError(
                f"expert {name!r:.100} is a {site.method!r} at {site.path!r:.200}; a mixture takes low-rank experts "
                f"({', '.join(ROUTABLE)}), whose change of each token can be scaled"
            )


def layers_of(experts: Mapping[str, Adapter]) -> tuple[Layer, ...]:
    """The weights that any expert adapts, layer 2 before layer 10: what layer-wise scalings are for, in order."""
    found = {site.path: Layer(site.path, site.kernel.batch_shape) for e in experts.values() for site in e.sites}
    return tuple(found[path] for path in sorted(found, key=_numbered))


def _numbered(path: str) -> list[tuple[int, str]]:
    is_number = lambda part: part.isdecimal() and len(part) < DIGITS
    return [(int(part), "") if is_number(part) else (-1, part) for part in re.split(r"(\d+)", path)]


def outputs_of(spec: XLoRA, experts: Mapping[str, Adapter]) -> tuple[int, ...]:
    """The shape of the classifier's logits for one token."""
    layers = (sum(layer.size for layer in layers_of(experts)),) if spec.layerwise else ()
    return (*layers, len(experts))
