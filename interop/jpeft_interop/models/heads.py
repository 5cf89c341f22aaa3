"""What stands before and after a stack: looking tokens up, choosing the tokens that a head reads."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jpeft_interop.models.attention import capped
from jpeft_interop.models.chunked_loss import token_scores
from jpeft_interop.models.errors import ModelError
from jpeft_interop.models.layers import Embedding
from jpeft_interop.models.output import Output


def embed(table: Embedding, input_ids: Array | None, inputs_embeds: Array | None, side: str = "") -> Array:
    """The embeddings `(batch, time, hidden)`: looked up, or as given. An id outside the table gives NaN.

    Args:
      table: the word embeddings.
      input_ids: `(batch, time)`.
      inputs_embeds: `(batch, time, hidden)`, instead.
      side: `decoder_`, where errors are to name those.

    Raises:
      ModelError: both or neither are given, or either has the wrong number of axes.
    """
    given, axes = (input_ids, 2) if inputs_embeds is None else (inputs_embeds, 3)
    if given is None or (input_ids is not None and inputs_embeds is not None):
        names = f"{side}input_ids (batch, time) and {side}inputs_embeds (batch, time, hidden)"
        raise ModelError(f"give exactly one of {names}")
    if given.ndim != axes:
        name = f"{side}input_ids" if axes == 2 else f"{side}inputs_embeds"
        wanted = ("batch", "time", "hidden")[:axes]
        raise ModelError(f"{name} must have {axes} axes, ({', '.join(wanted)}); found shape {given.shape}")
    return given if inputs_embeds is not None else table(given)


def images(pixel_values: Array | None, wanted: tuple[int, int, int]) -> Array:
    """`pixel_values`, known to be of the shape that a model was made for.

    Raises:
      ModelError: they are not given, or not `(batch, *wanted)`, channels first.
    """
    if pixel_values is None:
        raise ModelError("give pixel_values (batch, channels, height, width)")
    if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != wanted:
        expected = ", ".join(map(str, wanted))
        raise ModelError(
            f"pixel_values must be of shape (batch, {expected}), (channels, height, width) as the config has them; "
            f"found {tuple(pixel_values.shape)}"
        )
    return pixel_values


class VocabularyHead(nnx.Module):
    """Logits with a `bias` of its own; the `kernel` is the word embeddings, transposed, where they are tied."""

    def __init__(
        self, sizes: tuple[int, int], deviation: float, dtype: DTypeLike, rngs: nnx.Rngs, *, tied: bool
    ) -> None:
        """A head of `sizes` (width, vocabulary)."""
        init = nnx.initializers.normal(deviation)
        self.kernel = None if tied else nnx.Param(init(rngs.params(), sizes, dtype))
        self.bias = nnx.Param(jnp.zeros(sizes[1:], dtype))

    def __call__(self, x: Array, words: Embedding) -> Array:
        """Logits `(batch, time, vocabulary)`."""
        return (words.attend(x) if self.kernel is None else x @ self.kernel[...]) + self.bias[...]


def with_logits(
    output: Output,
    head: nnx.Linear | None,
    words: Embedding,
    logits_to_keep: Array | int | None,
    next_tokens: Array | None = None,
    cap: float | None = None,
) -> Output:
    """`output` with the logits of a language model: by `head`, or by the word embeddings transposed where it is None.

    Args:
      output: what the stack gave.
      head: the kernel of an untied model.
      words: the word embeddings.
      logits_to_keep: which tokens get logits. An int is that many at the end (0, as None, is all), an array of indices
        is those.
      next_tokens: what each of these tokens is followed by, `(batch, time)`, -100 where nothing is to be learnt. With
        it the result has `losses` and `hits` in place of logits, which are never all there, see `chunked_loss`.
      cap: what the logits stay below by a tanh, see `attention.capped`.

    Raises:
      ModelError: `logits_to_keep` or `next_tokens` is of a wrong shape.
    """
    hidden = _pick(_last(output), logits_to_keep)
    logits = lambda states: capped(words.attend(states) if head is None else head(states), cap)
    if next_tokens is None:
        return replace(output, logits=logits(hidden))
    losses, hits = token_scores(logits, hidden, jnp.asarray(next_tokens), words.embedding[...].shape[0])
    return replace(output, losses=losses, hits=hits)


def with_class(output: Output, score: nnx.Linear, input_ids: Array | None, pad_token_id: int | None) -> Output:
    """`output` with a decoder's class logits `(batch, labels)`, read off the last token that is not `pad_token_id`.

    As in transformers, that is the last token of all where there are no ids to look at, and the mask is not asked.

    Raises:
      ModelError: several sequences and no padding token to find their ends by.
    """
    return replace(output, logits=score(_last_token(_last(output), input_ids, pad_token_id)))


def _last(output: Output) -> Array:
    assert output.last_hidden_state is not None
    return output.last_hidden_state


def _pick(hidden: Array, logits_to_keep: Array | int | None) -> Array:
    if logits_to_keep is None:
        return hidden
    if isinstance(logits_to_keep, int):
        return hidden[:, -logits_to_keep:] if logits_to_keep else hidden
    if logits_to_keep.ndim != 1:
        raise ModelError(
            "logits_to_keep must be an int that is known while tracing, or a 1-D array of indices; "
            f"found an array of shape {logits_to_keep.shape}"
        )
    return hidden[:, logits_to_keep]


def _last_token(hidden: Array, input_ids: Array | None, pad_token_id: int | None) -> Array:
    if pad_token_id is None and hidden.shape[0] != 1:
        raise ModelError(f"a batch of {hidden.shape[0]} needs the config's pad_token_id, which is null")
    if input_ids is None or pad_token_id is None:
        return hidden[:, -1]
    last = jnp.argmax(jnp.arange(input_ids.shape[1]) * (input_ids != pad_token_id), axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
