"""Sizes of the chunks in which the loss passes through the head."""

import math

from lsjax.platforms import tuning
from lsjax.sharding import chunk_steps


def loss_chunk(batch: int, steps: int, table: tuple[int, int], share: float = 1.0) -> int:
    """C: positions of each row that pass through the head together. table: [V, D]. share: of a
    row's positions that are in the loss."""
    (vocab, width), most = table, math.ceil(steps * share)
    chunk = chunk_steps(batch, most, vocab, tuning().chunk_logits)
    if (states := tuning().chunk_states) is not None:
        chunk = min(chunk, chunk_steps(batch, most, width, states))
    return chunk
