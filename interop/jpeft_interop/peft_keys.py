"""How each method's leaves lie in PEFT's files: one line a method, read in both directions.

Keys start with `base_model.model.`, exactly once; then the module's name, and what the tables of `lora_keys` and
`ia3_keys` say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jpeft.errors import AdapterError
from jpeft.kernel import Kernel
from jpeft.spec import Spec
from jpeft_interop import ia3_keys, lora_keys
from jpeft_interop.ia3_keys import bias_of_head
from jpeft_interop.layout import Layout, Link
from jpeft_interop.layout.factors import is_head
from jpeft_interop.layout.geometry import canonical_kernel
from jpeft_interop.lora_keys import Leaves, Shapes
from jpeft_interop.parts import Parts

PREFIX = "base_model.model."


class Spot(NamedTuple):
    """One matrix that is adapted.

    Attributes:
      module: its torch module; of experts' stacked kernels, which have none of their own, the parameter.
      kernel: its kernel here.
      as_head: whether it is an embedding used as a tied head.
      head_bias: where that head's bias lies, if it has one.
      stored: the module's name in PEFT's files, where that is another.
      is_parameter: whether PEFT adapts it as a parameter (`target_parameters`), and `module` is its name.
    """

    module: str
    kernel: Kernel
    as_head: bool = False
    head_bias: str | None = None
    stored: str | None = None
    is_parameter: bool = False

    @property
    def is_lookup(self) -> bool:
        """Whether it is an embedding as such."""
        return self.kernel.kind == "embedding" and not self.as_head


def spot_of(link: Link, kernel: Kernel, layout: Layout) -> Spot:
    """The torch matrix that a region of a weight of geometry `kernel` lies in.

    Raises:
      AdapterError: it is no module's weight, or one of several lookups of one.
    """
    lookups = [other.key for other in layout.links[link.path] if other.kind == "embedding" and _same(other, link)]
    if link.kind == "embedding" and len(lookups) > 1:
        raise AdapterError(
            f"{link.path!r} is looked up under {len(lookups)} names, {', '.join(map(repr, lookups))}, each of which "
            "PEFT adapts for itself or not at all: an adapter of a part of them has no form here"
        )
    if link.key in layout.parameters:
        return Spot(link.key, canonical_kernel(link), is_parameter=True)
    if f"{link.key.rpartition('.out_proj.')[0]}.in_proj_weight" in layout.by_key:
        raise AdapterError(
            f"{link.key!r} is of torch's MultiheadAttention, which reads the weight and never calls the module: PEFT's "
            "adapter of it has no effect there, and here it would; leave it out of the targets"
        )
    if not link.key.endswith(".weight"):
        raise AdapterError(f"{link.path!r} lies in {link.key!r}; PEFT adapts modules, whose weight is called 'weight'")
    module, as_head = link.key.removesuffix(".weight"), is_head(link, kernel)
    canonical = canonical_kernel(link, as_head=as_head, groups=kernel.groups)
    return Spot(module, canonical, as_head, bias_of_head(module, layout.by_key) if as_head else None)


def _same(one: Link, other: Link) -> bool:
    return (one.leaf, one.index) == (other.leaf, other.index)


class Keys(NamedTuple):
    """How one method's leaves lie in a file.

    Attributes:
      suffixes: the end of the key of each leaf.
      embedding: the same for an embedding.
      shapes: `(spec, spot) -> {leaf: shape}`, in the file.
      to_file: `(leaves, spot) -> leaves`: those of one matrix, each leaf's axes joined, as the file has them.
      from_file: `(spec, leaves, spot) -> leaves`: the inverse, in the kernel's own axes.
      why_not: `(spot) -> reason` that PEFT has no such thing there, or None.
      has_rank_zero: whether a file has tensors of rank 0; where not, the module is left out of it.
      scaling: `(spec, module) -> s`, or None where the method has none.
      parts: how adapters of the parts of a weight are one of the weight; None refuses all but whole matrices.
    """

    suffixes: Mapping[str, str]
    embedding: Mapping[str, str]
    shapes: Callable[[Any, Spot], Shapes]
    to_file: Callable[[Leaves, Spot], Leaves]
    from_file: Callable[[Any, Leaves, Spot], Leaves]
    why_not: Callable[[Spot], str | None]
    has_rank_zero: bool = False
    scaling: Callable[[Any, str], float] | None = None
    parts: Parts | None = None

    def names(self, spot: Spot) -> dict[str, str]:
        """The file's key of each leaf."""
        table = self.embedding if spot.is_lookup else self.suffixes
        return {leaf: f"{PREFIX}{spot.stored or spot.module}{suffix}" for leaf, suffix in table.items()}

    def split(self, key: str, file: str) -> tuple[str, str | None]:
        """The torch module and the leaf that a key is for; the leaf is None for a key that is a param's own name.

        Raises:
          AdapterError: the key lacks the prefix.
        """
        if not key.startswith(PREFIX):
            raise AdapterError(f"{file}: key {key!r} does not start with {PREFIX!r}, as every key of a PEFT file does")
        name = key.removeprefix(PREFIX)
        for leaf, suffix in (*self.suffixes.items(), *self.embedding.items()):
            if name.endswith(suffix):
                return name.removesuffix(suffix), leaf
        return name, None


def _no_groups(spot: Spot) -> str | None:
    return "a low-rank adapter on a grouped convolution is no change of its kernel" if spot.kernel.groups != 1 else None


def _no_parameter(spot: Spot) -> str | None:
    return "PEFT's target_parameters are for LoRA alone" if spot.is_parameter else None


def _dora_not(spot: Spot) -> str | None:
    if spot.is_parameter:
        return _no_parameter(spot)
    if spot.as_head:
        return (
            "DoRA on a tied output head has a magnitude for each token, on the embedding one for each feature: no "
            "change of the one weight is both; adapt params where the head is a leaf of its own"
        )
    return _no_groups(spot)


def _adalora_not(spot: Spot) -> str | None:
    if spot.is_lookup:
        return "AdaLoRA has no form for embeddings"
    if spot.is_parameter:
        return _no_parameter(spot)
    if spot.kernel.kind == "conv" and len(spot.kernel.contracted) != 3:
        return "AdaLoRA has no form for convolutions but those of images"
    return _no_groups(spot)


def _ia3_not(spot: Spot) -> str | None:
    if spot.head_bias is not None:
        return (
            f"IA³ on the tied output head scales its bias {spot.head_bias!r} too, which lies elsewhere; adapt "
            "params where the head is a leaf of its own"
        )
    if spot.is_parameter:
        return _no_parameter(spot)
    if spot.is_lookup:
        return "IA³ has no form for embeddings"
    if spot.kernel.kind == "conv" and len(spot.kernel.contracted) not in (3, 4):
        return "IA³ has no form for convolutions over one axis"
    return None


def _lora_scaling(spec: Any, module: str) -> float:
    return spec.scaling(spec.rank_of(module), spec.alpha_of(module))


def _by_rank(shapes: Callable[[Kernel, int, bool], Shapes]) -> Callable[[Any, Spot], Shapes]:
    return lambda spec, spot: shapes(spot.kernel, spec.rank_of(spot.module), spot.as_head)


def _on_input(spec: Any, spot: Spot) -> bool:
    return ia3_keys.is_feedforward(spec.feedforward, spot.module)


_lora = Keys(
    lora_keys.LORA,
    lora_keys.LORA_EMBEDDING,
    shapes=_by_rank(lora_keys.shapes),
    to_file=lambda leaves, spot: lora_keys.to_file(leaves, spot.kernel, spot.as_head),
    from_file=lambda spec, leaves, spot: lora_keys.from_file(leaves, spot.kernel, spot.as_head),
    why_not=_no_groups,
    scaling=_lora_scaling,
    parts=Parts(mask="b"),
)

KEYS: dict[str, Keys] = {
    "lora": _lora,
    "dora": _lora._replace(
        suffixes=lora_keys.DORA,
        embedding=lora_keys.DORA_EMBEDDING,
        why_not=_dora_not,
        parts=Parts(mask="b", whole="some have no factors: DoRA's magnitudes of those would be trained, too"),
    ),
    "adalora": Keys(
        lora_keys.ADALORA,
        {},
        shapes=_by_rank(lora_keys.adalora_shapes),
        to_file=lambda leaves, spot: lora_keys.adalora_to_file(leaves, spot.kernel, spot.as_head),
        from_file=lambda spec, leaves, spot: lora_keys.adalora_from_file(leaves, spot.kernel, spot.as_head),
        why_not=_adalora_not,
        has_rank_zero=True,
        scaling=lambda spec, module: spec.scaling,
        parts=Parts(whole="AdaLoRA's penalty and budget are of each matrix on its own"),
    ),
    "ia3": Keys(
        ia3_keys.IA3,
        {},
        shapes=lambda spec, spot: {"l": ia3_keys.shape(spot.kernel, spot.as_head, _on_input(spec, spot))},
        to_file=lambda leaves, spot: ia3_keys.to_file(leaves, spot.kernel, spot.as_head),
        from_file=lambda spec, leaves, spot: ia3_keys.from_file(
            leaves, spot.kernel, spot.as_head, _on_input(spec, spot)
        ),
        why_not=_ia3_not,
        has_rank_zero=True,
        parts=Parts(mask="l", neutral=1.0),
    ),
}


def keys_of(spec: Spec) -> Keys:
    """How the leaves of a spec's method lie in a file.

    Raises:
      AdapterError: PEFT has no such method.
    """
    if spec.method not in KEYS:
        raise AdapterError(f"{spec}: {spec.method!r} has no place in a PEFT file; jpeft.save keeps it")
    return KEYS[spec.method]
