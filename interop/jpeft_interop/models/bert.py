"""BERT, an encoder: Devlin et al. 2018, https://arxiv.org/abs/1810.04805. Behaviour as transformers 5.23, "eager"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jpeft_interop.models.activations import activation
from jpeft_interop.models.attention import attend, padding_mask
from jpeft_interop.models.errors import ModelError
from jpeft_interop.models.heads import embed
from jpeft_interop.models.layers import Embedding, linear
from jpeft_interop.models.norms import LayerNorm
from jpeft_interop.models.output import Output
from jpeft_interop.models.reading import heads_divide, number_of_labels, optional, refuse, required


@dataclass(frozen=True)
class BertConfig:
    """The numbers a BERT is made from; names as in `config.json`."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    tie_word_embeddings: bool
    num_labels: int
    initializer_range: float


def read_bert(config: Mapping[str, Any]) -> BertConfig:
    """Reads the config of a `bert` model; what it leaves out is as transformers has it.

    Raises:
      ModelError: a size is missing or does not fit, or the config asks for what is not here (a decoder, relative
        positions).
    """
    refuse(config, is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
    heads_divide(config, required(config, "hidden_size"), required(config, "num_attention_heads"))
    activation(optional(config, "hidden_act", "gelu"))
    return BertConfig(
        vocab_size=required(config, "vocab_size"),
        hidden_size=config["hidden_size"],
        num_hidden_layers=required(config, "num_hidden_layers"),
        num_attention_heads=config["num_attention_heads"],
        intermediate_size=required(config, "intermediate_size"),
        hidden_act=optional(config, "hidden_act", "gelu"),
        max_position_embeddings=optional(config, "max_position_embeddings", 512),
        type_vocab_size=optional(config, "type_vocab_size", 2),
        layer_norm_eps=optional(config, "layer_norm_eps", 1e-12),
        tie_word_embeddings=optional(config, "tie_word_embeddings", True),
        num_labels=number_of_labels(config),
        initializer_range=optional(config, "initializer_range", 0.02),
    )


def _linear(config: BertConfig, sizes: tuple[int, int], dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    return linear(sizes, config.initializer_range, dtype, rngs)


def _norm(config: BertConfig, dtype: DTypeLike) -> LayerNorm:
    return LayerNorm(config.hidden_size, config.layer_norm_eps, dtype)


class Embeddings(nnx.Module):
    """Words + token types + positions, normed."""

    def __init__(self, config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """The three tables."""
        width, deviation = config.hidden_size, config.initializer_range
        self.word_embeddings = Embedding((config.vocab_size, width), deviation, dtype, rngs)
        self.position_embeddings = Embedding((config.max_position_embeddings, width), deviation, dtype, rngs)
        self.token_type_embeddings = Embedding((config.type_vocab_size, width), deviation, dtype, rngs)
        self.LayerNorm = _norm(config, dtype)
        self.longest = config.max_position_embeddings

    def __call__(
        self, input_ids: Array | None, inputs_embeds: Array | None, types: Array | None, positions: Array | None
    ) -> Array:
        """The stream `(batch, time, hidden)`; types are 0 and positions counted from 0 where not given."""
        x = embed(self.word_embeddings, input_ids, inputs_embeds)
        if x.shape[1] > self.longest:
            raise ModelError(f"{x.shape[1]} tokens; this model has {self.longest} positions (max_position_embeddings)")
        types = jnp.zeros(x.shape[:2], jnp.int32) if types is None else types
        positions = self.positions(input_ids, x.shape[1]) if positions is None else positions
        return self.LayerNorm(x + self.token_type_embeddings(types) + self.position_embeddings(positions))

    def positions(self, input_ids: Array | None, time: int) -> Array:
        """The rows of the position table, `(batch or 1, time)`, where the caller gives none."""
        del input_ids
        return jnp.arange(time)[None]


class SelfAttention(nnx.Module):
    """Attention in both directions."""

    def __init__(self, config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """The three projections."""
        square = (config.hidden_size, config.hidden_size)
        self.query = _linear(config, square, dtype, rngs)
        self.key = _linear(config, square, dtype, rngs)
        self.value = _linear(config, square, dtype, rngs)
        self.head_dim = config.hidden_size // config.num_attention_heads

    def __call__(self, x: Array, mask: Array | None) -> Array:
        """Attention on `(batch, time, hidden)`."""
        query, key, value = (
            projected.reshape(*projected.shape[:2], -1, self.head_dim)
            for projected in (self.query(x), self.key(x), self.value(x))
        )
        return attend(query, key, value, mask, self.head_dim**-0.5)


class Projection(nnx.Module):
    """LayerNorm(dense(x) + residual)."""

    def __init__(self, config: BertConfig, size: int, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """From `size` to the hidden width."""
        self.dense = _linear(config, (size, config.hidden_size), dtype, rngs)
        self.LayerNorm = _norm(config, dtype)

    def __call__(self, x: Array, residual: Array) -> Array:
        """The stream after it."""
        return self.LayerNorm(self.dense(x) + residual)


class Attention(nnx.Module):
    """Self-attention and its projection."""

    def __init__(self, config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """One layer's attention."""
        self.self = SelfAttention(config, dtype, rngs)
        self.output = Projection(config, config.hidden_size, dtype, rngs)

    def __call__(self, x: Array, mask: Array | None) -> Array:
        """The stream after it."""
        return self.output(self.self(x, mask), x)


class Intermediate(nnx.Module):
    """act(dense(x)), to the wide size; with a norm after it, the transform of the masked-LM head."""

    def __init__(self, config: BertConfig, size: int, dtype: DTypeLike, rngs: nnx.Rngs, norm: bool = False) -> None:
        """From the hidden width to `size`."""
        self.dense = _linear(config, (config.hidden_size, size), dtype, rngs)
        self.LayerNorm = _norm(config, dtype) if norm else None
        self.hidden_act = config.hidden_act

    def __call__(self, x: Array) -> Array:
        """On `(batch, time, hidden)`."""
        x = activation(self.hidden_act)(self.dense(x))
        return x if self.LayerNorm is None else self.LayerNorm(x)


class Layer(nnx.Module):
    """Attention, then MLP, each added to the stream and normed after."""

    def __init__(self, config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """One layer."""
        self.attention = Attention(config, dtype, rngs)
        self.intermediate = Intermediate(config, config.intermediate_size, dtype, rngs)
        self.output = Projection(config, config.intermediate_size, dtype, rngs)

    def __call__(self, x: Array, mask: Array | None) -> Array:
        """The stream after this layer."""
        x = self.attention(x, mask)
        return self.output(self.intermediate(x), x)


class Encoder(nnx.Module):
    """The stack of layers."""

    def __init__(self, config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """All layers."""
        self.layer = nnx.List([Layer(config, dtype, rngs) for _ in range(config.num_hidden_layers)])

    def __call__(self, x: Array, mask: Array | None) -> tuple[Array, ...]:
        """The stream before the first layer and after each."""
        states = [x]
        for layer in self.layer:
            states.append(layer(states[-1], mask))
        return tuple(states)


class Pooler(nnx.Module):
    """tanh(dense(first token))."""

    def __init__(self, config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """The projection."""
        self.dense = _linear(config, (config.hidden_size, config.hidden_size), dtype, rngs)

    def __call__(self, x: Array) -> Array:
        """`(batch, hidden)` of `(batch, time, hidden)`."""
        return jnp.tanh(self.dense(x[:, 0]))


class BertModel(nnx.Module):
    """The encoder with its pooler."""

    def __init__(
        self, config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs, pooler: bool = True, embeddings: type = Embeddings
    ) -> None:
        """Random weights of `dtype`, from the config's sizes."""
        self.embeddings = embeddings(config, dtype, rngs)
        self.encoder = Encoder(config, dtype, rngs)
        self.pooler = Pooler(config, dtype, rngs) if pooler else None

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        *,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        inputs_embeds: Array | None = None,
        output_hidden_states: bool = False,
    ) -> Output:
        """See `jpeft_interop.models.pure`."""
        x = self.embeddings(input_ids, inputs_embeds, token_type_ids, position_ids)
        states = self.encoder(x, padding_mask(attention_mask, x.shape[1]))
        return Output(
            last_hidden_state=states[-1],
            hidden_states=states if output_hidden_states else None,
            pooled=None if self.pooler is None else self.pooler(states[-1]),
        )


class BertForSequenceClassification(nnx.Module):
    """A classifier on the pooled first token."""

    def __init__(self, config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Random weights of `dtype`, from the config's sizes."""
        self.bert = BertModel(config, dtype, rngs)
        self.classifier = _linear(config, (config.hidden_size, config.num_labels), dtype, rngs)

    def __call__(self, input_ids: Array | None = None, attention_mask: Array | None = None, **options) -> Output:
        """See `jpeft_interop.models.pure`."""
        output = self.bert(input_ids, attention_mask, **options)
        assert output.pooled is not None
        return replace(output, logits=self.classifier(output.pooled))


class Predictions(nnx.Module):
    """The masked-LM head: a transform, then the word embeddings transposed and `bias`, or a `decoder` of its own.

    Torch keeps `bias` beside an untied decoder, where nothing reads it; so does this, to hold the same parameters.
    """

    def __init__(self, config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """The transform and the bias; `decoder` only where the config does not tie embeddings."""
        self.transform = Intermediate(config, config.hidden_size, dtype, rngs, norm=True)
        tied, sizes = config.tie_word_embeddings, (config.hidden_size, config.vocab_size)
        self.decoder = None if tied else _linear(config, sizes, dtype, rngs)
        self.bias = nnx.Param(jnp.zeros((config.vocab_size,), dtype))

    def __call__(self, x: Array, words: Embedding) -> Array:
        """Logits `(batch, time, vocab)`."""
        x = self.transform(x)
        return words.attend(x) + self.bias[...] if self.decoder is None else self.decoder(x)


class MaskedLMHead(nnx.Module):
    """Torch's name for what holds `predictions`."""

    def __init__(self, config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """The head."""
        self.predictions = Predictions(config, dtype, rngs)


class BertForMaskedLM(nnx.Module):
    """A masked language model."""

    def __init__(self, config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Random weights of `dtype`, from the config's sizes."""
        self.bert = BertModel(config, dtype, rngs, pooler=False)
        self.cls = MaskedLMHead(config, dtype, rngs)

    def __call__(self, input_ids: Array | None = None, attention_mask: Array | None = None, **options) -> Output:
        """See `jpeft_interop.models.pure`."""
        output = self.bert(input_ids, attention_mask, **options)
        assert output.last_hidden_state is not None
        logits = self.cls.predictions(output.last_hidden_state, self.bert.embeddings.word_embeddings)
        return replace(output, logits=logits)
