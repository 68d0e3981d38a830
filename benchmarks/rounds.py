"""Cost of the parts of a round, and of longer texts, measured without decoding a text.

    python benchmarks/rounds.py models/smollm2

Every number comes from a loop on the device that repeats one operation at a fixed position. Loops
run in turns. The first table compares a round of self-speculation with its draft plus verification,
each compiled separately. Its last column compares a round in one program for all exits and lengths.
The second table has autoregressive rounds at several lengths and capacities. It compares them with
a prediction from the first row and the bytes of weights, keys and values.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro

import lsjax
from lsjax.cli.setup import exact_products, keep_compiled_programs
from lsjax.cli.show import table, wide_console
from lsjax.decoding.cost import (
    LENGTH,
    Loop,
    draft_loop,
    median_seconds,
    memory_bandwidth,
    rounds_loop,
    weight_bytes,
)
from lsjax.decoding.draft import Draft
from lsjax.decoding.self_speculative import SelfSpeculative, in_one_program


def verify_loop(model: lsjax.Llama, strategy: SelfSpeculative) -> Loop:
    """Loop of verifications of full drafts."""
    steps = 1 + strategy.num_draft_tokens
    hidden_BTD = jnp.ones((1, steps, model.config.hidden_size), model.dtype)

    def verify(model, state, arguments):
        tokens_BT = jnp.broadcast_to(state.pending_B[:, None], (1, steps))
        count_B = jnp.full(1, strategy.num_draft_tokens, jnp.int32)
        hidden_now_BTD = hidden_BTD + 1e-9 * tokens_BT[..., None]
        hidden = (hidden_now_BTD,) * len(strategy.exits)
        draft = Draft(state, hidden, tokens_BT, count_B, None, None)
        return strategy.rounds.verify(model, draft, arguments)[0]

    return rounds_loop(model, strategy, verify)


@dataclass(frozen=True)
class Arguments:
    """Cost of the parts of a round, and of longer texts."""

    model: tyro.conf.Positional[Path]
    """Hugging Face directory or .gguf file."""
    exit_layers: tuple[int, ...] = (2, 8, 15)
    """Exit layers."""
    num_draft_tokens: tuple[int, ...] = (2, 8, 12)
    """Draft lengths; every exit is tried with every length."""
    lengths: tuple[int, ...] = (200, 2000, 8000)
    """Tokens in the cache."""


def main(arguments: Arguments) -> None:
    """Measures and prints both tables."""
    keep_compiled_programs()
    exact_products()
    llama, console = lsjax.load(arguments.model), wide_console()
    grid = product(arguments.exit_layers, arguments.num_draft_tokens)
    cells = [SelfSpeculative(E, d) for E, d in grid]
    rows = []
    for alone, shared in zip(cells, in_one_program(cells), strict=True):
        loops = [draft_loop(llama, alone), verify_loop(llama, alone)]
        loops += [rounds_loop(llama, strategy) for strategy in (alone, shared)]
        draft, verification, own, one_program = median_seconds(loops)
        rows.append(
            [
                *map(str, (alone.exit_layer, alone.num_draft_tokens)),
                *(f"{1e3 * seconds:.1f}" for seconds in (draft, verification, own)),
                f"{own / (draft + verification):.3f}",
                f"{one_program / own:.3f}",
            ]
        )
    names = ["E", "d", "draft ms", "verification ms", "round ms", "round/sum", "one program"]
    console.print(table("a round", names, rows))

    places = [(length, length + LENGTH + 1) for length in arguments.lengths]
    places.insert(1, (places[0][0], places[-1][1]))
    seconds = median_seconds(
        [rounds_loop(llama, lsjax.Autoregressive(), length=n, capacity=most) for n, most in places]
    )
    config, itemsize = llama.config, llama.dtype.itemsize
    weights, bandwidth = weight_bytes(config, itemsize), memory_bandwidth()
    read = [weights + config.cache_bytes(1, length, itemsize) for length, _ in places]
    rows = [
        [
            *(str(length), str(capacity), f"{second * 1e3:.1f}"),
            *(f"{size / second / 1e9:.1f}", f"{size / second / bandwidth:.0%}"),
            f"{second / (seconds[0] * size / read[0]):.2f}",
        ]
        for (length, capacity), second, size in zip(places, seconds, read, strict=True)
    ]
    names = ["tokens", "slots", "ms", "GB/s", "of the memory's", "over prediction"]
    console.print(table("a token of a longer text", names, rows))
    console.print(f"jax {jax.__version__}, memory {bandwidth / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
