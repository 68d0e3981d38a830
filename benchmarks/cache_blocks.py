"""Ways to read the cache in attention, by the length in use.

    python benchmarks/cache_blocks.py

Attention alone, of SmolLM2-135M's shape (30 layers, 3 K/V heads that serve 3 queries each),
float32; milliseconds for all layers, the ways in turns. "copy": a block of the cache is sliced and
multiplied; "computed": the slice is scaled or masked on the way, as lsjax.model.attention does;
"turned": keys are kept [H, S]; "whole": no blocks, all slots of the capacity. Then the write of
one position into the caches of all layers, by batch: a slice update a row, or one scatter.
"""

from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import jax
import jax.numpy as jnp
import tyro
from jax import lax
from rich.console import Console
from rich.table import Table

from lsjax.cli.setup import exact_products
from lsjax.config import LlamaConfig
from lsjax.decoding.calibration import compiled_loop, median_seconds
from lsjax.model.attention import cached_attention
from lsjax.model.cache import write_slots

CAPACITY = 8192


@dataclass(frozen=True)
class Arguments:
    """Ways to read the cache in attention."""

    lengths: tuple[int, ...] = (200, 2000, 7900)
    """Tokens in the cache."""
    queries: int = 1
    """Positions T that attend at once."""


def blocks(q_KRH, k, v_KSH, last, *, size: int, computed: bool = False, turned: bool = False):
    """Attention to slots 0..last in blocks of `size`, without any further mask."""
    axis = 2 if turned else 1

    def step(index, carry):
        top, total, mixed = carry
        slots = index * size + jnp.arange(size)
        keys = lax.dynamic_slice_in_dim(k, index * size, size, axis=axis)
        values = lax.dynamic_slice_in_dim(v_KSH, index * size, size, axis=1)
        if computed:
            keys = keys * 0.125
            values = jnp.where((slots <= last)[:, None], values, 0)
        scores = jnp.einsum("KRH,KHS->KRS" if turned else "KRH,KSH->KRS", q_KRH, keys)
        scores = jnp.where(slots <= last, scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.exp(scores - new_top[..., None])
        shrink = jnp.exp(top - new_top)
        mixed = mixed * shrink[..., None] + jnp.einsum("KRS,KSH->KRH", weights, values)
        return new_top, total * shrink + weights.sum(-1), mixed

    shape = q_KRH.shape
    start = (jnp.full(shape[:2], -jnp.inf), jnp.zeros(shape[:2]), jnp.zeros(shape))
    _, total, mixed = lax.fori_loop(0, last // size + 1, step, start)
    return mixed / total[..., None]


def ours(q_KRH, k_KSH, v_KSH, last):
    """lsjax.model.attention.cached_attention."""
    kv_heads, rows, size = q_KRH.shape
    q_BTNH = q_KRH.reshape(1, rows // 3, 3 * kv_heads, size)
    positions_BT = jnp.broadcast_to(last, (1, rows // 3))
    return cached_attention(q_BTNH, k_KSH[None], v_KSH[None], positions_BT).reshape(q_KRH.shape)


WAYS = {
    "copy, 256": partial(blocks, size=256),
    "copy, 1024": partial(blocks, size=1024),
    "copy, 1024, turned": partial(blocks, size=1024, turned=True),
    "computed, 256": partial(blocks, size=256, computed=True),
    "computed, 1024": partial(blocks, size=1024, computed=True),
    "computed, 1024, turned": partial(blocks, size=1024, computed=True, turned=True),
    "computed, 2048": partial(blocks, size=2048, computed=True),
    "whole": partial(blocks, size=CAPACITY),
    "lsjax": ours,
}


def main(arguments: Arguments) -> None:
    """Measures and prints the table."""
    exact_products()
    config = LlamaConfig.smollm2_135m()
    shape = (config.num_kv_heads, CAPACITY, config.head_dim)
    keys = jax.random.split(jax.random.key(0), config.num_layers)
    k = [jax.random.normal(key, shape) for key in keys]
    turned = [jnp.asarray(x.swapaxes(1, 2)).copy() for x in k]
    v = [x + 1 for x in k]
    q_KRH = jnp.ones((shape[0], 3 * arguments.queries, shape[2]))

    def body(way):
        def run(caches, carry):
            q_KRH, last = carry
            for keys, values in zip(*caches, strict=True):
                q_KRH = q_KRH + 1e-3 * way(q_KRH, keys, values, last)
            return q_KRH, last

        return run

    cells = [(name, length) for name in WAYS for length in arguments.lengths]
    loops = [
        compiled_loop(
            (turned if "turned" in name else k, v), body(WAYS[name]), (q_KRH, jnp.int32(n - 1))
        )
        for name, n in cells
    ]
    seconds = iter(median_seconds(loops))
    table = Table("ms", *(f"{length} tokens" for length in arguments.lengths))
    for name in WAYS:
        table.add_row(name, *(f"{next(seconds) * 1e3:.1f}" for _ in arguments.lengths))
    Console(width=100).print(table)

    batches = (1, 4, 8, 16)
    loops = [writes_loop(config, batch, slices) for slices in (True, False) for batch in batches]
    seconds = iter(median_seconds(loops))
    table = Table("ms", *(f"batch {batch}" for batch in batches))
    for name in ("a slice a row", "one scatter"):
        table.add_row(name, *(f"{next(seconds) * 1e3:.2f}" for _ in batches))
    Console(width=100).print(table)
    print(f"{arguments.queries} queries, capacity {CAPACITY}, jax {jax.__version__}")


def writes_loop(config: LlamaConfig, batch: int, slices: bool):
    """Writes of one position of every row, in all layers' keys and values."""
    shape = (batch, config.num_kv_heads, 1024, config.head_dim)
    caches = [jnp.zeros(shape) for _ in range(2 * config.num_layers)]
    new_BTKH = jnp.ones((batch, 1, config.num_kv_heads, config.head_dim))

    def body(new_BTKH, carry):
        caches, start_B = carry
        with patch("lsjax.model.cache.MAX_UNROLLED_ROWS", batch if slices else 0):
            caches = [write_slots(cache, new_BTKH, start_B) for cache in caches]
        return caches, (start_B + 1) % 1024

    return compiled_loop(new_BTKH, body, (caches, jnp.arange(batch, dtype=jnp.int32)))


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
