"""What transformers says of a folder's model: what its modules are, and what they call the tensors of its files.

The model is built of its config alone, on the meta device, and only of classes that transformers itself has. Files may
call a tensor otherwise than the module that reads it (`embed_out` and `lm_head`, ViT's `encoder.layer` and `layers`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jpeft.errors import WeightsError
from jpeft.strict_json import read_json_object

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"
# What transformers raises at configs that it can't build a model of.
BROKEN = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def torch_twin(folder: str | os.PathLike[str]) -> torch.nn.Module | None:
    """Build the model of a folder's config without values; None where transformers is missing or does not know it."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        return None
    config = read_json_object(path, WeightsError)
    try:
        import torch
        import transformers

        made = _config_of(config, transformers)
        model_class = None if made is None else _class_of(config, made, transformers)
        if model_class is None:
            return None
        with torch.device("meta"):
            return model_class(made)
    except ImportError:  # transformers, or what this model needs, is not installed
        return None
    except BROKEN:  # the config is broken, or of another version: then nothing is known, and nothing guessed
        return None


def _config_of(config: dict[str, Any], transformers: Any) -> Any:
    """Read the config with the class that transformers has for its `model_type`."""
    known = transformers.CONFIG_MAPPING
    return known[config["model_type"]].from_dict(dict(config)) if config.get("model_type") in known else None


def _class_of(config: dict[str, Any], made: Any, transformers: Any) -> Any:
    """Find the class that the config names, or the one without a head where it names none."""
    named = next(iter(config.get("architectures") or ()), None)
    if named is None:
        return transformers.MODEL_MAPPING.get(type(made), None)
    found = getattr(transformers, named, None)
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def module_names(twin: torch.nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """Tell what the module calls the tensors of its files, by their names there.

    A tensor that the module has under no name of its own, because it joins several as one, keeps the file's.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # before transformers 5 the names are the same
        return {}
    model: Any = twin
    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    own = model.state_dict()
    made: dict[str, str] = {}
    for key in keys:
        name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, own)
        if converted is None and name in own:
            made[key] = name
    return made
