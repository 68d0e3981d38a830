"""Speed of the data pipeline: tokenizing, a later start, resuming a checkpoint, and the stream.

    python benchmarks/data_pipeline.py --data.tokenizer models/SmolLM2-135M-Instruct.Q4_1.gguf
    python benchmarks/data_pipeline.py --documents 50_000_000 --cache build/simulated

Three ways to tokenize take turns: lsjax, lsjax with one thread, and the tokenizer alone with all
cores, which only encodes texts in memory. The stream is measured twice: first, batches follow one
another at once; then the loop is busy for --step-ms between them, and its waiting time counts.

With --documents, the store is simulated. A shard of real rows (50,000 documents of 80 random bytes)
is written as often as needed, 9 MB each. The corpus is files of the right sizes without content,
which a start must not read.
"""

import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console

from lsjax.cli.errors import one_line_errors
from lsjax.config import DataConfig
from lsjax.data import shards
from lsjax.data.packing import pack
from lsjax.data.pipeline import Pipeline, packed_rows
from lsjax.data.sources import document_source
from lsjax.data.token_rows import join, open_job, prepare_directory
from lsjax.data.vocabulary import make_tokenizer
from lsjax.io.files import write_json

OF_A_SHARD, TOKENS = 50_000, 80  # documents of a simulated shard, and tokens of each


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Speed of the data pipeline."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    batch_size: int = 16
    seq_len: int = 2048
    batches: int = 200
    """Batches per turn."""
    step_ms: float = 20.0
    """Length of a training step that leaves the CPU idle."""
    repeats: int = 3
    """Number of turns; the figures are their medians."""
    documents: int | None = None
    """Simulates a store of as many documents."""
    cache: Path | None = None
    """Folder of the store, which is kept; by default a temporary one."""


def main(arguments: Arguments) -> None:
    """Measures and prints."""
    with tempfile.TemporaryDirectory() as folder, one_line_errors():
        cache = arguments.cache or Path(folder)
        if arguments.documents is None:
            tokenizing(arguments)
        else:
            paths = (f"{cache}/corpus/*.jsonl.gz",)
            data = DataConfig(
                source="jsonl", paths=paths, tokenizer="bytes", validation_fraction=0.0
            )
            arguments = dataclasses.replace(arguments, data=data)
            if not (cache / "corpus").is_dir():
                simulate(arguments, cache)
        start(arguments, cache)
        streaming(arguments, cache)


def tokenizing(arguments: Arguments) -> None:
    """Measures three ways to tokenize."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer(arguments.data, cache=Path(folder))
    texts = [document.text for document in document_source(arguments.data).documents()]
    size, cores = sum(len(text.encode()) for text in texts) / 1e6, os.cpu_count() or 1

    def make(threads: int) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        shards.THREADS = threads
        with tempfile.TemporaryDirectory() as folder:
            options = dict(split="train", seq_len=arguments.seq_len, cache=Path(folder))
            packed_rows(arguments.data, tokenizer, **options)

    def encode() -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        tokenizer.encode_batch(texts)

    encode()
    usual = shards.THREADS
    turns = {f"{cores} cores": lambda: make(usual), "one thread": lambda: make(1)}
    turns["the tokenizer alone"] = encode
    repeats = [[timed(run)[0] for run in turns.values()] for _ in range(arguments.repeats)]
    seconds = dict(zip(turns, zip(*repeats, strict=True), strict=True))
    first, *others = seconds
    for name, own in seconds.items():
        rates = [size / one for one in own]
        low, middle, high = min(rates), statistics.median(rates), max(rates)
        print(f"{name}: {middle:.2f} MB/s, {low:.2f} to {high:.2f}")
    for name in others:
        ratios = [two / one for one, two in zip(seconds[first], seconds[name], strict=True)]
        print(f"{first} beside {name}: {statistics.median(ratios):.2f}")


def simulate(arguments: Arguments, cache: Path) -> None:
    """Writes the corpus without content, and a store that says it comes from it."""
    count = arguments.documents // OF_A_SHARD
    (cache / "corpus").mkdir(parents=True)
    for number in range(count):
        with (cache / "corpus" / f"{number:05d}.jsonl.gz").open("wb") as file:
            file.truncate(16_000_000)
    tokenizer = make_tokenizer(arguments.data, cache=cache)
    job = open_job(arguments.data, tokenizer, arguments.seq_len, cache, None)
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 256, OF_A_SHARD * TOKENS).astype(job.dtype)
    starts_N1, every_M = np.arange(OF_A_SHARD + 1) * TOKENS, np.arange(OF_A_SHARD)
    prompts_N = np.zeros(OF_A_SHARD, np.int32)
    records, split = pack(tokens, starts_N1, prompts_N, every_M, arguments.seq_len, arguments.data)
    split |= {"chosen": OF_A_SHARD}
    meta = {"documents": OF_A_SHARD, "train": split, "validation": dict.fromkeys(split, 0)}
    prepare_directory(job)
    for number in range(count):
        (job.directory / f"{number:06d}.train").write_bytes(records)
        write_json(job.meta(number), {"content": f"{number}", **meta})
    join(job, count)


def streaming(arguments: Arguments, cache: Path) -> None:
    """Measures a later start, resuming, and the stream."""
    console, repeats = Console(highlight=False), range(arguments.repeats)
    again = [timed(lambda: start(arguments, cache))[0] for _ in repeats]
    pipeline = start(arguments, cache)
    console.print(pipeline.rows.describe())
    console.print(f"later start, to the first batch {statistics.median(again):.2f} s")

    def go_on() -> None:
        pipeline.restore(pipeline.state() | {"rows_taken": 10**6})
        pipeline.next()

    restores = [timed(go_on)[0] for _ in repeats]
    console.print(f"first batch after row 10^6 {statistics.median(restores) * 1e3:.1f} ms")
    tokens = arguments.batch_size * arguments.seq_len
    turns = [turn(pipeline, arguments.batches, 0.0) for _ in repeats]
    rate = tokens * arguments.batches / statistics.median(turns)
    console.print(f"stream {rate / 1e6:.2f} million tokens/s")
    waits = [turn(pipeline, arguments.batches, arguments.step_ms / 1e3) for _ in repeats]
    wait = statistics.median(waits) / arguments.batches
    console.print(
        f"wait for a batch of {tokens:,} tokens with steps of {arguments.step_ms:g} ms: "
        f"{wait * 1e3:.2f} ms"
    )
    status = Path("/proc/self/status").read_text().splitlines()
    console.print(next(line for line in status if line.startswith("RssAnon")))


def start(arguments: Arguments, cache: Path) -> Pipeline:
    """Pipeline after its first batch."""
    tokenizer = make_tokenizer(arguments.data, cache=cache)
    options = dict(seq_len=arguments.seq_len, split="train", cache=cache)
    rows = packed_rows(arguments.data, tokenizer, **options)
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
