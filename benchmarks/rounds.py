"""Cost of the parts of a round, and of longer texts, measured without decoding a text.

    python benchmarks/rounds.py models/smollm2

Every number comes from a loop on the device that repeats one operation at a fixed position. Loops
run in turns. The first table compares rounds of self-speculation with the sum of draft and
verification, each compiled separately. The second has autoregressive rounds at several lengths and
capacities. It compares them with a prediction from the bytes of weights, keys and values.
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

import lsjax
from lsjax.cli.setup import exact_products, keep_compiled_programs
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


def verify_loop(model: lsjax.Llama, strategy: SelfSpeculative) -> Loop:
    """Loop of verifications of full drafts."""
    steps = 1 + strategy.num_draft_tokens
    hidden_BTD = jnp.ones((1, steps, model.config.hidden_size), model.dtype)

    def verify(model, state, arguments):
        tokens_BT = jnp.broadcast_to(state.pending_B[:, None], (1, steps))
        count_B = jnp.full(1, strategy.num_draft_tokens, jnp.int32)
        hidden_now_BTD = hidden_BTD + 1e-9 * tokens_BT[..., None]
        draft = Draft(state, hidden_now_BTD, tokens_BT, count_B, None, None)
        return strategy.verify(model, draft, arguments)

    return rounds_loop(model, strategy, verify)


def main(arguments: Arguments) -> None:
    """Measures and prints both tables."""
    keep_compiled_programs()
    exact_products()
    model = lsjax.load(arguments.model)
    console = Console(highlight=False)
    exits, drafts = arguments.exit_layers, arguments.num_draft_tokens
    cells = in_one_program(
        [SelfSpeculative(E, d) for E in sorted({*exits}) for d in sorted({*drafts})]
    )
    table = Table("E", "d", "draft ms", "verification ms", "round ms", "round/sum", "one program")
    for cell in cells:
        alone = SelfSpeculative(cell.exit_layer, cell.num_draft_tokens)
        loops = [draft_loop(model, alone), verify_loop(model, alone)]
        loops += [rounds_loop(model, alone), rounds_loop(model, cell)]
        draft, verification, own, shared = (1e3 * x for x in median_seconds(loops))
        table.add_row(
            *(str(x) for x in (cell.exit_layer, cell.num_draft_tokens)),
            *(f"{x:.1f}" for x in (draft, verification, own)),
            f"{own / (draft + verification):.3f}",
            f"{shared / own:.3f}",
        )
    console.print(table)
    console.print("one program: a round in one program for all exits and lengths, over `round`")

    places = [(length, length + LENGTH + 1) for length in arguments.lengths]
    places.insert(1, (places[0][0], places[-1][1]))
    loops = [
        rounds_loop(model, lsjax.Autoregressive(), length=length, capacity=capacity)
        for length, capacity in places
    ]
    seconds = median_seconds(loops)
    read = [
        weight_bytes(model.config, model.dtype.itemsize)
        + model.config.cache_bytes(1, length, model.dtype.itemsize)
        for length, _ in places
    ]
    bandwidth = memory_bandwidth()
    table = Table("tokens", "slots", "ms", "GB/s", "of the memory's", "over prediction")
    for (length, capacity), second, size in zip(places, seconds, read, strict=True):
        predicted = seconds[0] * size / read[0]
        table.add_row(
            *(str(length), str(capacity), f"{second * 1e3:.1f}"),
            *(f"{size / second / 1e9:.1f}", f"{size / second / bandwidth:.0%}"),
            f"{second / predicted:.2f}",
        )
    console.print(table)
    console.print(f"jax {jax.__version__}, memory {bandwidth / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
