"""The tensors of a Hugging Face folder, and what the modules of its model call them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jpeft.errors import WeightsError
from jpeft.strict_json import read_json_object
from jpeft_interop.infer.torch_twin import CONFIG, module_names, torch_twin
from jpeft_interop.models.families import FAMILIES, Family
from jpeft_interop.stacks import join_stacks
from jpeft_interop.weights import Weights, read_weights

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Folder:
    """A folder's tensors under both of their names.

    Attributes:
      path: the folder's.
      weights: the tensors as the files have them.
      joined: the same, what the modules have as one joined of the parts that the files hold.
      family: what is known here of the model's files.
    """

    path: Path
    weights: Weights
    joined: Weights
    family: Family | None

    @cached_property
    def twin(self) -> torch.nn.Module | None:
        """The model without values, where transformers knows it; built when it is first asked for."""
        return torch_twin(self.path)

    def module_names(self, keys: Iterable[str], *, ask_transformers: bool = True) -> dict[str, str]:
        """Tell what the modules call each of `keys`, names in files or already the modules'.

        Transformers tells, where it knows the model and is asked, or else what is known here of the family.
        """
        keys, known = list(keys), self.family
        told = {} if not ask_transformers or self.twin is None else module_names(self.twin, keys)
        return {key: told.get(key) or (known.module_name(key) if known else key) for key in keys}

    def names(self, *, ask_transformers: bool = True) -> dict[str, str]:
        """Tell the module's name of each tensor of `joined`.

        Raises:
          WeightsError: two tensors would have one name.
        """
        names = self.module_names(self.joined, ask_transformers=ask_transformers)
        first: dict[str, str] = {}
        for key, name in names.items():
            if (other := first.setdefault(name, key)) != key:
                raise WeightsError(f"{self.joined.file(key)}: {other!r} and {key!r} are two names of one parameter")
        return names


def open_folder(path: str | os.PathLike[str]) -> Folder:
    """Read the header of a folder's tensors, and its config.

    Raises:
      WeightsError: the weights or the config are broken.
    """
    weights, known = read_weights(path), _family(Path(path))
    return Folder(Path(path), weights, weights if known is None else join_stacks(weights, known.stacks), known)


def _family(folder: Path) -> Family | None:
    path = folder / CONFIG
    config: dict[str, Any] = read_json_object(path, WeightsError) if path.is_file() else {}
    return next((one for one in FAMILIES if one.model_type == config.get("model_type")), None)
