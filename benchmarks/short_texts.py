"""The layers of a small model on a short text: its cache read whole, or in blocks that are copied.

    python benchmarks/short_texts.py
    python benchmarks/short_texts.py --width 576 --num-layers 8

One row, float32, random weights in the proportions of a small Llama; milliseconds for all
layers on T positions behind the length, both ways in turns. docs/performance.md has what follows.
"""

from dataclasses import dataclass
from unittest.mock import patch

import jax.numpy as jnp
import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table

from lsjax.cli.setup import exact_products
from lsjax.config import LlamaConfig
from lsjax.decoding.calibration import compiled_loop, median_seconds
from lsjax.model.attention import reads_all
from lsjax.model.cache import KVCache
from lsjax.model.llama import Llama

CACHES = ((272, 100), (528, 100), (528, 400), (1040, 400), (1040, 700))  # slots, and how many used


@dataclass(frozen=True)
class Arguments:
    """The layers of a small model on a short text."""

    positions: tuple[int, ...] = (1, 6)
    """Positions T that pass at once."""
    width: int = 128
    """D of the model, a multiple of 32."""
    num_layers: int = 24
    """Layers."""


def main(arguments: Arguments) -> None:
    """Measures and prints the table."""
    exact_products()
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=arguments.width,
        intermediate_size=arguments.width * 11 // 4,
        num_layers=arguments.num_layers,
        num_heads=arguments.width // 32,
        num_kv_heads=arguments.width // 32,
        head_dim=32,
        max_context=2048,
    )
    model = Llama(config, rngs=nnx.Rngs(0))
    cells = [(t, cache) for t in arguments.positions for cache in CACHES]
    loops = [
        layers_loop(model, t, *cache, blocks=blocks)
        for t, cache in cells
        for blocks in (True, False)
    ]
    seconds = iter(median_seconds(loops))
    table = Table("positions", "slots", "in use", "in blocks, ms", "lsjax, ms")
    for t, (slots, used) in cells:
        table.add_row(*map(str, (t, slots, used)), *(f"{next(seconds) * 1e3:.2f}" for _ in "ab"))
    Console(width=100).print(table)


def layers_loop(model: Llama, steps: int, slots: int, used: int, *, blocks: bool):
    """All layers on `steps` positions behind `used` tokens."""
    config = model.config
    start_BTD = jnp.ones((1, steps, config.hidden_size))
    positions_BT = used + jnp.arange(steps)[None]

    def body(model, carry):
        x_BTD, cache, positions_BT = carry
        # What comes in depends on what came out, or the compiler would run the layers once.
        x_BTD = start_BTD + 1e-6 * x_BTD
        x_BTD, cache = model.run_layers(x_BTD, 0, config.num_layers, positions_BT, cache)
        return x_BTD, cache, positions_BT

    cache = KVCache.create(config, 1, slots, jnp.float32)
    choice = (lambda last, capacity: last < 0) if blocks else reads_all
    with patch("lsjax.model.attention.reads_all", choice):
        return compiled_loop(model, body, (start_BTD, cache, positions_BT))


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
