"""What encoder-decoders here have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jax import Array

from jpeft_interop.models.cache import Cache
from jpeft_interop.models.errors import ModelError

States = tuple[Array, ...]


def encoded(encode: Callable[[], States], encoder_outputs: Sequence[Array] | None) -> States:
    """The encoder's states, the last one being what the decoder reads: as given, or what `encode` gives."""
    return encode() if encoder_outputs is None else (encoder_outputs[0],)


def refuse_cache(cache: Cache | None) -> None:
    """Refuses a cache.

    Raises:
      ModelError: there is one; the message shows what to do instead.
    """
    if cache is not None:
        raise ModelError(
            "an encoder-decoder takes no cache here: give all of decoder_input_ids each time, without cache=…; "
            "encoder_outputs=(output.encoder_last_hidden_state,) spares the encoder"
        )
