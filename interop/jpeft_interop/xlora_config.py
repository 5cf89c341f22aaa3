"""PEFT's `adapter_config.json` of an X-LoRA, checked, and the spec that it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jpeft.errors import AdapterError, SpecError
from jpeft.xlora import XLoRA
from jpeft_interop.peft_types.fields import is_inert

# PEFT's name, ours, and the types of its values.
FIELDS: tuple[tuple[str, str, tuple[type, ...]], ...] = (
    ("xlora_depth", "depth", (int,)),
    ("xlora_size", "hidden", (int,)),
    ("xlora_dropout_p", "dropout", (float, int)),
    ("enable_softmax", "softmax", (bool,)),
    ("enable_softmax_topk", "softmax_topk", (bool,)),
    ("softmax_temperature", "temperature", (float, int)),
    ("top_k_lora", "top_k", (int, type(None))),
    ("layerwise_scalings", "layerwise", (bool,)),
    ("global_scaling_weight", "global_weight", (float, int)),
    ("scaling_pass_value", "scaling_pass_value", (float, int)),
    ("use_trainable_adapters", "train_experts", (bool,)),
)
ABOUT = ("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision")
OWN = ("inference_mode", "hidden_size", "adapters")


@dataclass(frozen=True)
class XLoraConfig:
    """What the file says.

    Attributes:
      spec: of the mixture.
      features: the size of the hidden states.
      names: the experts', in the order of the file, which PEFT sorts: not that of the classifier.
    """

    spec: XLoRA
    features: int
    names: tuple[str, ...]


def read_xlora_config(found: Mapping[str, Any], file: str) -> XLoraConfig:
    """The config in a JSON object.

    Raises:
      AdapterError: it is no X-LoRA's, has an option that is not known here, or a value that can't be.
    """
    if found.get("peft_type") != "XLORA":
        hint = "; use jpeft_interop.load_peft(folder, params)" if found.get("peft_type") == "LORA" else ""
        raise AdapterError(f"{file}: 'peft_type': expected 'XLORA', found {found.get('peft_type')!r:.100}{hint}")
    known = {theirs for theirs, _, _ in FIELDS}
    foreign = set(found) - known - {*ABOUT, *OWN}
    if unknown := sorted(name for name in foreign if not is_inert(found[name])):
        raise AdapterError(f"{file}: options that are not known here: {', '.join(unknown)!s:.300}")
    options = {ours: _typed(found, theirs, types, file) for theirs, ours, types in FIELDS if theirs in found}
    try:
        spec = XLoRA(**options)
    except SpecError as error:
        raise AdapterError(f"{file}: {error!s:.500}") from error
    adapters = _typed(found, "adapters", (dict,), file)
    return XLoraConfig(spec, _typed(found, "hidden_size", (int,), file), tuple(adapters))


def _typed(found: Mapping[str, Any], name: str, types: tuple[type, ...], file: str) -> Any:
    value = found.get(name)
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
        raise AdapterError(f"{file}: {name!r}: expected {expected}, found {value!r:.200}")
    return value
