"""Layers between exits, each segment of them under a guard."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int

from lsjax.decoding.draft import Places
from lsjax.decoding.guards import run_if
from lsjax.decoding.scopes import guard_of_exit, guard_of_layers
from lsjax.model.protocol import (
    Cache,
    DecoderModel,
    draft_state,
    has_draft_state,
    run_layers,
)


class Segment(NamedTuple):
    """Layers lo..hi-1, and when they run. If they do not, the states after them are `kept_BTD`, by
    default those before them."""

    lo: int
    hi: int
    runs: Bool[Array, ""] | bool  # True needs no guard
    kept_BTD: Float[Array, "B T D"] | None = None


def run_segments(
    model: DecoderModel,
    segments: Sequence[Segment],
    x_BTD: Float[Array, "B T D"],
    places: Places,
    cache: Cache,
) -> tuple[list[Float[Array, "B T D"]], Cache]:
    """Runs segments that follow each other. Returns the states after each, and the cache."""
    reached = []
    for lo, hi, runs, kept_BTD in segments:
        start_BTD = x_BTD

        def run(carry, lo=lo, hi=hi, start_BTD=start_BTD):
            _, cache = carry
            return run_layers(model, start_BTD, lo, hi, places.positions_BT, cache, places.prepared)

        carry = (x_BTD if kept_BTD is None else kept_BTD), cache
        if runs is True:
            x_BTD, cache = run(carry)
        else:
            x_BTD, cache = run_if(guard_of_layers(lo, hi), runs, run, carry)
        reached.append(x_BTD)
    return reached, cache


def chosen_state(
    model: DecoderModel,
    exits: Sequence[int],
    exit_layer: Int[Array, ""],
    states: Sequence[Float[Array, "B T D"]],
    positions_BT: Int[Array, "B T"],
    cache: Cache,
) -> tuple[Float[Array, "B T D"], Cache]:
    """What the chosen exit drafts from, and the cache. states: after the exits; those after the
    chosen one are equal to its own."""
    carry = states[-1], cache
    for own, x_BTD in zip(exits if has_draft_state(model) else (), states, strict=False):

        def run(carry, own=own, x_BTD=x_BTD):
            _, cache = carry
            return draft_state(model, own, x_BTD, positions_BT, cache)

        carry = run_if(guard_of_exit(own), exit_layer == own, run, carry)
    return carry


def draft_states(
    model: DecoderModel,
    exits: Sequence[int],
    states: Sequence[Float[Array, "B T D"]],
    positions_BT: Int[Array, "B T"],
    cache: Cache,
) -> tuple[list[Float[Array, "B T D"]], Cache]:
    """What every exit drafts from, and the cache. states: after the exits."""
    found = []
    for exit_layer, x_BTD in zip(exits, states, strict=False):
        x_BTD, cache = draft_state(model, exit_layer, x_BTD, positions_BT, cache)
        found.append(x_BTD)
    return found, cache
