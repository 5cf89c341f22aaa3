"""The torch side of `infer_layout`: tensors by torch's names, and what torch's own modules say of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jpeft.errors import WeightsError
from jpeft_interop.infer.folder import Folder, open_folder
from jpeft_interop.safetensors_file import read_safetensors
from jpeft_interop.torch_params import parameter_kinds, refuse_peft
from jpeft_interop.torch_table import Kind
from jpeft_interop.weights import Weights

if TYPE_CHECKING:
    import torch

Names = Literal["modules", "files"]


class Opened(NamedTuple):
    """What a state was given as.

    Attributes:
      tensors: by name.
      kinds: what kind of weight each is to its module, of those whose module is known.
    """

    tensors: Mapping[str, Any]
    kinds: Mapping[str, Kind]


def open_state(state: Mapping[str, Any] | str | os.PathLike[str] | torch.nn.Module, names: Names) -> Opened:
    """Open a mapping from torch names to tensors, a torch module, or a file or a folder of safetensors (mapped).

    Args:
      state: one of those.
      names: of a folder's tensors, those that the model's modules have for them, or those in the files.

    Raises:
      WeightsError: it is none of those, or broken.
    """
    if isinstance(state, Mapping):
        return Opened(state, {})
    if isinstance(state, (str, os.PathLike)):
        if Path(state).is_dir():
            return _of_folder(open_folder(state), names)
        return Opened(read_safetensors(Path(state), WeightsError)[0], {})
    if not hasattr(state, "named_parameters"):
        raise WeightsError(
            "expected a state dict, or the path of a file or a folder of safetensors, or a torch module; found "
            f"{state!r}"
        )
    refuse_peft(state)
    return Opened(state.state_dict(), parameter_kinds(state))


def _of_folder(folder: Folder, names: Names) -> Opened:
    kinds: Mapping[str, Kind] = {} if folder.twin is None else parameter_kinds(folder.twin)
    called = folder.names()
    if names == "modules":
        return Opened(Renamed(folder.joined, called), kinds)
    there: dict[str, Kind] = {
        key: kinds[name] for key, name in called.items() if name in kinds and key in folder.weights
    }
    return Opened(folder.weights, there)


class Renamed(Mapping[str, Any]):
    """Tensors under other names."""

    def __init__(self, tensors: Weights, names: Mapping[str, str]) -> None:
        """Call each of `tensors` as `names` says."""
        self._tensors, self._sources = tensors, {names[key]: key for key in tensors}

    def __getitem__(self, name: str) -> Any:
        return self._tensors[self._sources[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def release(self, name: str) -> None:
        """Give the tensor's memory back to the system."""
        self._tensors.release(self._sources[name])
