"""Drafts that are looked up in the earlier text."""

import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from lsjax.sharding import on_each_device

LONGEST = 8  # tokens that a lookup compares


def look_up(
    tokens_BS: Int[Array, "B S"], length_B: Int[Array, " B"], steps: int
) -> tuple[Int[Array, " B"], Int[Array, "B T"]]:
    """Finds the last tokens of each row in its earlier text (Saxena, 2023, prompt lookup decoding).

    Returns how many of them match, 0 to LONGEST, and the `steps` tokens that followed. Of several
    longest matches it takes the last one. If the text ends before that many tokens, they repeat.
    """

    def find(tokens_BS, length_B):
        last_B1 = length_B[:, None] - 1
        slots = jnp.arange(tokens_BS.shape[1])
        equal_BS, matched_BS = slots < last_B1, 0
        for back in range(LONGEST):
            wanted_B1 = jnp.take_along_axis(tokens_BS, jnp.maximum(last_B1 - back, 0), axis=1)
            # Text before the first token matches nothing.
            shifted_BS = jnp.pad(tokens_BS, ((0, 0), (back, 0)), constant_values=-1)
            equal_BS &= shifted_BS[:, : slots.size] == wanted_B1
            matched_BS += equal_BS
        at_B = jnp.argmax(jnp.where(matched_BS > 0, matched_BS * slots.size + slots, -1), axis=1)
        matched_B = jnp.take_along_axis(matched_BS, at_B[:, None], axis=1)[:, 0]
        period_B1 = jnp.maximum(last_B1 - at_B[:, None], 1)
        followed_BT = at_B[:, None] + 1 + jnp.arange(steps) % period_B1
        return matched_B, jnp.take_along_axis(tokens_BS, followed_BT, axis=1)

    rows = P("data")
    return on_each_device(find, (tokens_BS, length_B), (rows, rows), rows)
