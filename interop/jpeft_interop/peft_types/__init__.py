"""The types of PEFT's that can be read and written: one file each, one line each here."""

from jpeft.spec import Spec
from jpeft_interop.peft_types.adalora import ADALORA
from jpeft_interop.peft_types.fields import PeftType
from jpeft_interop.peft_types.ia3 import IA3
from jpeft_interop.peft_types.lora import LORA

TYPES: dict[str, PeftType] = {one.name: one for one in (LORA, ADALORA, IA3)}

BY_METHOD: dict[str, PeftType] = {"lora": LORA, "dora": LORA, "adalora": ADALORA, "ia3": IA3}


def type_of(spec: Spec) -> PeftType | None:
    """The type of PEFT's that a spec is saved as; None where there is none."""
    return BY_METHOD.get(spec.method)
