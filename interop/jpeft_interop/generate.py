"""Text from a decoder: greedy, by temperature, from the top k or the nucleus; cached, in programs of fixed shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jpeft_interop.models.cache import Cache, init_cache
from jpeft_interop.models.errors import ModelError

Forward = Callable[..., Any]


class Rules(NamedTuple):
    """How the next token is chosen: what is settled before tracing."""

    greedy: bool
    nucleus: bool
    top_k: int


class State(NamedTuple):
    """Where a batch is: all that a step takes and gives.

    `mask` covers the tokens that will be, too: causality hides those. `positions` are those of the tokens last chosen.
    """

    tokens: Array
    mask: Array | None
    positions: Array
    done: Array
    filled: Array
    cache: Cache


class Numbers(NamedTuple):
    """The numbers it is chosen by and stopped at; arrays, so that other ones need no other program."""

    temperature: Array
    top_p: Array
    key: Array | None
    eos: Array | np.ndarray
    pad: Array | np.int32


def generate(
    forward: Forward,
    params: Any,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    key: Array | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    on_token: Callable[[np.ndarray], None] | None = None,
) -> Array:
    """Continues each row of `input_ids`.

    Programs are kept by `forward`, the shapes and the switches: pass the same `forward` each time, not a new lambda.

    Args:
      forward: a decoder's, of `load_model` or `pure`, or one of these lifted (then `params` are attached ones).
      params: what `forward` takes; never looked into.
      input_ids: `(batch, time)`. Shorter prompts are padded on the left.
      attention_mask: `(batch, time)`, zero at padding; None where there is none. Positions count from the
        first real token.
      max_new_tokens: how many tokens to add.
      temperature: 0 takes the likeliest token; else logits are divided by it and a token is drawn, which needs `key`.
      top_p: draw only from the fewest likeliest tokens whose probabilities reach it.
      top_k: draw only from that many likeliest tokens; 0 from all. Taken before `top_p`.
      key: a `jax.random.key`; the same key draws the same tokens.
      eos_token_id: a sequence ends with this token, or one of these.
      pad_token_id: what follows an end; by default the (first) end token.
      on_token: called with each step's tokens, `(batch,)`, as they come; steps then go one by one from Python.

    Returns:
      `(batch, time + max_new_tokens)`, int32: the prompts, what was added, and padding after an end. (transformers
      cuts off the columns that are padding in every row.)

    Raises:
      ModelError: shapes or numbers that mean nothing, a draw without a key, padding on the right.
    """
    ids, mask = _prompt(input_ids, attention_mask)
    _check_numbers(max_new_tokens, temperature, top_p, top_k, key)
    rules = Rules(temperature == 0, top_p < 1, top_k)
    eos = np.atleast_1d(np.asarray(() if eos_token_id is None else eos_token_id, np.int32))
    pad = np.int32(pad_token_id if pad_token_id is not None else eos[0] if eos.size else 0)
    numbers = Numbers(jnp.float32(temperature), jnp.float32(top_p), None if rules.greedy else key, eos, pad)
    if on_token is None:
        return _all_steps(forward, params, ids, mask, numbers, rules, max_new_tokens)
    state = _first(forward, params, ids, mask, numbers, rules, max_new_tokens)
    return _stream(forward, params, state, numbers, rules, on_token)


def _stream(
    forward: Forward, params: Any, state: State, numbers: Numbers, rules: Rules, on_token: Callable[[np.ndarray], None]
) -> Array:
    on_token(np.asarray(_latest(state)))
    while bool(_unfinished(state)):
        state = _step(forward, params, state, numbers, rules)
        on_token(np.asarray(_latest(state)))
    return state.tokens


@partial(jax.jit, static_argnums=(0, 5, 6))
def _all_steps(
    forward: Forward, params: Any, ids: Array, mask: Array | None, numbers: Numbers, rules: Rules, new: int
) -> Array:
    state = _first(forward, params, ids, mask, numbers, rules, new)
    state = jax.lax.while_loop(_unfinished, lambda state: _step(forward, params, state, numbers, rules), state)
    return state.tokens


@partial(jax.jit, static_argnums=(0, 5, 6))
def _first(
    forward: Forward, params: Any, ids: Array, mask: Array | None, numbers: Numbers, rules: Rules, new: int
) -> State:
    """Reads the prompts and chooses the first new token of each."""
    batch, time = ids.shape
    positions = None if mask is None else jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    last = jnp.array([time - 1])
    cache = init_cache(time + new)
    output = forward(params, ids, mask, position_ids=positions, cache=cache, logits_to_keep=last)
    state = State(
        tokens=jnp.pad(ids, ((0, 0), (0, new)), constant_values=numbers.pad),
        mask=None if mask is None else jnp.pad(mask, ((0, 0), (0, new)), constant_values=1),
        positions=jnp.full((batch,), time - 1) if positions is None else positions[:, -1],
        done=jnp.zeros((batch,), bool),
        filled=jnp.int32(time),
        cache=output.cache,
    )
    return _append(state, output.logits[:, -1], numbers, rules)


@partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def _step(forward: Forward, params: Any, state: State, numbers: Numbers, rules: Rules) -> State:
    """Reads the tokens last chosen and chooses the next."""
    token, positions = _latest(state)[:, None], state.positions[:, None]
    output = forward(params, token, state.mask, position_ids=positions, cache=state.cache)
    return _append(state._replace(cache=output.cache), output.logits[:, -1], numbers, rules)


def _append(state: State, logits: Array, numbers: Numbers, rules: Rules) -> State:
    token = jnp.where(state.done, numbers.pad, _choose(logits, state.filled, numbers, rules))
    return state._replace(
        tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.filled, axis=1),
        positions=state.positions + 1,
        done=state.done | jnp.isin(token, numbers.eos),
        filled=state.filled + 1,
    )


def _choose(logits: Array, number: Array, numbers: Numbers, rules: Rules) -> Array:
    """The next token of each row, `(batch,)`, of logits `(batch, vocab)`."""
    logits = logits.astype(jnp.float32)
    if rules.greedy or numbers.key is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / numbers.temperature
    if 0 < rules.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, rules.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if rules.nucleus:
        logits = jnp.where(logits < _least_of_nucleus(logits, numbers.top_p), -jnp.inf, logits)
    return jax.random.categorical(jax.random.fold_in(numbers.key, number), logits).astype(jnp.int32)


def _least_of_nucleus(logits: Array, top_p: Array) -> Array:
    """The smallest logit of the nucleus, `(batch, 1)`: those likelier than any token in it do not reach `top_p`."""
    falling = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    share = jax.nn.softmax(falling, axis=-1)
    before = jnp.cumsum(share, axis=-1) - share
    return jnp.min(jnp.where(before < top_p, falling, jnp.inf), axis=-1, keepdims=True)


def _latest(state: State) -> Array:
    return jax.lax.dynamic_index_in_dim(state.tokens, state.filled - 1, axis=1, keepdims=False)


def _unfinished(state: State) -> Array:
    return (state.filled < state.tokens.shape[1]) & ~jnp.all(state.done)


def _prompt(input_ids: ArrayLike, attention_mask: ArrayLike | None) -> tuple[Array, Array | None]:
    ids = np.asarray(input_ids)
    if ids.ndim != 2 or 0 in ids.shape or not np.issubdtype(ids.dtype, np.integer):
        raise ModelError(f"input_ids must be integers (batch, time), time at least 1; found {ids.dtype} {ids.shape}")
    if attention_mask is None:
        return jnp.asarray(ids, jnp.int32), None
    mask = np.asarray(attention_mask)
    if mask.shape != ids.shape:
        raise ModelError(f"attention_mask must have the shape of input_ids, {ids.shape}; found {mask.shape}")
    if not mask[:, -1].all():
        rows = np.flatnonzero(mask[:, -1] == 0).tolist()
        raise ModelError(f"rows {rows} end in padding: pad prompts on the left (tokenizer.padding_side = 'left')")
    return jnp.asarray(ids, jnp.int32), jnp.asarray(mask != 0, jnp.int32)


def _check_numbers(new: int, temperature: float, top_p: float, top_k: int, key: Array | None) -> None:
    if new < 1:
        raise ModelError(f"max_new_tokens must be at least 1; found {new}")
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ModelError(
            f"expected temperature ≥ 0, 0 < top_p ≤ 1 and top_k ≥ 0; found temperature={temperature}, top_p={top_p}, "
            f"top_k={top_k}"
        )
    if temperature > 0 and key is None:
        raise ModelError("drawing tokens (temperature > 0) needs a key: generate(…, key=jax.random.key(0))")
