"""The config of the classifier that an adapter makes of a base without a classifier's head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jpeft_interop.adapter_head import labels_of
from jpeft_interop.base import CLASSIFICATION
from jpeft_interop.load_peft import read_peft_config
from jpeft_interop.models import family


def with_adapters_head(config: Mapping[str, Any], adapter: Path) -> dict[str, Any]:
    """The base's config; or, where the adapter is a classifier's and brings the head, that of the classifier.

    Args:
      config: the base's `config.json`.
      adapter: a PEFT folder (anything else brings no head).
    """
    named = str(next(iter(config.get("architectures") or ()), ""))
    if not adapter.is_dir() or named.endswith(CLASSIFICATION.endings):
        return dict(config)
    if read_peft_config(adapter).task_type != CLASSIFICATION.peft:
        return dict(config)
    known = family(config.get("model_type"))
    classes = [name for name, _ in known.architectures if name.endswith(CLASSIFICATION.endings)]
    labels = labels_of(adapter)
    if not classes or labels is None:
        return dict(config)
    names = {str(number): f"LABEL_{number}" for number in range(labels)}
    plain = {key: value for key, value in config.items() if key != "num_labels"}
    numbers = {name: int(number) for number, name in names.items()}
    return plain | {"architectures": classes[:1], "id2label": names, "label2id": numbers}
