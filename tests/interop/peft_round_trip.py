"""A PEFT adapter there and back: weights, logits, tensors and warnings, with another seed at each load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from safetensors.torch import load_file

import jpeft
from jpeft.tree import flatten
from jpeft_interop import params_from_torch, save_peft
from jpeft_interop.models import pure
from peft_twins import load, loaded_here, logits, save
from torch_twins import module_of

WEIGHTS = "adapter_model.safetensors"


def largest_difference(one: Any, other: Any) -> float:
    one, other = flatten(one), flatten(other)
    assert one.keys() == other.keys()
    return max(float(np.abs(np.asarray(one[path]) - np.asarray(other[path])).max(initial=0)) for path in one)


def equal_files(one: Path, other: Path) -> bool:
    one_file, other_file = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert one_file.keys() == other_file.keys()
    return all(torch.equal(one_file[key], other_file[key]) for key in one_file)


def logits_of(module: Any, params: Any, adapter: jpeft.Adapter, tokens: np.ndarray) -> np.ndarray:
    """By the fast path, on the twin of a transformers model."""
    forward, _ = pure(module_of(module))
    return np.asarray(jax.jit(jpeft.lift(forward))(jpeft.attach(params, adapter), tokens).logits)


def assert_logits(found: np.ndarray, peft_model: Any, module: Any, tokens: np.ndarray) -> None:
    """Those of the PEFT model, which are not the base's."""
    with torch.no_grad():
        expected = peft_model(torch.tensor(tokens)).logits.numpy()
        plain = module(torch.tensor(tokens)).logits.numpy()
    assert np.abs(expected - plain).max() > 1e-3
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def assert_both_ways(
    module: Any, peft_model: Any, folder: Path, task_type: str | None = None, mergeable: bool = True, runs: bool = True
) -> jpeft.Adapter:
    """The weights and logits of what we load are PEFT's, and PEFT loads what we write of it without a complaint."""
    params, tokens = params_from_torch(module), np.random.default_rng(0).integers(0, 50, (2, 7))
    theirs, ours = save(peft_model, folder / "theirs"), folder / "ours"
    before, warned_before = load(module, theirs)
    adapter = loaded_here(theirs, params, warned_before)
    if runs:
        assert_logits(logits_of(module, params, adapter, tokens), peft_model, module, tokens)
    if mergeable:
        merged = params_from_torch(peft_model.merge_and_unload())
        assert largest_difference(params, merged) > 1e-3
        assert largest_difference(jpeft.merge(params, adapter), merged) <= 1e-5
    save_peft(ours, adapter, params=params, task_type=task_type)
    assert equal_files(theirs, ours)
    after, warned_after = load(module, ours, seed=5)
    state = after.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in before.state_dict().items())
    if runs:
        assert torch.equal(logits(after, tokens), logits(before, tokens))
    assert set(warned_after) <= set(warned_before)
    assert not [text for text in warned_after if "missing" in text.lower() or "unexpected" in text.lower()]
    return adapter
