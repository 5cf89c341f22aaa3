"""What every decoder has to do: torch's numbers, the same with a cache, its weights from a folder and back into one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from safetensors.torch import load_file

from jpeft.tree import flatten
from jpeft_interop.generate import generate
from jpeft_interop.load_model import load_model, read_config
from jpeft_interop.models import init_cache
from jpeft_interop.save_model import save_model
from jpeft_interop.torch_params import params_from_torch
from torch_twins import difference, randomise, run_torch, twin

SIZES = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
TOLERANCE = 1e-5


def model_of(name: str, config: str, **options: Any) -> Any:
    """A random torch model of the class `name`."""
    torch.manual_seed(0)
    return randomise(getattr(transformers, name)(getattr(transformers, config)(**(SIZES | options))))


def ids_of(batch: int = 2, time: int = 9) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 61, (batch, time))


def left_padded() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, their mask, and positions that count from the first real token."""
    ids = ids_of(3)
    mask = np.ones_like(ids)
    mask[0, :4], mask[1, :1] = 0, 0
    return ids, mask, np.maximum(mask.cumsum(-1) - 1, 0)


def assert_torchs(model: Any, ids: np.ndarray | None = None) -> None:
    """Hidden states and, where there are any, logits, to 1e-5 of the largest of each."""
    ids = ids_of() if ids is None else ids
    forward, params = twin(model)
    ours = forward(params, ids, output_hidden_states=True)
    theirs = run_torch(model, input_ids=ids, output_hidden_states=True)
    for mine, torchs in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert difference(mine, torchs) < TOLERANCE * max(1.0, float(torchs.abs().max()))
    if hasattr(theirs, "logits"):
        assert difference(ours.logits, theirs.logits) < TOLERANCE * max(1.0, float(theirs.logits.abs().max()))


def assert_classifies(model: Any) -> None:
    ids, mask, positions = left_padded()
    inputs = dict(input_ids=ids, attention_mask=mask, position_ids=positions)
    forward, params = twin(model)
    ours, theirs = forward(params, **inputs).logits, run_torch(model, **inputs).logits
    assert ours.shape == (3, model.config.num_labels)
    assert difference(ours, theirs) < TOLERANCE


def assert_same_with_a_cache(model: Any) -> None:
    """A left-padded batch in one go, in torch, and in pieces with a cache."""
    ids, mask, positions = left_padded()
    forward, params = twin(model)
    whole = forward(params, ids, mask, position_ids=positions).logits
    theirs = run_torch(model, input_ids=ids, attention_mask=mask, position_ids=positions).logits
    assert difference(whole, theirs, mask) < TOLERANCE
    cache, parts = init_cache(11), []
    for start, stop in ((0, 4), (4, 7), (7, 8), (8, 9)):
        output = forward(params, ids[:, start:stop], mask, position_ids=positions[:, start:stop], cache=cache)
        cache = output.cache
        parts.append(output.logits)
    assert difference(np.concatenate(parts, axis=1), whole, mask) < TOLERANCE


def assert_generates(model: Any) -> None:
    """transformers' greedy tokens."""
    ids, mask, _ = left_padded()
    forward, params = twin(model)
    ours = generate(forward, params, ids, mask, max_new_tokens=6, eos_token_id=2, pad_token_id=0)
    theirs = model.generate(
        torch.as_tensor(ids), attention_mask=torch.as_tensor(mask), max_new_tokens=6, do_sample=False
    ).numpy()
    assert np.array_equal(np.asarray(ours)[:, : theirs.shape[1]], theirs)


def assert_same_tree(left: Any, right: Any) -> None:
    left, right = flatten(left), flatten(right)
    assert set(left) == set(right)
    for path in left:
        np.testing.assert_array_equal(np.asarray(left[path]), np.asarray(right[path]), err_msg=path)


def assert_there_and_back(model: Any, folder: Path) -> None:
    """What transformers writes is the module's own params here; what is written here is what transformers writes."""
    model.save_pretrained(folder / "theirs")
    forward, params = load_model(folder / "theirs")
    assert_same_tree(params, params_from_torch(model))
    ours, theirs = jax.jit(forward)(params, ids_of()).logits, run_torch(model, input_ids=ids_of()).logits
    assert difference(ours, theirs) < TOLERANCE
    save_model(folder / "ours", params, read_config(folder / "theirs"))
    before, after = (load_file(folder / side / "model.safetensors") for side in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    loaded = type(model).from_pretrained(folder / "ours")
    assert torch.equal(run_torch(loaded, input_ids=ids_of()).logits, theirs)
