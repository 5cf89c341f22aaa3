"""What an X-LoRA is made of, in numbers: the classifier, and what becomes of its logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jpeft.errors import SpecError
from jpeft.spec import LARGEST, SMALLEST


@dataclass(frozen=True)
class XLoRA:
    """The spec of a mixture. Frozen, hashable, serialisable; PEFT's name of each is in brackets.

    Args:
      depth: how many dense layers the classifier has (`xlora_depth`).
      hidden: how wide those between are (`xlora_size`); means nothing at depth 1.
      dropout: the rate after each of them (`xlora_dropout_p`); acts where there is a `dropout_key`.
      bias: of each layer. PEFT's always have one.
      softmax: over the experts, of the logits (`enable_softmax`); otherwise the logits are the scalings.
      temperature: the logits are divided by it first, if there is a softmax (`softmax_temperature`).
      top_k: all but so many of the greatest are set to 0 (`top_k_lora`); None keeps all.
      softmax_topk: a softmax, without temperature, of those that are kept (`enable_softmax_topk`).
      layerwise: each adapted weight has its own scalings (`layerwise_scalings`), or all share theirs.
      global_weight: of what the experts add, all together (`global_scaling_weight`).
      scaling_pass_value: every expert's scaling in the first pass (`scaling_pass_value`); 0 is none of them, None the
        mean, 1 / K.
      train_experts: the experts are trained, too (`use_trainable_adapters`).

    Raises:
      SpecError: a value out of range, or two that don't go together.

    Example:
      >>> XLoRA(depth=2, top_k=1).hidden
      2048
    """

    depth: int = 1
    hidden: int = 2048
    dropout: float = 0.2
    bias: bool = True
    softmax: bool = True
    temperature: float = 1.0
    top_k: int | None = None
    softmax_topk: bool = False
    layerwise: bool = False
    global_weight: float = 1.0
    scaling_pass_value: float | None = 0.0
    train_experts: bool = False

    def __post_init__(self) -> None:
        for name in ("depth", "hidden", *(["top_k"] if self.top_k is not None else [])):
            value = getattr(self, name)
            self._require(type(value) is int and value >= 1, name, "an integer >= 1")
        for name in ("bias", "softmax", "softmax_topk", "layerwise", "train_experts"):
            self._require(isinstance(getattr(self, name), bool), name, "True or False")
        self._require(_number(self.dropout) and 0 <= self.dropout < 1, "dropout", "in [0, 1)")
        self._require(_number(self.temperature) and self.temperature >= SMALLEST, "temperature", "greater than 0")
        self._require(_number(self.global_weight), "global_weight", "a finite number")
        value = self.scaling_pass_value
        self._require(value is None or _number(value), "scaling_pass_value", "a finite number, or None for 1 / K")
        if self.softmax_topk and self.top_k is None:
            raise SpecError("XLoRA: softmax_topk is a softmax of the top_k, and top_k is None; give top_k=")
        if self.top_k is not None and self.scaling_pass_value != 0:
            raise SpecError(
                f"XLoRA: in the first pass all experts have the scaling {self.scaling_pass_value}, so that no top "
                f"{self.top_k} of them can be told; leave scaling_pass_value at 0, or top_k at None"
            )

    def _require(self, fine: bool, name: str, expected: str) -> None:
        if not fine:
            raise SpecError(f"XLoRA: {name} must be {expected}; found {getattr(self, name)!r:.200}")


def _number(value: Any) -> bool:
    """Whether it is one of float32's."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
