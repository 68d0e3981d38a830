"""Seconds of rounds, measured with the compiled program that decodes."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.decoding.state import DecodeState

EMPTY_CALLS = 15  # of which the fastest counts


class Stopwatch:
    """Times calls of a compiled loop of rounds. Each starts from the same state in the same cache,
    as the program consumes its state.

    loop: (state, number of rounds, arguments) -> state. pause: (state, most tokens) -> state, after
    each call, if given.
    arguments: of the loop, by default.
    """

    def __init__(
        self,
        loop: Callable[..., DecodeState],
        pause: Callable[..., DecodeState] | None,
        state: DecodeState,
        arguments: Any,
    ):
        self._loop, self._pause, self._state, self._arguments = loop, pause, state, arguments
        changed = ("length_B", "finish_B", "round_BS", "learned")
        start = {name: getattr(state, name) for name in changed}
        self._start = jax.tree.map(jnp.copy, start)

    def run(self, rounds: int, arguments: Any = None) -> tuple[float, int]:
        """Seconds of a call, and how many rounds it ran: a full cache ends it early. Each token of
        a pause is a round."""
        self._state = replace(self._state, **jax.tree.map(jnp.copy, self._start))
        jax.block_until_ready(self._state)
        given = self._arguments if arguments is None else arguments
        begin = time.perf_counter()
        self._state = self._loop(self._state, np.int32(rounds), given)
        if self._pause is not None:
            self._state = self._pause(self._state, np.int32(np.iinfo(np.int32).max))
        jax.block_until_ready(self._state)
        spent = time.perf_counter() - begin
        return spent, int((np.array(self._state.round_BS) > 0).sum(1).max())

    def empty_call(self, arguments: Any = None) -> float:
        """Seconds of a call without rounds."""
        return min(self.run(0, arguments)[0] for _ in range(EMPTY_CALLS))
