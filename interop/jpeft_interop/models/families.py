"""The families of models here: what each is called, and what its torch twin's names mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from jpeft_interop.models.bert import BertForMaskedLM, BertForSequenceClassification, BertModel, read_bert
from jpeft_interop.models.errors import ModelError
from jpeft_interop.models.gpt2 import GPT2ForSequenceClassification, GPT2LMHeadModel, GPT2Model, read_gpt2
from jpeft_interop.models.llama import LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel
from jpeft_interop.models.llama_config import read_llama


@dataclass(frozen=True)
class Family:
    """A model type: facts that reading and writing its weights needs, none of them about any one model.

    Attributes:
      model_type: as in `config.json`.
      architectures: torch's class names and the classes here, by name.
      read: the config, read and checked.
      prefix: where the base model stands in a model with a head (`model`, `bert`, `transformer`).
      heads: the modules that a head adds, outside the prefix.
      conv1d: last names of the modules whose torch `weight` is (in, out) already (`Conv1D`).
      tied: pairs of paths that hold one array where the config ties embeddings: the first has the leaf, the second
        none.
      buffers: last names of torch buffers that old checkpoints hold and that are no parameters.
    """

    model_type: str
    architectures: tuple[tuple[str, type[nnx.Module]], ...]
    read: Callable[[Mapping[str, Any]], Any]
    prefix: str
    heads: tuple[str, ...]
    conv1d: tuple[str, ...] = ()
    tied: tuple[tuple[str, str], ...] = ()
    buffers: tuple[str, ...] = ()

    def make(self, config: Mapping[str, Any], architecture: str, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
        """A model of the class `architecture`, with random weights."""
        classes: dict[str, Any] = dict(self.architectures)
        if architecture not in classes:
            raise ModelError(
                f"architecture {architecture!r} is not supported for model_type {self.model_type!r}; "
                f"supported: {', '.join(classes)}"
            )
        return classes[architecture](self.read(config), dtype, rngs)


def _llama_like(model_type: str, name: str) -> Family:
    return Family(
        model_type=model_type,
        architectures=(
            (f"{name}ForCausalLM", LlamaForCausalLM),
            (f"{name}Model", LlamaModel),
            (f"{name}ForSequenceClassification", LlamaForSequenceClassification),
        ),
        read=read_llama,
        prefix="model",
        heads=("lm_head", "score"),
        tied=(("model/embed_tokens/embedding", "lm_head/kernel"),),
        buffers=("rotary_emb.inv_freq",),
    )


FAMILIES: tuple[Family, ...] = (
    _llama_like("llama", "Llama"),
    _llama_like("mistral", "Mistral"),
    _llama_like("qwen2", "Qwen2"),
    Family(
        model_type="bert",
        architectures=(
            ("BertModel", BertModel),
            ("BertForSequenceClassification", BertForSequenceClassification),
            ("BertForMaskedLM", BertForMaskedLM),
        ),
        read=read_bert,
        prefix="bert",
        heads=("cls", "classifier"),
        tied=(
            ("bert/embeddings/word_embeddings/embedding", "cls/predictions/decoder/kernel"),
            ("cls/predictions/bias", "cls/predictions/decoder/bias"),
        ),
        buffers=("embeddings.position_ids", "embeddings.token_type_ids"),
    ),
    Family(
        model_type="gpt2",
        architectures=(
            ("GPT2LMHeadModel", GPT2LMHeadModel),
            ("GPT2Model", GPT2Model),
            ("GPT2ForSequenceClassification", GPT2ForSequenceClassification),
        ),
        read=read_gpt2,
        prefix="transformer",
        heads=("lm_head", "score"),
        conv1d=("c_attn", "c_proj", "c_fc"),
        tied=(("transformer/wte/embedding", "lm_head/kernel"),),
        buffers=("attn.bias", "attn.masked_bias"),
    ),
)


def family(model_type: str | None) -> Family:
    """The family that `config.json` calls `model_type`.

    Raises:
      ModelError: none is known by that name; the message lists those that are.

    Example:
      >>> family("llama").prefix
      'model'
    """
    known = {one.model_type: one for one in FAMILIES}
    if model_type not in known:
        raise ModelError(f"model_type {model_type!r} is not supported; supported: {', '.join(known)}")
    return known[model_type]
