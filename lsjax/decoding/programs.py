"""Programs of decoding: read prompts, put a row into a batch, run rounds, read exits."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lsjax.decoding.prompts import Prompts
from lsjax.decoding.scopes import PROMPT_CHUNKS, ROUNDS
from lsjax.decoding.state import DecodeState
from lsjax.decoding.strategy import Strategy
from lsjax.model.protocol import (
    Cache,
    DecoderModel,
    grow_cache,
    prepare,
    run_past_exits,
    run_through,
)


def prefill(
    model: DecoderModel,
    state: DecodeState,
    start: Int[Array, ""],
    *,
    chunk: int,
    depth: int,
    exits: tuple[int, ...] = (),
) -> DecodeState:
    """Runs the prompts through the first `depth` layers, and appends each row's first new token.
    Other arguments: as for `read_prompts`."""
    given = state.tokens_BS, state.length_B, state.cache, start
    cache, last_BD = read_prompts(model, *given, chunk=chunk, depth=depth, exits=exits)
    return state.with_cache(cache).append(model.unembed(last_BD))


def read_prompts(
    model: DecoderModel,
    tokens_BS: Int[Array, "B S"],
    length_B: Int[Array, " B"],
    cache: Cache,
    start: Int[Array, ""] | int,
    *,
    chunk: int,
    depth: int,
    exits: tuple[int, ...],
) -> tuple[Cache, Float[Array, "B D"]]:
    """The cache of the prompts, and the state of each one's last token after `depth` layers. Starts
    at position `start`, after the cached ones, and reads `chunk` positions at a time. exits: those
    that draft, some perhaps from states of their own (`draft_state`)."""
    batch, capacity = tokens_BS.shape

    def read(index, carry):
        cache, last_BD = carry
        # At the end of the cache a few positions are read again, to stay inside the cache.
        begin = jnp.minimum(start + index * chunk, capacity - chunk)
        tokens_BT = lax.dynamic_slice_in_dim(tokens_BS, begin, chunk, axis=1)
        positions_BT = jnp.broadcast_to(begin + jnp.arange(chunk), (batch, chunk))
        x_BTD = model.embed(tokens_BT, positions_BT)
        x_BTD, cache = run_past_exits(model, exits, depth, x_BTD, positions_BT, cache)
        offset_B = length_B - 1 - begin  # of the prompt's last token in this chunk
        x_BD = jnp.take_along_axis(x_BTD, jnp.clip(offset_B, 0, chunk - 1)[:, None, None], 1)[:, 0]
        here_B = (offset_B >= 0) & (offset_B < chunk)
        return cache, jnp.where(here_B[:, None], x_BD, last_BD)

    none_B1 = jnp.zeros((batch, 1), jnp.int32)
    like = jax.eval_shape(model.embed, none_B1, none_B1)
    last_BD = jnp.zeros((batch, like.shape[-1]), like.dtype)
    chunks = (length_B.max() - start + chunk - 1) // chunk
    with jax.named_scope(PROMPT_CHUNKS):
        return lax.fori_loop(0, chunks, read, (cache, last_BD))


def insert(
    model: DecoderModel, state: DecodeState, single: DecodeState, row: Int[Array, ""]
) -> DecodeState:
    """The batch with its row `row` replaced by the one row of `single`."""
    return jax.tree.map(
        lambda batch, one: lax.dynamic_update_slice_in_dim(batch, one, row, axis=0), state, single
    )


def fill(
    model: DecoderModel,
    state: DecodeState,
    new: DecodeState,
    prompts: Prompts,
    *,
    chunk: int,
    depth: int,
    exits: tuple[int, ...] = (),
) -> DecodeState:
    """The batch, in which the rows of `new` that have a prompt replace others. `new` has no cache
    yet. Each prompt is read once, `chunk` positions at a time, for all rows that begin with it.
    depth, exits: as for `read_prompts`."""
    given = prompts.tokens_US, prompts.length_U, prompts.cache, 0
    cache, last_UD = read_prompts(model, *given, chunk=chunk, depth=depth, exits=exits)
    is_new_B, source_B = prompts.source_B >= 0, jnp.maximum(prompts.source_B, 0)
    cache, last_BD = jax.tree.map(lambda own: jnp.take(own, source_B, axis=0), (cache, last_UD))
    new = new.with_cache(grow_cache(model, cache, state.capacity, depth))

    def chosen(old: Array, own: Array) -> Array:
        return jnp.where(is_new_B.reshape(-1, *[1] * (old.ndim - 1)), own, old)

    return jax.tree.map(chosen, state, new.append(model.unembed(last_BD)))


def keep_rows(model: DecoderModel, state: DecodeState, rows_b: Int[Array, " b"]) -> DecodeState:
    """A batch of these rows alone, in this order."""
    return jax.tree.map(lambda batch: jnp.take(batch, rows_b, axis=0), state)


def grow(model: DecoderModel, state: DecodeState, *, capacity: int, depth: int) -> DecodeState:
    """The rows with more slots."""
    return state.grown(capacity, grow_cache(model, state.cache, capacity, depth))


def decode(
    model: DecoderModel,
    state: DecodeState,
    rounds: Int[Array, ""],
    arguments: Any,
    *,
    strategy: Strategy,
) -> DecodeState:
    """Runs at most `rounds` rounds of the strategy. Stops when a row has ended: the host notes its
    time. Stops before a round that the cache has no room for: the host grows it. Stops if the
    strategy pauses."""

    running_B = state.running_B

    def another(carry):
        done, current = carry
        fits = current.same_rows_and_room(running_B, strategy.slack) & current.running_B.any()
        return (done < rounds) & fits & strategy.wants_another(current)

    def run_round(carry):
        done, current = carry
        return done + 1, strategy.round(model, current, arguments)

    with jax.named_scope(ROUNDS):
        return lax.while_loop(another, run_round, (0, state))[1]


def pause(
    model: DecoderModel, state: DecodeState, most: Int[Array, ""], *, strategy: Strategy
) -> DecodeState:
    """The strategy's pause between two calls of `decode`. It is a program of its own: in a larger
    one, XLA:TPU loads fewer weights ahead. most: tokens of a row."""
    return strategy.pause(model, state, most)


def read_exits(
    model: DecoderModel,
    state: DecodeState,
    row: Int[Array, ""],
    start: Int[Array, ""],
    *,
    exits: tuple[int, ...],
    chunk: int,
) -> tuple[tuple[Float[Array, "T D"], Float[Array, " T"], Float[Array, " T"]], ...]:
    """Fields of `ExitOutputs` for each exit, at `chunk` positions of a row from `start` on, by its
    own states, whatever it drafts from. The row's keys and values are in the cache."""

    def of_row(leaf: Array) -> Array:
        return lax.dynamic_slice_in_dim(leaf, row, 1)

    positions_1T = start + jnp.arange(chunk)[None]
    tokens_1S, cache = of_row(state.tokens_BS), jax.tree.map(of_row, state.cache)
    tokens_1T = lax.dynamic_slice_in_dim(tokens_1S, start, chunk, axis=1)
    next_1T = jnp.take(tokens_1S, positions_1T[0] + 1, axis=1, mode="clip")
    x_1TD = model.embed(tokens_1T, positions_1T)
    places = positions_1T, prepare(model, positions_1T)
    states, _ = run_through(model, (0, *exits), x_1TD, *places, cache)
    found = []
    for hidden_1TD in states:
        logits_TV = model.unembed(hidden_1TD[0])
        log_z_T = jax.nn.logsumexp(logits_TV, axis=-1)
        chosen_T = jnp.take_along_axis(logits_TV, next_1T[0, :, None], axis=1)[:, 0]
        top_probs_T = jnp.exp(logits_TV.max(-1) - log_z_T)
        found.append((hidden_1TD[0], top_probs_T, chosen_T - log_z_T))
    return tuple(found)
