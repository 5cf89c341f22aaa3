"""What a run fills in of a spec that leaves it open: a schedule for its length, the usual targets for its model."""

from __future__ import annotations

from dataclasses import replace

import jpeft
from jpeft.errors import SpecError
from jpeft.spec import Spec
from jpeft.targets import ALL_LINEAR

# Keys, values and the second feed-forward product; those scaled at their input. As PEFT has them for these models.
IA3_TARGETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "llama": (("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    "mistral": (("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    "qwen2": (("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    "bert": (("key", "value", "output.dense"), ("output.dense",)),
    "gpt2": (("c_attn", "mlp.c_proj"), ("mlp.c_proj",)),
}


def for_run(spec: Spec, model_type: str, steps: int) -> Spec:
    """The spec for a run of so many steps on a model of this type.

    An AdaLoRA without `total_steps` keeps all ranks for a tenth of the run, and the final ones for its last third; an
    IA³ of `all-linear` scales what is usual for the model, if that is known.

    Raises:
      SpecError: an AdaLoRA whose schedule is for a run of another length.

    Example:
      >>> for_run(jpeft.IA3(), "llama", 10).feedforward
      ('down_proj',)
    """
    if isinstance(spec, jpeft.AdaLoRA):
        return _scheduled(spec, steps)
    if isinstance(spec, jpeft.IA3) and spec.targets == ALL_LINEAR and model_type in IA3_TARGETS:
        targets, feedforward = IA3_TARGETS[model_type]
        return replace(spec, targets=targets, feedforward=feedforward)
    return spec


def _scheduled(spec: jpeft.AdaLoRA, steps: int) -> jpeft.AdaLoRA:
    if spec.total_steps is None:
        return replace(spec, total_steps=steps, initial_steps=steps // 10, final_steps=steps // 3)
    if spec.total_steps != steps:
        raise SpecError(f"AdaLoRA: total_steps is {spec.total_steps}, and the run has {steps} steps; leave it out")
    return spec
