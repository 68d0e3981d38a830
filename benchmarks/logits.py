"""Milliseconds of the head's logits, by the number of rows: as tuned, and as one matmul.

    python benchmarks/logits.py

The head is random, and has SmolLM2's shape by default. The time includes the search for the
largest logit. Both kinds take turns, and the medians are printed.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import tyro
from jax import lax

from lsjax.cli.setup import exact_products
from lsjax.cli.show import table, wide_console
from lsjax.config import Kernels
from lsjax.decoding.sampling import argmax
from lsjax.kernels.matmuls import with_table
from lsjax.platforms import with_kernels

TIMES = 10  # products of a call


@dataclass(frozen=True)
class Arguments:
    """The shape of the head, and the numbers of rows."""

    rows: tuple[int, ...] = (1, 2, 3, 4, 5, 8)
    """Rows that pass at once."""
    width: int = 576
    """D of the model."""
    vocab_size: int = 49_152
    """V of the model."""
    repeats: int = 11
    """Timed calls of each kind and number of rows."""


def main(arguments: Arguments) -> None:
    """Measures and prints the table."""
    exact_products()
    shape = arguments.vocab_size, arguments.width
    table_VD = jax.random.normal(jax.random.key(0), shape)
    kinds: tuple[Kernels, ...] = ("auto", "reference")
    loops = {
        (rows, kernels): loop(jnp.ones((rows, arguments.width)), table_VD, kernels)
        for rows in arguments.rows
        for kernels in kinds
    }
    found: dict[tuple[int, Kernels], list[float]] = {key: [] for key in loops}
    for _ in range(arguments.repeats):
        for key, run in loops.items():
            begin = time.perf_counter()
            run()
            found[key].append(1e3 * (time.perf_counter() - begin) / TIMES)
    milliseconds = {key: statistics.median(each) for key, each in found.items()}
    lines = [
        (f"{rows}", *(f"{milliseconds[rows, kernels]:.2f}" for kernels in kinds))
        for rows in arguments.rows
    ]
    wide_console().print(table("milliseconds", ("rows", "tuned", "a matmul"), lines))


def loop(x_RD: jax.Array, table_VD: jax.Array, kernels: Kernels) -> Callable[[], None]:
    """Computes logits TIMES in a row. Each product needs the largest logits of the one before."""

    def run(x_RD, table_VD):
        def once(_, x_RD):
            token_R = argmax(with_table(x_RD, table_VD))
            return x_RD + 1e-9 * token_R[:, None]

        return lax.fori_loop(0, TIMES, once, x_RD)

    with with_kernels(kernels):
        program = jax.jit(run).lower(x_RD, table_VD).compile()
    jax.block_until_ready(program(x_RD, table_VD))
    return lambda: jax.block_until_ready(program(x_RD, table_VD))


if __name__ == "__main__":
    main(tyro.cli(Arguments))
