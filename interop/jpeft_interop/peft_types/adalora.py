"""The config of an AdaLoRA.

PEFT's has every field of a LoRA, and reads some of them nowhere: `r`, `rank_pattern` as a LoRA has it, `alpha_pattern`,
`use_rslora` and `lora_bias`. Its own `rank_pattern` says for each module which of the directions at the start are left:

    {"model.layers.0.self_attn.q_proj.lora_E": [true, false, true, …]}

The file's tensors hold only these. Which ones they were changes nothing any more: only how many is kept here.
"""

from __future__ import annotations

import re
from typing import Any

import jpeft
from jpeft.targets import frozen_mapping
from jpeft_interop.peft_types import lora
from jpeft_interop.peft_types.fields import COUNT, POSITIVE, Config, Field, PeftType, between, is_number

MARK = ".lora_E"  # the ranks are those of that tensor

DEFAULTS: dict[str, Any] = lora.DEFAULTS | {
    "beta1": 0.85,
    "beta2": 0.85,
    "deltaT": 1,
    "init_r": 12,
    "orth_reg_weight": 0.5,
    "peft_type": "ADALORA",
    "rank_pattern": None,
    "target_r": 8,
    "tfinal": 0,
    "tinit": 0,
    "total_step": None,
}


def _is_kept(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, bool) for one in value)


FIELDS: dict[str, Field] = lora.SHARED | {
    "beta1": (between(0, 1), "a number in [0, 1)"),
    "beta2": (between(0, 1), "a number in [0, 1)"),
    "deltaT": POSITIVE,
    "init_r": POSITIVE,
    "lora_alpha": (lambda value: is_number(value) and value > 0, "a number > 0"),
    "orth_reg_weight": (between(0, float("inf")), "a number >= 0"),
    "rank_pattern": (
        lambda value: value is None or (isinstance(value, dict) and all(map(_is_kept, value.values()))),
        "an object of lists of true and false, or null",
    ),
    "target_r": COUNT,
    "tfinal": COUNT,
    "tinit": COUNT,
    "total_step": POSITIVE,
}

UNREAD = ("alpha_pattern", "lora_bias", "r", "use_rslora")  # by PEFT, of an AdaLoRA


def _check(config: Config) -> str | None:
    for name, kept in (config["rank_pattern"] or {}).items():
        if not name.endswith(MARK):
            return f"'rank_pattern' has {name!r}; expected names that end in {MARK!r}"
        if len(kept) != config["init_r"]:
            return f"'rank_pattern' has {len(kept)} entries for {name!r}; 'init_r' is {config['init_r']}"
    return None


def _read(config: Config) -> jpeft.AdaLoRA:
    pattern = config["rank_pattern"] or {}
    return jpeft.AdaLoRA(
        **lora.shared(config),
        rank=config["init_r"],
        target_rank=config["target_r"],
        total_steps=config["total_step"],
        initial_steps=config["tinit"],
        final_steps=config["tfinal"],
        every=config["deltaT"],
        beta1=config["beta1"],
        beta2=config["beta2"],
        orthogonality=config["orth_reg_weight"],
        ranks={re.escape(name.removesuffix(MARK)): sum(kept) for name, kept in pattern.items()},
    )


def _write(spec: jpeft.AdaLoRA) -> dict[str, Any]:
    """Write the fields; the ranks of `spec` are by whole names, escaped."""
    kept = lambda rank: [True] * rank + [False] * (spec.rank - rank)
    modules = ((re.sub(r"\\(.)", r"\1", name), rank) for name, rank in frozen_mapping(spec.ranks))
    pattern = {f"{module}{MARK}": kept(rank) for module, rank in modules}
    return lora.shared_of(spec) | {
        "beta1": spec.beta1,
        "beta2": spec.beta2,
        "deltaT": spec.every,
        "init_r": spec.rank,
        "orth_reg_weight": spec.orthogonality,
        "rank_pattern": pattern or None,
        "target_r": spec.target_rank,
        "tfinal": spec.final_steps,
        "tinit": spec.initial_steps,
        "total_step": spec.total_steps,
    }


ADALORA = PeftType(
    "ADALORA",
    DEFAULTS,
    FIELDS,
    (*lora.REFUSED, "target_parameters", "use_dora"),
    (*lora.HISTORY, *UNREAD),
    _read,
    _write,
    _check,
    ("lora_alpha",),
)
