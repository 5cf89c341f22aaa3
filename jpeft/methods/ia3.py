"""IA³: learned scalings of keys, values and feed-forward activations.

    y = l ⊙ (x W + b)        (keys, values: the result is scaled, bias included)
    y = (l ⊙ x) W + b        (feed-forward: the input is scaled)

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
arXiv:2205.05638. Several of them multiply.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from jpeft.kernel import Kernel
from jpeft.method import Axes, Leaves, Method, Scales, Shapes
from jpeft.site import Site
from jpeft.spec import Spec
from jpeft.targets import frozen_names, names_weight


@dataclass(frozen=True, repr=False)
class IA3(Spec):
    """The IA³ spec.

    Args:
      targets: as for `LoRA`; the paper's are keys, values and the second feed-forward product.
      feedforward: which of them are scaled at the input: names or a regex, a part of `targets`.

    Raises:
      SpecError: a value out of range.

    Example:
      >>> IA3(targets=["k_proj", "v_proj", "down_proj"], feedforward=["down_proj"]).feedforward
      ('down_proj',)
    """

    feedforward: str | Sequence[str] = ()

    method = "ia3"
    shown: ClassVar = ("targets", "feedforward")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.freeze("feedforward", frozen_names(self.feedforward))
        if isinstance(self.feedforward, str):
            self.check_regexes(self.feedforward)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The feed-forward names."""
        return () if isinstance(self.feedforward, str) else tuple(self.feedforward)

    def is_feedforward(self, path: str) -> bool:
        """Whether the weight at a path is scaled at its input."""
        return names_weight(frozen_names(self.feedforward), path)


def init(key: Array, site: Site, spec: IA3, weight: Any, dtype: jnp.dtype) -> Leaves:
    """Ones."""
    return {name: jnp.ones(shape, dtype) for name, shape in shapes(spec, site).items() if name != "chosen"}


def shapes(spec: IA3, site: Site) -> Shapes:
    """`l` (*batch, *output), or `l_in` (*batch, *contracted), (*batch, channels) at a convolution's input.

    And `chosen` (*batch,) where only some slices of a stack are adapted.
    """
    kernel, batch = site.kernel, site.kernel.batch_shape
    chosen = {} if site.layers is None else {"chosen": batch}
    if spec.is_feedforward(site.path):
        return {"l_in": (*batch, *kernel.sizes(_input_axes(kernel)))} | chosen
    return {"l": (*batch, *kernel.sizes(kernel.output))} | chosen


def _input_axes(kernel: Kernel) -> tuple[int, ...]:
    """The axes of the weight that l_in scales: of a convolution's, the channels."""
    return kernel.contracted[-1:] if kernel.kind == "conv" else kernel.contracted


def axes(kernel: Kernel) -> dict[str, Axes]:
    """Which axis of the weight each axis of a leaf is."""
    out = (*kernel.batch, *kernel.output)
    return {"l": out, "mask": out, "l_in": (*kernel.batch, *_input_axes(kernel)), "chosen": kernel.batch}


def constant(spec: IA3, site: Site) -> Leaves:
    """`chosen` (*batch,) where only some slices of a stack are adapted."""
    return {} if site.layers is None else {"chosen": jnp.asarray(site.chosen)}


def matrices(leaves: Leaves, kernel: Kernel) -> Leaves:
    """l (*batch, out), l_in (*batch, in); ones where a slice, or by a `mask` of l's shape a part, is left out."""
    batch, found = kernel.batch_shape, {}
    if "l" in leaves:
        held = jnp.where(leaves["mask"] > 0, leaves["l"], 1) if "mask" in leaves else leaves["l"]
        found["l"] = held.reshape(*batch, kernel.fan_out)
    if "l_in" in leaves:
        channels = leaves["l_in"].reshape(*batch, 1, -1)
        window = kernel.fan_in // channels.shape[-1]
        found["l_in"] = jnp.broadcast_to(channels, (*batch, window, channels.shape[-1])).reshape(*batch, kernel.fan_in)
    if "chosen" in leaves:
        found = {name: jnp.where(leaves["chosen"][..., None] > 0, leaf, 1) for name, leaf in found.items()}
    return found


def scales(leaves: Leaves) -> Scales:
    """l, on the side where it acts."""
    return Scales(leaves.get("l_in"), leaves.get("l"))


def transform(w: Array, leaves: Leaves) -> Array:
    """W' = diag(l_in) W diag(l)."""
    w = w * leaves["l"][..., None, :] if "l" in leaves else w
    return w * leaves["l_in"][..., :, None] if "l_in" in leaves else w


def transposed(leaves: Leaves) -> Leaves:
    """The sides change places."""
    other = {"l": "l_in", "l_in": "l"}
    return {other[name]: leaf for name, leaf in leaves.items()}


METHOD = Method(transform, matrices, init, shapes, axes, constant=constant, transposed=transposed, scales=scales)
