"""What is right for a method where a weight here and a matrix in torch are not the same.

A weight may hold several of torch's matrices (stacked layers; q, k and v side by side), a matrix of torch's several
weights, or one the other in another order or scale. Whether adapters of the parts are then one adapter of the whole
depends on the method. So each method states it in its row of `peft_keys.KEYS`, and one that does not is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jpeft.kernel import Kernel
from jpeft_interop.layout import Link
from jpeft_interop.layout.factors import is_as_in_torch

WAY_OUT = (
    "use params that have a leaf for each of torch's matrices, as it lies there (and a layout= that says so), or merge "
    "it into the base"
)


class Parts(NamedTuple):
    """How a method's adapters of the parts of a weight are one adapter of the weight.

    Layers of a stack are held apart by the batch axes that each leaf has.

    Attributes:
      mask: the leaf whose constant `mask` holds the parts beside one another apart; None where nothing can, so that
        they have to agree in all but what goes to their own outputs.
      whole: why all parts of a matrix need an adapter if one has; None where some may go without.
      neutral: what the leaves have where a part goes without.
    """

    mask: str | None = None
    whole: str | None = None
    neutral: float = 0.0

    @property
    def are_blocks(self) -> bool:
        """Whether each part has directions of its own in the whole."""
        return self.mask == "b"


def why_not_parts(parts: Parts | None, method: str, link: Link, links: Sequence[Link], kernel: Kernel) -> str | None:
    """Say why a method can't be taken across a link that is not one matrix to one weight; None where it can.

    Args:
      parts: what the method states.
      method: its name.
      link: between the weight and one of torch's matrices.
      links: all of the weight's.
      kernel: the weight's geometry.
    """
    if parts is not None:
        return None
    matrices = {(other.leaf, other.index) for other in links if other.kind != "plain"}
    if len(matrices) == 1 and is_as_in_torch(link, kernel):
        return None
    held = (
        f"{link.path!r} holds {len(matrices)} of torch's matrices" if len(matrices) > 1 else "it is not as torch has it"
    )
    return (
        f"{held}, and what {method!r} adapters of parts or of a reordered weight are together is not known: {WAY_OUT}"
    )
