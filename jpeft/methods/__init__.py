"""The methods: one file each, one line each here."""

from jpeft.method import Method
from jpeft.methods import lora, replacement

METHODS: dict[str, Method] = {
    "lora": lora.METHOD,
    "replacement": replacement.METHOD,
}

SPECS = {"lora": lora.LoRA}
