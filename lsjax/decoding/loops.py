"""The compiled programs of decoding: read prompts, put a row into a batch, and run rounds."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from lsjax.decoding.state import DecodeState, Strategy
from lsjax.model.cache import KVCache
from lsjax.model.llama import Llama

# Names of the loops in compiled programs.
PROMPT_CHUNKS, ROUNDS = "prompt_chunks", "rounds"


def prefill(
    model: Llama, state: DecodeState, start: Int[Array, ""], *, chunk: int, depth: int
) -> DecodeState:
    """Runs the prompts from position `start` on through the first `depth` layers, filling the
    cache, and appends the first new token of every row. What comes before is in the cache. The
    prompts are read `chunk` positions at a time."""
    batch, capacity = state.tokens_BS.shape

    def read(index, carry):
        cache, last_BD = carry
        # At the end of the cache a few positions are read again rather than written beyond it.
        begin = jnp.minimum(start + index * chunk, capacity - chunk)
        tokens_BT = lax.dynamic_slice_in_dim(state.tokens_BS, begin, chunk, axis=1)
        positions_BT = jnp.broadcast_to(begin + jnp.arange(chunk), (batch, chunk))
        x_BTD, cache = model.run_layers(model.embed(tokens_BT), 0, depth, positions_BT, cache)
        offset_B = state.length_B - 1 - begin  # of the prompt's last token, if it is here
        x_BD = jnp.take_along_axis(x_BTD, jnp.clip(offset_B, 0, chunk - 1)[:, None, None], 1)[:, 0]
        here_B = (offset_B >= 0) & (offset_B < chunk)
        return cache, jnp.where(here_B[:, None], x_BD, last_BD)

    last_BD = jnp.zeros((batch, model.config.hidden_size), model.dtype)
    chunks = (state.length_B.max() - start + chunk - 1) // chunk
    with jax.named_scope(PROMPT_CHUNKS):
        cache, last_BD = lax.fori_loop(0, chunks, read, (state.cache, last_BD))
    return state.with_cache(cache).append(model.unembed(last_BD))


def insert(
    model: Llama, state: DecodeState, single: DecodeState, row: Int[Array, ""]
) -> DecodeState:
    """The batch with the one row of `single` in the place of one of its own."""

    def put(axis: int):
        return lambda batch, one: lax.dynamic_update_slice_in_dim(batch, one, row, axis)

    # The rows of a stacked cache stand behind its layers.
    cache = jax.tree.map(put(1 if model.is_stacked else 0), state.cache, single.cache)
    empty = KVCache((), ())
    rest = jax.tree.map(put(0), state.with_cache(empty), single.with_cache(empty))
    return rest.with_cache(cache)


def grow(model: Llama, state: DecodeState, *, capacity: int) -> DecodeState:
    """The rows with more slots."""
    return state.grown(capacity)


def decode(
    model: Llama, state: DecodeState, rounds: Int[Array, ""], arguments: Any, *, strategy: Strategy
) -> DecodeState:
    """At most `rounds` rounds of the strategy with these `arguments` of it. Returns as soon as a
    row that ran has ended, so that the host can note its time, and before a round that the cache
    has no room for, so that the host can give it more."""

    def more(carry):
        done, current = carry
        go_on_B = (current.running_B == running_B) & current.has_room_B(strategy.slack)
        return (done < rounds) & current.running_B.any() & go_on_B.all()

    def step(carry):
        done, current = carry
        return done + 1, strategy.step(model, current, arguments)

    running_B = state.running_B
    with jax.named_scope(ROUNDS):
        return lax.while_loop(more, step, (0, state))[1]
