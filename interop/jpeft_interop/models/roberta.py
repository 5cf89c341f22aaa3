"""RoBERTa and XLM-RoBERTa: BERT with other positions and heads. Behaviour as transformers 5.23, "eager".

Liu et al. 2019, https://arxiv.org/abs/1907.11692; Conneau et al. 2019, https://arxiv.org/abs/1911.02116.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jpeft_interop.models.activations import activation
from jpeft_interop.models.bert import BertConfig, BertModel, Embeddings, read_bert
from jpeft_interop.models.layers import Embedding, linear
from jpeft_interop.models.norms import LayerNorm
from jpeft_interop.models.output import Output
from jpeft_interop.models.reading import optional


@dataclass(frozen=True)
class RobertaConfig(BertConfig):
    """The numbers a RoBERTa is made from; names as in `config.json`."""

    pad_token_id: int


def read_roberta(config: Mapping[str, Any]) -> RobertaConfig:
    """Reads the config of a `roberta` or `xlm-roberta` model; what it leaves out is as transformers has it.

    Raises:
      ModelError: as `read_bert`.
    """
    return RobertaConfig(**asdict(read_bert(config)), pad_token_id=optional(config, "pad_token_id", 1))


class RobertaEmbeddings(Embeddings):
    """BERT's, with positions that start after `pad_token_id` and pass over padding."""

    def __init__(self, config: RobertaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """The three tables; the rows up to `pad_token_id` are no token's position."""
        super().__init__(config, dtype, rngs)
        self.pad_token_id = config.pad_token_id
        self.longest = config.max_position_embeddings - config.pad_token_id - 1

    def positions(self, input_ids: Array | None, time: int) -> Array:
        """Real tokens are counted, padding is at `pad_token_id`; by the ids, not by the mask."""
        if input_ids is None:
            return jnp.arange(time)[None] + self.pad_token_id + 1
        real = (input_ids != self.pad_token_id).astype(jnp.int32)
        return jnp.cumsum(real, axis=1) * real + self.pad_token_id


class RobertaModel(BertModel):
    """The encoder with its pooler."""

    def __init__(self, config: RobertaConfig, dtype: DTypeLike, rngs: nnx.Rngs, pooler: bool = True) -> None:
        """Random weights of `dtype`, from the config's sizes."""
        super().__init__(config, dtype, rngs, pooler, RobertaEmbeddings)


class ClassificationHead(nnx.Module):
    """out_proj(tanh(dense(first token)))."""

    def __init__(self, config: RobertaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """The two projections."""
        width, deviation = config.hidden_size, config.initializer_range
        self.dense = linear((width, width), deviation, dtype, rngs)
        self.out_proj = linear((width, config.num_labels), deviation, dtype, rngs)

    def __call__(self, x: Array) -> Array:
        """Logits `(batch, labels)` of `(batch, time, hidden)`."""
        return self.out_proj(jnp.tanh(self.dense(x[:, 0])))


class RobertaForSequenceClassification(nnx.Module):
    """A classifier on the first token."""

    def __init__(self, config: RobertaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Random weights of `dtype`, from the config's sizes."""
        self.roberta = RobertaModel(config, dtype, rngs, pooler=False)
        self.classifier = ClassificationHead(config, dtype, rngs)

    def __call__(self, input_ids: Array | None = None, attention_mask: Array | None = None, **options) -> Output:
        """See `jpeft_interop.models.pure`."""
        output = self.roberta(input_ids, attention_mask, **options)
        assert output.last_hidden_state is not None
        return replace(output, logits=self.classifier(output.last_hidden_state))


class MaskedLMHead(nnx.Module):
    """A transform (always with GELU), then the word embeddings transposed and `bias`, or a `decoder` of its own.

    Torch keeps `bias` beside an untied decoder, where nothing reads it; so does this, to hold the same parameters.
    """

    def __init__(self, config: RobertaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """The transform and the bias; `decoder` only where the config does not tie embeddings."""
        width, deviation = config.hidden_size, config.initializer_range
        self.dense = linear((width, width), deviation, dtype, rngs)
        self.layer_norm = LayerNorm(width, config.layer_norm_eps, dtype)
        tied, sizes = config.tie_word_embeddings, (width, config.vocab_size)
        self.decoder = None if tied else linear(sizes, deviation, dtype, rngs)
        self.bias = nnx.Param(jnp.zeros((config.vocab_size,), dtype))

    def __call__(self, x: Array, words: Embedding) -> Array:
        """Logits `(batch, time, vocab)`."""
        x = self.layer_norm(activation("gelu")(self.dense(x)))
        return words.attend(x) + self.bias[...] if self.decoder is None else self.decoder(x)


class RobertaForMaskedLM(nnx.Module):
    """A masked language model."""

    def __init__(self, config: RobertaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Random weights of `dtype`, from the config's sizes."""
        self.roberta = RobertaModel(config, dtype, rngs, pooler=False)
        self.lm_head = MaskedLMHead(config, dtype, rngs)

    def __call__(self, input_ids: Array | None = None, attention_mask: Array | None = None, **options) -> Output:
        """See `jpeft_interop.models.pure`."""
        output = self.roberta(input_ids, attention_mask, **options)
        assert output.last_hidden_state is not None
        return replace(output, logits=self.lm_head(output.last_hidden_state, self.roberta.embeddings.word_embeddings))
