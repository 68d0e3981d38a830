"""Cost of a round, measured without decoding a text.

    python benchmarks/rounds.py models/smollm2

Loops on the device repeat a round at a fixed position, and take turns. Here `auto` always makes one
choice. Its rounds are compared with static ones of this exit and length. The table has medians of
the ratios, with quartiles. Its first row has autoregressive rounds.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax

import lsjax
from lsjax.cli.setup import exact_products, keep_compiled_programs
from lsjax.cli.show import table, wide_console
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.state import DecodeState
from lsjax.decoding.strategy import Strategy

LENGTH = 128  # tokens in the cache
CALL = 0.1  # seconds of a loop: short, so that all loops of a repeat share a slow phase
Loop = Callable[[int], None]  # runs a round this many times, and waits for it


def rounds_loop(model: lsjax.Llama, strategy: Strategy) -> Loop:
    """Rounds of the strategy for a row with LENGTH tokens; each begins at the old length."""
    capacity = 2 * LENGTH + strategy.slack
    start = DecodeState.create(
        [lsjax.Request(prompt=[1] * LENGTH, max_new_tokens=LENGTH)],
        cache=model.new_cache(1, capacity, model.num_layers),
        capacity=capacity,
        learned=strategy.first_guess(1),
    )

    def rounds(model, arguments, state, times):
        def body(_, state):
            done = strategy.round(model, state, arguments)
            return dataclasses.replace(done, length_B=state.length_B, finish_B=state.finish_B)

        return lax.fori_loop(0, times, body, state)

    constants, held = (model, strategy.arguments(model)), [jax.tree.map(jnp.copy, start)]
    program = jax.jit(rounds, donate_argnums=2).lower(*constants, start, np.int32(1)).compile()

    def run(times: int) -> None:
        held[0] = jax.block_until_ready(program(*constants, held[0], np.int32(times)))

    return run


def seconds_of(loops: Sequence[Loop], repeats: int) -> np.ndarray:
    """Seconds [repeats, loops] of a round of each loop; in every repeat the loops take turns."""

    def seconds(loop: Loop, times: int) -> float:
        begin = time.perf_counter()
        loop(times)
        return (time.perf_counter() - begin) / times

    times = [max(1, int(CALL / min(seconds(loop, 2) for _ in range(2)))) for loop in loops]
    pairs = list(zip(loops, times, strict=True))
    return np.array([[seconds(*pair) for pair in pairs] for _ in range(repeats)])


def pinned(choice: tuple[int, int], exits: Sequence[int], lengths: Sequence[int]):
    """`auto` that always takes this exit and length; (0, 0) never drafts."""
    lengths = tuple(sorted({0, *lengths}))
    seconds = ((1 if (E, d) == choice else math.inf for d in lengths) for E in (0, *exits))
    return lsjax.Adaptive(tuple(exits), lengths=lengths, seconds=tuple(map(tuple, seconds)))


@dataclass(frozen=True)
class Arguments:
    """Every exit with every draft length. A repeat takes 0.3 seconds for each."""

    model: tyro.conf.Positional[Path]
    exit_layers: tuple[int, ...] = (8, 15)
    num_draft_tokens: tuple[int, ...] = (6, 15)
    repeats: int = 100


def main(arguments: Arguments) -> None:
    """Measures and prints the table."""
    keep_compiled_programs()
    exact_products()
    exits, lengths = sorted(arguments.exit_layers), sorted(arguments.num_draft_tokens)
    cells, llama, rows = [(0, 0), *product(exits, lengths)], lsjax.load(arguments.model), []
    static = [SelfSpeculative(E or exits[0], d) for E, d in cells]
    for cell, own in zip(cells, static, strict=True):
        own = own if cell[0] else lsjax.Autoregressive()
        each = (own, pinned(cell, exits, lengths))
        seconds = seconds_of([rounds_loop(llama, one) for one in each], arguments.repeats)
        ratios = seconds[:, 1:] / seconds[:, :1]
        words = map("{:.3f} ({:.3f} to {:.3f})".format, *np.quantile(ratios, (0.5, 0.25, 0.75), 0))
        milliseconds = f"{1e3 * np.median(seconds[:, 0]):.2f}"
        rows.append([*(str(n or "-") for n in cell), milliseconds, *words])
    names = ["E", "d", "ms", "auto over it"]
    wide_console().print(table("a round", names, rows))


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
