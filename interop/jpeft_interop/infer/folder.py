"""The tensors of a Hugging Face folder, and what the modules of its model call them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jpeft.errors import WeightsError
from jpeft.strict_json import read_json_object
from jpeft_interop.infer.torch_twin import CONFIG, module_names, torch_twin
from jpeft_interop.models.families import FAMILIES, Family
from jpeft_interop.stacks import join_stacks
from jpeft_interop.weights import Weights, read_weights

if TYPE_CHECKING:
    import torch


class Folder(NamedTuple):
    """A folder's tensors under both of their names.

    Attributes:
      weights: the tensors as the files have them.
      joined: the same, what the modules have as one joined of the parts that the files hold.
      names: the module's name of each tensor of `joined`.
      twin: the model without values, where transformers knows it.
      family: what is known here of the model's files.
    """

    weights: Weights
    joined: Weights
    names: Mapping[str, str]
    twin: torch.nn.Module | None
    family: Family | None

    def module_names(self, keys: Iterable[str]) -> dict[str, str]:
        """Tell what the modules call each of `keys`, names in files or already the modules'."""
        keys = list(keys)
        own = {} if self.twin is None else module_names(self.twin, keys)
        known = self.family
        return {key: own.get(key) or (known.module_name(key) if known else key) for key in keys}


def open_folder(path: str | os.PathLike[str]) -> Folder:
    """Read the names of a folder's tensors: as transformers has them, or else as the families here do.

    Raises:
      WeightsError: the weights or the config are broken, or two tensors would have one name.
    """
    weights, known, twin = read_weights(path), _family(Path(path)), torch_twin(path)
    joined = weights if known is None else join_stacks(weights, known.stacks)
    made = Folder(weights, joined, {}, twin, known)
    names = made.module_names(joined)
    if len(set(names.values())) < len(names):
        first = next(name for name in names.values() if list(names.values()).count(name) > 1)
        both = [key for key, name in names.items() if name == first]
        raise WeightsError(f"{joined.file(both[0])}: {both[0]!r} and {both[1]!r} are two names of one parameter")
    return made._replace(names=names)


def _family(folder: Path) -> Family | None:
    path = folder / CONFIG
    config: dict[str, Any] = read_json_object(path, WeightsError) if path.is_file() else {}
    return next((one for one in FAMILIES if one.model_type == config.get("model_type")), None)
