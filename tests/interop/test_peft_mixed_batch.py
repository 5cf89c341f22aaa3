"""One adapter an example in one batch, against PEFT's `adapter_names`."""

import copy
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx

import jpeft
from jpeft_interop import params_from_torch
from jpeft_interop.adapter_folders import load_adapters
from jpeft_interop.models import build, pure
from peft_twins import base, llama, perturb

IDS = np.random.default_rng(0).integers(1, 50, (5, 7))
NAMES = ["one", "__base__", "other", "other", "one"]


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """PEFT's model, and ours with the same adapters: other targets, ranks and scalings."""
    folder, module = tmp_path_factory.mktemp("adapters"), base(llama, tie_word_embeddings=False)
    one = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    other = peft.LoraConfig(r=5, lora_alpha=3, target_modules=["q_proj", "up_proj", "down_proj"], use_rslora=True)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(copy.deepcopy(module), one, adapter_name="one")
    theirs.add_adapter("other", other)
    for name in ("one", "other"):
        theirs.set_adapter(name)
        perturb(theirs, 5, only_trained=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(folder)
    params = params_from_torch(module)
    model = nnx.eval_shape(lambda: build(module.config.to_dict(), architecture="LlamaForCausalLM"))
    forward, _ = pure(model)
    return theirs.eval(), forward, params, load_adapters(folder, params)


def test_each_row_has_its_own_adapter_under_one_jit(twins):
    theirs, forward, params, adapters = twins
    traces = []

    @jax.jit
    def run(adapters, rows, ids):
        traces.append(1)
        return jpeft.lift(forward)(jpeft.attach(params, adapters, gates=rows), ids).logits

    for names in (NAMES, NAMES[::-1], ["other"] * 5):
        with torch.no_grad():
            expected = theirs(input_ids=torch.from_numpy(IDS), adapter_names=names).logits.numpy()
        found = run(adapters, jpeft.rows(names, adapters), jnp.asarray(IDS))
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert len(traces) == 1
    plain = forward(params, jnp.asarray(IDS)).logits
    assert np.abs(plain - found).max() > 1e-2


def test_an_unknown_name_is_an_error(twins):
    with pytest.raises(jpeft.SpecError, match="no adapter is named 'on'; the nearest are .*one"):
        jpeft.rows(["on"], twins[3])
