"""Speed of the data pipeline: first start, later start, resuming a checkpoint, and the stream.

    python benchmarks/data_pipeline.py
    python benchmarks/data_pipeline.py --data.tokenizer models/smollm2 --seq-len 2048

The first start reads, trains the vocabulary and tokenizes, with an empty cache. The stream is
measured twice. First, batches follow one another at once. Then the loop is busy for --step-ms
between batches, and its waiting time counts. Results are medians of --repeats turns.
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from lsjax.cli.setup import one_line_errors
from lsjax.config import DataConfig
from lsjax.data.pipeline import Pipeline, packed_rows
from lsjax.data.vocabulary import make_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Speed of the data pipeline."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    batch_size: int = 16
    seq_len: int = 512
    batches: int = 200
    """Batches per turn."""
    step_ms: float = 20.0
    """Length of a training step that leaves the CPU idle."""
    repeats: int = 3
    """Number of turns."""


def main(arguments: Arguments) -> None:
    """Measures and prints."""
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory() as folder, one_line_errors():
        seconds, pipeline = timed(lambda: start(arguments, Path(folder)))
        console.print(pipeline.rows.describe())
        console.print(f"first start {seconds:.2f} s")
        again = [timed(lambda: start(arguments, Path(folder)))[0] for _ in range(arguments.repeats)]
        console.print(f"later start {statistics.median(again):.2f} s")

        def go_on() -> None:
            pipeline.restore(pipeline.state() | {"rows_taken": 10**9})
            pipeline.next()

        restores = [timed(go_on)[0] for _ in range(arguments.repeats)]
        console.print(f"first batch after row 10^9 {statistics.median(restores) * 1e3:.1f} ms")
        tokens = arguments.batch_size * arguments.seq_len
        turns = [turn(pipeline, arguments.batches, 0.0) for _ in range(arguments.repeats)]
        rate = tokens * arguments.batches / statistics.median(turns)
        console.print(f"stream {rate / 1e6:.2f} million tokens/s")
        pause = arguments.step_ms / 1e3
        waits = [turn(pipeline, arguments.batches, pause) for _ in range(arguments.repeats)]
        wait = statistics.median(waits) / arguments.batches
        console.print(
            f"wait for a batch of {tokens:,} tokens with steps of {arguments.step_ms:g} ms: "
            f"{wait * 1e3:.2f} ms"
        )


def start(arguments: Arguments, cache: Path) -> Pipeline:
    """Pipeline after its first batch."""
    rows = packed_rows(
        arguments.data,
        make_tokenizer(arguments.data, cache=cache),
        seq_len=arguments.seq_len,
        split="train",
        cache=cache,
    )
    pipeline = Pipeline(rows, batch_size=arguments.batch_size, seed=0)
    pipeline.next()
    return pipeline


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result."""
    begin = time.perf_counter()
    result = function()
    return time.perf_counter() - begin, result


def turn(pipeline: Pipeline, batches: int, pause: float) -> float:
    """Seconds spent in `next` for this many batches, with a pause after each."""
    spent = 0.0
    for _ in range(batches):
        spent += timed(pipeline.next)[0]
        time.sleep(pause)
    return spent


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
