"""The classifier's head that an adapter's file brings with it."""

from __future__ import annotations

from pathlib import Path

from jpeft.errors import AdapterError
from jpeft.safetensors_header import ADAPTER_HEADER_BYTES
from jpeft_interop.adapter_files import adapter_file
from jpeft_interop.load_peft import WEIGHTS
from jpeft_interop.safetensors_file import read_safetensors

LABEL_LAYERS = ("score", "classifier", "classifier.out_proj")  # the modules whose rows are the classes


def labels_of(adapter: str | Path) -> int | None:
    """How many classes the head in an adapter's folder tells apart; None if there is none."""
    tensors, _ = read_safetensors(adapter_file(adapter, WEIGHTS), AdapterError, ADAPTER_HEADER_BYTES)
    ends = tuple(f".{module}.weight" for module in LABEL_LAYERS)
    shapes = (tensors.spec(key).shape for key in tensors if key.endswith(ends))
    return next((shape[0] for shape in shapes if shape), None)
