"""The methods: one file each, one line each here."""

from jpeft.method import Method
from jpeft.methods import adalora, dora, ia3, lora, replacement, routed
from jpeft.spec import Spec

METHODS: dict[str, Method] = {
    "lora": lora.METHOD,
    "dora": dora.METHOD,
    "adalora": adalora.METHOD,
    "ia3": ia3.METHOD,
    "replacement": replacement.METHOD,
    "routed": routed.METHOD,
}

SPECS: dict[str, type[Spec]] = {spec.method: spec for spec in (lora.LoRA, dora.DoRA, adalora.AdaLoRA, ia3.IA3)}
