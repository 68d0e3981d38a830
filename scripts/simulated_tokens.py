"""Measures a start on a large store of tokens that exists: time, memory, stream, resuming.

    python scripts/simulated_tokens.py --directory build/tokens --documents 50_000_000
    python scripts/simulated_tokens.py --directory build/small --documents 5_000_000

A shard of real rows (random tokens, documents of 80) is written as often as the store has shards,
one for each 50,000 documents, which takes 9 MB each. The corpus is files of the right names and
sizes without content: a later start must not read them.
"""

import dataclasses
import statistics
import time
from pathlib import Path

import numpy as np
import tyro

from lsjax.config import DataConfig
from lsjax.data.files import write_json
from lsjax.data.packing import TokenStore, pack
from lsjax.data.pipeline import Pipeline, packed_rows
from lsjax.data.shards import LOST, to_records
from lsjax.data.sources import document_source
from lsjax.data.token_rows import join, open_job, prepare_directory
from lsjax.data.tokenizer_backends import ByteTokenizer

OF_A_SHARD, TOKENS = 50_000, 80  # documents of a shard, and tokens of a document


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measures a start on a large store."""

    directory: Path
    """Folder of corpus and store, reused if it exists."""
    documents: int = 50_000_000
    """Number of documents."""
    seq_len: int = 4096
    batch_size: int = 64
    batches: int = 100
    """Batches in each of five turns of the stream."""


def main(arguments: Arguments) -> None:
    """Makes the store if it is missing, and measures."""
    config = DataConfig(
        source="jsonl",
        paths=(f"{arguments.directory}/corpus/*.jsonl.gz",),
        tokenizer="bytes",
        validation_fraction=0.0,
    )
    if not (arguments.directory / "corpus").is_dir():
        make_store(arguments, config)
    options = dict(seq_len=arguments.seq_len, split="train", cache=arguments.directory)
    begin = time.perf_counter()
    rows = packed_rows(config, ByteTokenizer(), **options)
    pipeline = Pipeline(rows, batch_size=arguments.batch_size, seed=0)
    pipeline.next()
    print(rows.describe())
    print(f"later start, to the first batch: {time.perf_counter() - begin:.2f} s")
    begin = time.perf_counter()
    pipeline.restore(pipeline.state() | {"rows_taken": 10**6})
    pipeline.next()
    print(f"first batch after row 10^6: {time.perf_counter() - begin:.3f} s")
    rates = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(arguments.batches):
            pipeline.next()
        tokens = arguments.batches * arguments.batch_size * arguments.seq_len
        rates.append(tokens / (time.perf_counter() - begin) / 1e6)
    low, high = min(rates), max(rates)
    print(f"stream: {statistics.median(rates):.1f} million tokens/s, {low:.1f} to {high:.1f}")
    status = Path("/proc/self/status").read_text().splitlines()
    print(next(line for line in status if line.startswith("RssAnon")))


def make_store(arguments: Arguments, config: DataConfig) -> None:
    """Writes the corpus without content, and a store that says it comes from it."""
    corpus, shards = arguments.directory / "corpus", arguments.documents // OF_A_SHARD
    corpus.mkdir(parents=True)
    for number in range(shards):
        with (corpus / f"{number:05d}.jsonl.gz").open("wb") as file:
            file.truncate(16_000_000)
    source = document_source(config)
    job = open_job(config, ByteTokenizer(), arguments.seq_len, arguments.directory, source)
    draw = np.random.default_rng(0)
    store = TokenStore(
        tokens=draw.integers(0, 256, OF_A_SHARD * TOKENS).astype(job.dtype),
        starts_N1=np.arange(OF_A_SHARD + 1) * TOKENS,
        prompts_N=np.zeros(OF_A_SHARD, np.int32),
        keys_N=np.arange(OF_A_SHARD, dtype=np.uint64),
    )
    rows = pack(store, np.arange(OF_A_SHARD), arguments.seq_len, config)
    records = to_records(rows.read(np.arange(len(rows))), job.dtype).tobytes()
    split = {"rows": len(rows), "chosen": OF_A_SHARD, "tokens": rows.num_tokens}
    split |= {name: getattr(rows, f"num_{name}") for name in LOST}
    empty = dict.fromkeys(split, 0)
    prepare_directory(job.directory, source)
    for number in range(shards):
        (job.directory / f"{number:06d}.train").write_bytes(records)
        meta = {"content": f"{number}", "documents": OF_A_SHARD}
        write_json(job.meta(number), meta | {"train": split, "validation": empty})
    join(job, source, shards)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
