"""The bases of `round_trips.py`: tiny torch models with random weights, and the same weights as params."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import jpeft
from jpeft.site import Site
from jpeft.tree import flatten
from jpeft_interop import Layout, params_from_torch, params_to_torch
from jpeft_interop.layout import default_layout
from tests.interop.peft_twins import IDS, perturb

VOCABULARY, LENGTH = 40, 20
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": VOCABULARY}
DECODER: dict[str, Any] = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 2, **IDS}


class OddBlock(nn.Module):
    """A block whose modules have the names of numbers, and those that PEFT gives to its own."""

    def __init__(self) -> None:
        super().__init__()
        self.lora = nn.Linear(16, 24)
        self.base_layer = nn.Linear(24, 16)
        self.to_out = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16))
        self.modules_to_save = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.base_layer(torch.tanh(self.lora(x)))
        return torch.tanh(self.modules_to_save(x + self.to_out(x)))


class Odd(nn.Module):
    """A classifier whose names are parts of one another, or none of transformers'."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.embedding_hidden_mapping_in = nn.Linear(16, 16, bias=False)
        self.blocks = nn.ModuleList([OddBlock() for _ in range(2)])
        self.pre_classifier = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.classifier = nn.Linear(16, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding_hidden_mapping_in(self.embed(tokens))
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.norm(torch.tanh(self.pre_classifier(x))))


@dataclass(frozen=True)
class Base:
    """A torch model, and what is drawn for it.

    Attributes:
      name: of the family.
      module: the model.
      saved: names for `modules_to_save`: whole ones, ends, parts of words, containers.
      tasks: the `task_type`s that it has.
      other_tasks: those that it does not have.
      numbered: what stands before a layer's number.
    """

    name: str
    module: Any
    saved: tuple[str, ...]
    tasks: tuple[str | None, ...] = (None,)
    other_tasks: tuple[str | None, ...] = (None,)
    numbered: str = "layers"
    tokens: np.ndarray = field(default_factory=lambda: np.random.default_rng(7).permutation(VOCABULARY).reshape(2, -1))

    @cached_property
    def params(self) -> dict[str, Any]:
        return params_from_torch(self.module)

    @cached_property
    def layout(self) -> Layout:
        return default_layout(flatten(self.params))

    @cached_property
    def plain(self) -> np.ndarray:
        """The logits without an adapter."""
        return self.logits(self.module)

    def fresh(self) -> Any:
        """A copy, which PEFT may change."""
        return copy.deepcopy(self.module)

    def logits(self, module: Any) -> np.ndarray:
        with torch.no_grad():
            found = module(torch.as_tensor(self.tokens))
        return getattr(found, "logits", found).numpy()

    def adapted(self, adapter: jpeft.Adapter) -> np.ndarray:
        """The logits with an adapter: those of the merged weights, in torch."""
        acting = without(adapter, lambda site: site.method == "lora" and site.rank == 0)  # whose scaling is zero
        try:
            return self._merged(acting, self.fresh())
        except jpeft.KernelError:  # it adds a bias where there is none to hold it
            return self._merged(acting, with_biases(self.fresh()))

    def _merged(self, adapter: jpeft.Adapter, module: Any) -> np.ndarray:
        merged = jpeft.merge(params_from_torch(module), adapter)
        module.load_state_dict(params_to_torch(merged, module))
        return self.logits(module)


def without(adapter: jpeft.Adapter, gone: Callable[[Site], bool]) -> jpeft.Adapter:
    """The adapter without some of its sites."""
    sites = tuple(site for site in adapter.sites if not gone(site))
    paths = {site.path for site in sites}
    left = lambda part: {path: leaves for path, leaves in part.items() if path in paths}
    meta = replace(adapter.meta, sites=sites)
    return adapter.replace(trained=left(adapter.trained), constant=left(adapter.constant), meta=meta)


def with_biases(module: nn.Module) -> nn.Module:
    """The same model, whose linear layers all have a bias."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros(layer.out_features))
    return module


def _llama(tied: bool) -> nn.Module:
    biases: dict[str, Any] = {} if tied else {"attention_bias": True, "mlp_bias": True}
    return LlamaForCausalLM(LlamaConfig(**DECODER, tie_word_embeddings=tied, **biases))


def _gpt2() -> nn.Module:
    sizes: dict[str, Any] = {
        "n_embd": 16,
        "n_layer": 3,
        "n_head": 4,
        "vocab_size": VOCABULARY,
        "n_positions": LENGTH,
        **IDS,
    }
    return GPT2LMHeadModel(GPT2Config(**sizes))


def _bert() -> nn.Module:
    sizes: dict[str, Any] = {**SIZES, "intermediate_size": 24, "max_position_embeddings": LENGTH, "num_labels": 5}
    return BertForSequenceClassification(BertConfig(**sizes))


def _mixtral() -> nn.Module:
    sizes: dict[str, Any] = {**DECODER, "num_hidden_layers": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=3, tie_word_embeddings=False))


_LLAMA = (
    "norm",
    "model.norm",
    "lm_head",
    "embed_tokens",
    "mlp",
    "input_layernorm",
    "1.self_attn",
    "q_proj",
    "layers.0",
)
_CAUSAL: dict[str, Any] = {"tasks": (None, "CAUSAL_LM"), "other_tasks": ("SEQ_CLS", "TOKEN_CLS", "SEQ_2_SEQ_LM")}
MAKERS: Mapping[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "Llama, tied": (lambda: _llama(True), {"saved": _LLAMA, **_CAUSAL}),
    "Llama": (lambda: _llama(False), {"saved": _LLAMA, **_CAUSAL}),
    "Qwen2": (
        lambda: Qwen2ForCausalLM(Qwen2Config(**DECODER, tie_word_embeddings=False)),
        {"saved": _LLAMA, **_CAUSAL},
    ),
    "GPT-2": (
        _gpt2,
        {"saved": ("ln_f", "wte", "wpe", "mlp", "ln_1", "c_proj", "attn.c_proj", "h.1"), "numbered": "h", **_CAUSAL},
    ),
    "BERT": (
        _bert,
        {
            "saved": (
                "classifier",
                "pooler",
                "LayerNorm",
                "output",
                "dense",
                "word_embeddings",
                "layer.1",
                "pooler.dense",
            ),
            "tasks": (None, "SEQ_CLS"),
            "other_tasks": ("CAUSAL_LM", "TOKEN_CLS"),
            "numbered": "layer",
        },
    ),
    "Mixtral": (_mixtral, {"saved": (*_LLAMA[:5], "experts", "mlp.gate", "mlp.experts.down_proj"), **_CAUSAL}),
    "odd names": (
        Odd,
        {
            "saved": (
                "classifier",
                "norm",
                "to_out",
                "to_out.0",
                "0",
                "lora",
                "base_layer",
                "modules_to_save",
                "embed",
            ),
            "numbered": "blocks",
        },
    ),
}


def make(name: str) -> Base:
    """One of the bases, the same each time."""
    maker, told = MAKERS[name]
    torch.manual_seed(0)
    module = maker().eval()
    perturb(module, 1)
    return Base(name, module, **told)
