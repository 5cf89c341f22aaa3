"""A torch model's folder, read here and written back: nothing lost, nothing renamed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from jpeft.tree import flatten
from jpeft_interop.checkpoint import model_table
from jpeft_interop.load_model import load_model, read_config
from jpeft_interop.models import family
from jpeft_interop.save_model import save_model
from jpeft_interop.torch_params import params_from_torch, torch_table


def through_a_folder(model: Any, folder: Path) -> tuple[Callable[..., Any], dict, Any]:
    """`(forward, params, again)`: what `load_model` gives, and the torch model of what `save_model` writes.

    On the way: both trees are the same, both tables, the files of both libraries, and no key is missing or left over.
    """
    model.save_pretrained(folder / "theirs")
    forward, params = load_model(folder / "theirs")
    assert_same_tree(params, params_from_torch(model))
    known = family(model.config.to_dict()["model_type"])
    assert model_table(flatten(params), known) == torch_table(model)
    save_model(folder / "ours", params, read_config(folder / "theirs"))
    assert_same_files(folder / "theirs", folder / "ours")
    again, info = type(model).from_pretrained(folder / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert_same_tree(params_from_torch(again), params)
    return forward, params, again.eval()


def assert_same_tree(one: Any, other: Any) -> None:
    one, other = flatten(one), flatten(other)
    assert set(one) == set(other)
    for path, leaf in one.items():
        assert leaf.dtype == other[path].dtype, path
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other[path]), err_msg=path)


def assert_same_files(one: Path, other: Path) -> None:
    left, right = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert left.keys() == right.keys()
    assert all(torch.equal(tensor, right[key]) for key, tensor in left.items())
