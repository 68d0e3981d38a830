"""What exits say at each new token of a row, read again from its cache: `Request.exits`.

A row that has ended has the keys and values of all its tokens in the cache. So the layers run once
more on the new tokens only, a chunk at a time, as for a prompt. This serves every strategy, and the
programs of rounds stay as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from jaxtyping import Float

from lsjax.decoding.compiler import Programs
from lsjax.decoding.programs import read_exits
from lsjax.decoding.prompts import chunk_size
from lsjax.decoding.state import DecodeState


@dataclass(frozen=True)
class ExitOutputs:
    """One exit at the positions before the n new tokens of a row.

    hidden_nD: its states, before the final norm. top_probs_n: its highest probability.
    log_probs_n: log-probability of the token that was chosen. Without penalties, temperature and
    filters.
    """

    hidden_nD: Float[np.ndarray, "n D"]
    top_probs_n: Float[np.ndarray, " n"]
    log_probs_n: Float[np.ndarray, " n"]


def exit_outputs(
    programs: Programs, state: DecodeState, row: int, new: range, exits: Sequence[int]
) -> dict[int, ExitOutputs]:
    """The outputs of exits for a row's new tokens, at the positions `new`."""
    if not exits or not new:
        return {}
    exits, parts = tuple(sorted({*exits})), []
    chunk = chunk_size(len(new), state.capacity)
    read = partial(read_exits, exits=exits, chunk=chunk)
    for first in range(new.start - 1, new.stop - 1, chunk):
        begin = min(first, state.capacity - chunk)  # inside the cache
        arguments = state, np.int32(row), np.int32(begin)
        found = jax.device_get(programs.get(read, *arguments)(*arguments))
        wanted = slice(first - begin, min(chunk, new.stop - 1 - begin))
        parts.append(jax.tree.map(lambda leaf, wanted=wanted: leaf[wanted], found))
    fields = jax.tree.map(lambda *pieces: np.concatenate(pieces), *parts)
    return {exit_layer: ExitOutputs(*own) for exit_layer, own in zip(exits, fields, strict=True)}
