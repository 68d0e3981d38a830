"""Requests through an engine with several rows, beside one by one.

    python benchmarks/batching.py models/smollm2

Requests of different lengths (ends of text ignored), the whole wall time of reading prompts and
decoding. Both engines have all their programs before the clock runs, and take turns.
"""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro
from rich.console import Console

import lsjax
from lsjax.cli.setup import exact_products, keep_compiled_programs
from lsjax.decoding.calibration import memory_bandwidth
from lsjax.decoding.cost import weight_bytes
from lsjax.decoding.request import Request


@dataclass(frozen=True)
class Arguments:
    """Requests through an engine with several rows, beside one by one."""

    model: tyro.conf.Positional[Path]
    """Hugging Face directory or .gguf file."""
    requests: int = 64
    """Their number."""
    batch_size: int = 8
    """Rows."""
    repeats: int = 2
    """Turns of each, after one of eight requests to warm up."""


def main(arguments: Arguments) -> None:
    """Measures and prints."""
    keep_compiled_programs()
    exact_products()
    model = lsjax.load(arguments.model)
    tokenizer = lsjax.load_tokenizer(arguments.model)
    draw = np.random.default_rng(0)
    requests = [
        Request(
            prompt=draw.integers(100, model.config.vocab_size, draw.integers(8, 32)).tolist(),
            max_new_tokens=int(draw.integers(16, 80)),
        )
        for _ in range(arguments.requests)
    ]
    tokens = sum(request.max_new_tokens for request in requests)
    console = Console(highlight=False)
    console.print(f"{len(requests)} requests of 8 to 31 tokens, {tokens} new tokens in all")
    sizes = (1, arguments.batch_size)
    engines = [lsjax.Engine(model, tokenizer, batch_size=n, ignore_end=True) for n in sizes]
    for engine in engines:
        engine.generate(requests[:8])
    programs = [engine.num_programs for engine in engines]
    seconds: list[list[float]] = [[], []]
    for _ in range(arguments.repeats):
        for engine, times in zip(engines, seconds, strict=True):
            begin = time.perf_counter()
            engine.generate(requests)
            times.append(time.perf_counter() - begin)
    assert programs == [engine.num_programs for engine in engines], "something was compiled again"
    alone, together = (tokens / statistics.median(times) for times in seconds)
    bandwidth = memory_bandwidth()
    limit = bandwidth / weight_bytes(model.config, model.dtype.itemsize)
    console.print(
        f"one by one {alone:.1f} tokens/s, {sizes[1]} rows {together:.1f} tokens/s: "
        f"{together / alone:.2f}x"
    )
    console.print(
        f"The memory's {bandwidth / 1e9:.1f} GB/s allow {limit:.1f} passes of the model a second: "
        f"{limit:.1f} tokens/s one by one, {sizes[1] * limit:.1f} with {sizes[1]} rows; "
        f"jax {jax.__version__}"
    )


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
