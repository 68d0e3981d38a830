"""The two compiled programs of decoding: read the prompts, and run rounds."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from lsjax.decoding.state import DecodeState, Strategy
from lsjax.model.llama import Llama


def prefill(model: Llama, state: DecodeState, *, chunk: int, depth: int) -> DecodeState:
    """Runs the prompts through the first `depth` layers, filling the cache, and commits the first
    new token of every row. The prompts are read `chunk` positions at a time."""
    batch = state.length_B.shape[0]

    def read(index, carry):
        cache, last_BD = carry
        positions_T = index * chunk + jnp.arange(chunk)
        tokens_BT = lax.dynamic_slice_in_dim(state.tokens_BS, index * chunk, chunk, axis=1)
        positions_BT = jnp.broadcast_to(positions_T, (batch, chunk))
        x_BTD, cache = model.run_layers(model.embed(tokens_BT), 0, depth, positions_BT, cache)
        offset_B = state.length_B - 1 - index * chunk  # of the prompt's last token, if it is here
        x_BD = jnp.take_along_axis(x_BTD, jnp.clip(offset_B, 0, chunk - 1)[:, None, None], 1)[:, 0]
        here_B = (offset_B >= 0) & (offset_B < chunk)
        return cache, jnp.where(here_B[:, None], x_BD, last_BD)

    last_BD = jnp.zeros((batch, model.config.hidden_size), model.dtype)
    chunks = (state.length_B.max() + chunk - 1) // chunk
    cache, last_BD = lax.fori_loop(0, chunks, read, (state.cache, last_BD))
    token_B = state.choose(model.unembed(last_BD))
    return state.with_cache(cache).commit(token_B[:, None], 1)


def decode(
    model: Llama, state: DecodeState, rounds: Int[Array, ""], arguments: Any, *, strategy: Strategy
) -> DecodeState:
    """At most `rounds` rounds of the strategy with these `arguments` of it; returns as soon as a
    row that ran has ended, so that the host can note its time."""

    def more(carry):
        done, current = carry
        return (done < rounds) & current.running_B.any() & (current.running_B == running_B).all()

    def step(carry):
        done, current = carry
        return done + 1, strategy.step(model, current, arguments)

    running_B = state.running_B
    return lax.while_loop(more, step, (0, state))[1]
