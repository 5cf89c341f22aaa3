"""The families of models here: what each is called, and what its torch twin's names mean."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from jpeft_interop.models.bert import BertForMaskedLM, BertForSequenceClassification, BertModel, read_bert
from jpeft_interop.models.clip import (
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)
from jpeft_interop.models.clip_config import read_clip, read_clip_text, read_clip_vision
from jpeft_interop.models.distilbert import (
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    DistilBertModel,
    read_distilbert,
)
from jpeft_interop.models.errors import ModelError
from jpeft_interop.models.gemma_config import read_gemma
from jpeft_interop.models.gpt2 import GPT2ForSequenceClassification, GPT2LMHeadModel, GPT2Model, read_gpt2
from jpeft_interop.models.llama import LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel
from jpeft_interop.models.llama_config import read_llama
from jpeft_interop.models.roberta import (
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaModel,
    read_roberta,
)
from jpeft_interop.models.stack import Stack
from jpeft_interop.models.t5 import T5EncoderModel, T5ForConditionalGeneration, read_t5
from jpeft_interop.models.vit import ViTForImageClassification, ViTModel, read_vit
from jpeft_interop.models.whisper import WhisperForConditionalGeneration, WhisperModel, read_whisper


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
        none. Several pairs may have the same first.
      buffers: last names of torch buffers that old checkpoints hold and that are no parameters.
      with_head: modules that only a model with a head has, where no prefix tells it from one without.
      file_names: parts of names that files have, and what they stand for in the module, in the order of replacement.
        Where torch has renamed its modules and left its files alone.
      stacks: parameters of the module that files hold in parts.
    """

    model_type: str
    architectures: tuple[tuple[str, type[nnx.Module]], ...]
    read: Callable[[Mapping[str, Any]], Any]
    prefix: str
    heads: tuple[str, ...]
    conv1d: tuple[str, ...] = ()
    tied: tuple[tuple[str, str], ...] = ()
    buffers: tuple[str, ...] = ()
    with_head: tuple[str, ...] = ()
    file_names: tuple[tuple[str, str], ...] = ()
    stacks: tuple[Stack, ...] = ()

    def make(self, config: Mapping[str, Any], architecture: str, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
        """A model of the class `architecture`, with random weights."""
        classes: dict[str, Any] = dict(self.architectures)
        if architecture not in classes:
            raise ModelError(
                f"architecture {architecture!r} is not supported for model_type {self.model_type!r}; "
                f"supported: {', '.join(classes)}"
            )
        return classes[architecture](self.read(config), dtype, rngs)

    def ties(self, paths: Collection[str]) -> dict[str, tuple[str, ...]]:
        """The other paths that torch has for a leaf, by its path, of a model with leaves at `paths`.

        Example:
          >>> family("llama").ties(["model/embed_tokens/embedding", "model/norm/weight"])
          {'model/embed_tokens/embedding': ('lm_head/kernel',)}
        """
        found: dict[str, tuple[str, ...]] = {}
        for first, second in self.tied:
            if first in paths and second not in paths and self._has_module(second, paths):
                found[first] = (*found.get(first, ()), second)
        return found

    def _has_module(self, tied: str, paths: Collection[str]) -> bool:
        """Whether the model has the module of a path that has no leaf: it has others, or the module it is in has."""
        module = tied.rpartition("/")[0]
        outer = module.rpartition("/")[0]
        if outer or _has_leaves(module, paths):
            return _has_leaves(outer or module, paths)
        others = {path.partition("/")[0] for path in paths} & (set(self.heads) - set(self.with_head))
        return not others and all(_has_leaves(needed, paths) for needed in self.with_head)

    def module_name(self, key: str) -> str:
        """What the module calls the parameter that a file calls `key`."""
        for file, module in self.file_names:
            key = key.replace(file, module)
        return key

    def file_name(self, name: str) -> str:
        """The inverse of `module_name`."""
        for file, module in reversed(self.file_names):
            name = name.replace(module, file)
        return name


def _has_leaves(module: str, paths: Collection[str]) -> bool:
    return any(path.startswith(f"{module}/") for path in paths)


def _llama_like(
    model_type: str,
    name: str,
    read: Callable[[Mapping[str, Any]], Any] = read_llama,
    *,
    base: str | None = None,
    file_names: tuple[tuple[str, str], ...] = (),
    stacks: tuple[Stack, ...] = (),
) -> Family:
    """A family of Llama's classes; `base` is what torch calls those that are no language models, if not `name`."""
    return Family(
        model_type=model_type,
        architectures=(
            (f"{name}ForCausalLM", LlamaForCausalLM),
            (f"{base or name}Model", LlamaModel),
            (f"{base or name}ForSequenceClassification", LlamaForSequenceClassification),
        ),
        read=read,
        prefix="model",
        heads=("lm_head", "score"),
        tied=(("model/embed_tokens/embedding", "lm_head/kernel"),),
        buffers=("rotary_emb.inv_freq",),
        file_names=file_names,
        stacks=stacks,
    )


def _roberta_like(model_type: str, architectures: tuple[tuple[str, type[nnx.Module]], ...]) -> Family:
    return Family(
        model_type=model_type,
        architectures=architectures,
        read=read_roberta,
        prefix="roberta",
        heads=("lm_head", "classifier"),
        tied=(
            ("roberta/embeddings/word_embeddings/embedding", "lm_head/decoder/kernel"),
            ("lm_head/bias", "lm_head/decoder/bias"),
        ),
        buffers=("embeddings.position_ids", "embeddings.token_type_ids"),
    )


FAMILIES: tuple[Family, ...] = (
    _llama_like("llama", "Llama"),
    _llama_like("mistral", "Mistral"),
    _llama_like("qwen2", "Qwen2"),
    _llama_like("qwen3", "Qwen3"),
    _llama_like("phi3", "Phi3"),
    _llama_like("gemma", "Gemma", read_gemma),
    _llama_like("gemma2", "Gemma2", read_gemma),
    _llama_like("gemma3_text", "Gemma3", read_gemma, base="Gemma3Text"),
    _llama_like(
        "mixtral",
        "Mixtral",
        file_names=((".block_sparse_moe.", ".mlp."),),
        stacks=(
            Stack("experts.gate_up_proj", ("experts.{}.w1.weight", "experts.{}.w3.weight")),
            Stack("experts.down_proj", ("experts.{}.w2.weight",)),
        ),
    ),
    _llama_like(
        "qwen3_moe",
        "Qwen3Moe",
        stacks=(
            Stack("experts.gate_up_proj", ("experts.{}.gate_proj.weight", "experts.{}.up_proj.weight")),
            Stack("experts.down_proj", ("experts.{}.down_proj.weight",)),
        ),
    ),
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
    _roberta_like(
        "roberta",
        (
            ("RobertaModel", RobertaModel),
            ("RobertaForSequenceClassification", RobertaForSequenceClassification),
            ("RobertaForMaskedLM", RobertaForMaskedLM),
        ),
    ),
    # XLMRobertaForMaskedLM names its head first: the tied leaf would be the head's kernel
    _roberta_like(
        "xlm-roberta",
        (
            ("XLMRobertaModel", RobertaModel),
            ("XLMRobertaForSequenceClassification", RobertaForSequenceClassification),
        ),
    ),
    Family(
        model_type="distilbert",
        architectures=(
            ("DistilBertModel", DistilBertModel),
            ("DistilBertForSequenceClassification", DistilBertForSequenceClassification),
            ("DistilBertForMaskedLM", DistilBertForMaskedLM),
        ),
        read=read_distilbert,
        prefix="distilbert",
        heads=("vocab_transform", "vocab_layer_norm", "vocab_projector", "pre_classifier", "classifier"),
        tied=(("distilbert/embeddings/word_embeddings/embedding", "vocab_projector/kernel"),),
        buffers=("embeddings.position_ids",),
    ),
    Family(
        model_type="vit",
        architectures=(("ViTModel", ViTModel), ("ViTForImageClassification", ViTForImageClassification)),
        read=read_vit,
        prefix="vit",
        heads=("classifier",),
        file_names=(
            ("encoder.layer.", "layers."),
            ("attention.attention.query", "attention.q_proj"),
            ("attention.attention.key", "attention.k_proj"),
            ("attention.attention.value", "attention.v_proj"),
            ("attention.output.dense", "attention.o_proj"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
        ),
    ),
    Family(
        model_type="clip",
        architectures=(("CLIPModel", CLIPModel),),
        read=read_clip,
        prefix="clip",
        heads=(),
        buffers=("embeddings.position_ids",),
    ),
    Family(
        model_type="clip_text_model",
        architectures=(
            ("CLIPTextModel", CLIPTextModel),
            ("CLIPTextModelWithProjection", CLIPTextModelWithProjection),
        ),
        read=read_clip_text,
        prefix="text_model",
        heads=("text_projection",),
        buffers=("embeddings.position_ids",),
    ),
    Family(
        model_type="clip_vision_model",
        architectures=(
            ("CLIPVisionModel", CLIPVisionModel),
            ("CLIPVisionModelWithProjection", CLIPVisionModelWithProjection),
        ),
        read=read_clip_vision,
        prefix="vision_model",
        heads=("visual_projection",),
        buffers=("embeddings.position_ids",),
    ),
    Family(
        model_type="t5",
        architectures=(
            ("T5ForConditionalGeneration", T5ForConditionalGeneration),
            ("T5EncoderModel", T5EncoderModel),
        ),
        read=read_t5,
        prefix="transformer",
        heads=("decoder", "lm_head"),
        tied=(
            ("shared/embedding", "encoder/embed_tokens/embedding"),
            ("shared/embedding", "decoder/embed_tokens/embedding"),
            ("shared/embedding", "lm_head/kernel"),
        ),
        buffers=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
        with_head=("decoder",),
    ),
    Family(
        model_type="whisper",
        architectures=(
            ("WhisperForConditionalGeneration", WhisperForConditionalGeneration),
            ("WhisperModel", WhisperModel),
        ),
        read=read_whisper,
        prefix="model",
        heads=("proj_out",),
        tied=(("model/decoder/embed_tokens/embedding", "proj_out/kernel"),),
        with_head=("model/encoder/conv1",),  # OPT has the same embedding, and another head
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
