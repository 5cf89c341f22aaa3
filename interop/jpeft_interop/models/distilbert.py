"""DistilBERT: Sanh et al. 2019, https://arxiv.org/abs/1910.01108. Behaviour as transformers 5.23, "eager"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jpeft_interop.models.activations import activation
from jpeft_interop.models.attention import attend, padding_mask
from jpeft_interop.models.errors import ModelError
from jpeft_interop.models.heads import VocabularyHead, embed
from jpeft_interop.models.layers import Embedding, linear
from jpeft_interop.models.norms import LayerNorm
from jpeft_interop.models.output import Output
from jpeft_interop.models.reading import heads_divide, number_of_labels, optional, required

EPS = 1e-12


@dataclass(frozen=True)
class DistilBertConfig:
    """The numbers a DistilBERT is made from; names as in `config.json`."""

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    hidden_dim: int
    activation: str
    max_position_embeddings: int
    tie_word_embeddings: bool
    num_labels: int
    initializer_range: float


def read_distilbert(config: Mapping[str, Any]) -> DistilBertConfig:
    """Reads the config of a `distilbert` model; what it leaves out is as transformers has it.

    Raises:
      ModelError: a size is missing or does not fit, or the activation is not known.
    """
    heads_divide(config, required(config, "dim"), required(config, "n_heads"))
    activation(optional(config, "activation", "gelu"))
    return DistilBertConfig(
        vocab_size=required(config, "vocab_size"),
        dim=config["dim"],
        n_layers=required(config, "n_layers"),
        n_heads=config["n_heads"],
        hidden_dim=required(config, "hidden_dim"),
        activation=optional(config, "activation", "gelu"),
        max_position_embeddings=optional(config, "max_position_embeddings", 512),
        tie_word_embeddings=optional(config, "tie_word_embeddings", True),
        num_labels=number_of_labels(config),
        initializer_range=optional(config, "initializer_range", 0.02),
    )


def _linear(config: DistilBertConfig, sizes: tuple[int, int], dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    return linear(sizes, config.initializer_range, dtype, rngs)


class Embeddings(nnx.Module):
    """Words + positions, normed. Sinusoidal positions, too, are a table in the weights."""

    def __init__(self, config: DistilBertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """The two tables."""
        self.word_embeddings = Embedding((config.vocab_size, config.dim), config.initializer_range, dtype, rngs)
        sizes = (config.max_position_embeddings, config.dim)
        self.position_embeddings = Embedding(sizes, config.initializer_range, dtype, rngs)
        self.LayerNorm = LayerNorm(config.dim, EPS, dtype)
        self.longest = config.max_position_embeddings

    def __call__(self, input_ids: Array | None, inputs_embeds: Array | None, positions: Array | None) -> Array:
        """The stream `(batch, time, dim)`; positions are counted from 0 where not given."""
        x = embed(self.word_embeddings, input_ids, inputs_embeds)
        if x.shape[1] > self.longest:
            raise ModelError(f"{x.shape[1]} tokens; this model has {self.longest} positions (max_position_embeddings)")
        positions = jnp.arange(x.shape[1])[None] if positions is None else positions
        return self.LayerNorm(x + self.position_embeddings(positions))


class Attention(nnx.Module):
    """Attention in both directions."""

    def __init__(self, config: DistilBertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """The four projections."""
        square = (config.dim, config.dim)
        self.q_lin = _linear(config, square, dtype, rngs)
        self.k_lin = _linear(config, square, dtype, rngs)
        self.v_lin = _linear(config, square, dtype, rngs)
        self.out_lin = _linear(config, square, dtype, rngs)
        self.head_dim = config.dim // config.n_heads

    def __call__(self, x: Array, mask: Array | None) -> Array:
        """Attention on `(batch, time, dim)`."""
        query, key, value = (
            projected.reshape(*projected.shape[:2], -1, self.head_dim)
            for projected in (self.q_lin(x), self.k_lin(x), self.v_lin(x))
        )
        return self.out_lin(attend(query, key, value, mask, self.head_dim**-0.5))


class FeedForward(nnx.Module):
    """lin2(act(lin1(x)))."""

    def __init__(self, config: DistilBertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """The two projections."""
        self.lin1 = _linear(config, (config.dim, config.hidden_dim), dtype, rngs)
        self.lin2 = _linear(config, (config.hidden_dim, config.dim), dtype, rngs)
        self.activation = config.activation

    def __call__(self, x: Array) -> Array:
        """On `(batch, time, dim)`."""
        return self.lin2(activation(self.activation)(self.lin1(x)))


class Block(nnx.Module):
    """Attention, then MLP, each added to the stream and normed after."""

    def __init__(self, config: DistilBertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """One layer."""
        self.attention = Attention(config, dtype, rngs)
        self.sa_layer_norm = LayerNorm(config.dim, EPS, dtype)
        self.ffn = FeedForward(config, dtype, rngs)
        self.output_layer_norm = LayerNorm(config.dim, EPS, dtype)

    def __call__(self, x: Array, mask: Array | None) -> Array:
        """The stream after this layer."""
        x = self.sa_layer_norm(self.attention(x, mask) + x)
        return self.output_layer_norm(self.ffn(x) + x)


class Transformer(nnx.Module):
    """The stack of layers."""

    def __init__(self, config: DistilBertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """All layers."""
        self.layer = nnx.List([Block(config, dtype, rngs) for _ in range(config.n_layers)])

    def __call__(self, x: Array, mask: Array | None) -> tuple[Array, ...]:
        """The stream before the first layer and after each."""
        states = [x]
        for layer in self.layer:
            states.append(layer(states[-1], mask))
        return tuple(states)


class DistilBertModel(nnx.Module):
    """The encoder."""

    def __init__(self, config: DistilBertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Random weights of `dtype`, from the config's sizes."""
        self.embeddings = Embeddings(config, dtype, rngs)
        self.transformer = Transformer(config, dtype, rngs)

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        *,
        position_ids: Array | None = None,
        inputs_embeds: Array | None = None,
        output_hidden_states: bool = False,
    ) -> Output:
        """See `jpeft_interop.models.pure`."""
        x = self.embeddings(input_ids, inputs_embeds, position_ids)
        states = self.transformer(x, padding_mask(attention_mask, x.shape[1]))
        return Output(last_hidden_state=states[-1], hidden_states=states if output_hidden_states else None)


class DistilBertForSequenceClassification(nnx.Module):
    """A classifier on the first token: classifier(relu(pre_classifier(x)))."""

    def __init__(self, config: DistilBertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Random weights of `dtype`, from the config's sizes."""
        self.distilbert = DistilBertModel(config, dtype, rngs)
        self.pre_classifier = _linear(config, (config.dim, config.dim), dtype, rngs)
        self.classifier = _linear(config, (config.dim, config.num_labels), dtype, rngs)

    def __call__(self, input_ids: Array | None = None, attention_mask: Array | None = None, **options) -> Output:
        """See `jpeft_interop.models.pure`."""
        output = self.distilbert(input_ids, attention_mask, **options)
        assert output.last_hidden_state is not None
        first = output.last_hidden_state[:, 0]
        return replace(output, logits=self.classifier(jax.nn.relu(self.pre_classifier(first))))


class DistilBertForMaskedLM(nnx.Module):
    """A masked language model: a transform, then the word embeddings transposed, or a kernel of its own, and a bias."""

    def __init__(self, config: DistilBertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Random weights of `dtype`, from the config's sizes."""
        self.distilbert = DistilBertModel(config, dtype, rngs)
        self.vocab_transform = _linear(config, (config.dim, config.dim), dtype, rngs)
        self.vocab_layer_norm = LayerNorm(config.dim, EPS, dtype)
        sizes = (config.dim, config.vocab_size)
        self.vocab_projector = VocabularyHead(
            sizes, config.initializer_range, dtype, rngs, tied=config.tie_word_embeddings
        )
        self.activation = config.activation

    def __call__(self, input_ids: Array | None = None, attention_mask: Array | None = None, **options) -> Output:
        """See `jpeft_interop.models.pure`."""
        output = self.distilbert(input_ids, attention_mask, **options)
        assert output.last_hidden_state is not None
        x = activation(self.activation)(self.vocab_transform(output.last_hidden_state))
        words = self.distilbert.embeddings.word_embeddings
        return replace(output, logits=self.vocab_projector(self.vocab_layer_norm(x), words))
