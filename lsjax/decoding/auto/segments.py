"""Layers between exits, each segment of them under a guard."""

from collections.abc import Callable, Sequence
from itertools import pairwise, zip_longest
from typing import Any

from jaxtyping import Array, Bool, Float, Int

from lsjax.decoding.guards import run_if
from lsjax.decoding.scopes import guard_of_layers
from lsjax.model.protocol import Cache, DecoderModel, draft_state, run_layers


def run_segments(
    model: DecoderModel,
    bounds: Sequence[int],
    runs: Callable[[int, int], Bool[Array, ""] | bool],
    x_BTD: Float[Array, "B T D"],
    positions_BT: Int[Array, "B T"],
    prepared: Any,
    cache: Cache,
    kept: Sequence[Float[Array, "B T D"]] = (),
) -> tuple[list[Float[Array, "B T D"]], Cache]:
    """Runs layers lo..hi-1 for each adjacent pair in `bounds`, if `runs(lo, hi)`; True always does.
    Returns the states after each pair, and the cache. Where a pair does not run, its states are
    those of `kept`, or as before it."""
    reached = []
    for (lo, hi), kept_BTD in zip_longest(pairwise(bounds), kept):
        start_BTD = x_BTD

        def run(carry, lo=lo, hi=hi, start_BTD=start_BTD):
            return run_layers(model, start_BTD, lo, hi, positions_BT, carry[1], prepared)

        if lo < hi:
            carry = (x_BTD if kept_BTD is None else kept_BTD), cache
            condition = runs(lo, hi)
            if condition is True:
                x_BTD, cache = run(carry)
            else:
                x_BTD, cache = run_if(guard_of_layers(lo, hi), condition, run, carry)
        reached.append(x_BTD)
    return reached, cache


def draft_states(
    model: DecoderModel,
    exits: Sequence[int],
    states: Sequence[Float[Array, "B T D"]],
    positions_BT: Int[Array, "B T"],
    cache: Cache,
) -> tuple[list[Float[Array, "B T D"]], Cache]:
    """What each exit drafts from, and the cache. states: after the exits."""
    found = []
    for exit_layer, x_BTD in zip(exits, states, strict=False):
        x_BTD, cache = draft_state(model, exit_layer, x_BTD, positions_BT, cache)
        found.append(x_BTD)
    return found, cache
