"""The head that a classifier's adapter brings, in every family that has one."""

import pytest
import torch
import transformers

from jpeft_interop.adapter_head import labels_of
from jpeft_interop.base import load_adapted
from peft_twins import SIZES, adapted, save

LABELS = 3
BASE = {**SIZES, "hidden_size": 16, "intermediate_size": 24}
DISTIL = dict(vocab_size=50, dim=16, hidden_dim=24, n_layers=2, n_heads=2, max_position_embeddings=32)
MODELS = {
    "Bert": (BASE, ["query"]),
    "Roberta": ({**BASE, "max_position_embeddings": 34, "pad_token_id": 1}, ["query"]),
    "DistilBert": (DISTIL, ["q_lin"]),
    "Llama": ({**BASE, "pad_token_id": 0}, ["q_proj"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_base_without_a_head_gets_the_adapters(name, tmp_path):
    sizes, targets = MODELS[name]
    config = getattr(transformers, f"{name}Config")(**sizes, num_labels=LABELS)
    torch.manual_seed(0)
    module = getattr(transformers, f"{name}ForSequenceClassification")(config).eval()
    module.base_model.save_pretrained(tmp_path / "base")
    theirs = adapted(module, r=2, target_modules=targets, task_type="SEQ_CLS")
    folder = save(theirs, tmp_path / "adapter")
    assert labels_of(folder) == LABELS
    base, adapter = load_adapted(tmp_path / "base", folder)
    assert base.labels == LABELS and adapter is not None
    assert any(site.method == "replacement" for site in adapter.sites)


def test_an_adapter_without_a_head_has_none(tmp_path):
    module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE))
    folder = save(adapted(module, r=2, target_modules=["q_proj"]), tmp_path / "a")
    assert labels_of(folder) is None
