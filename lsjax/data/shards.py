"""Shards: the rows of one piece of a source, as records on disk (packing.py).

A shard has one file of records for each split, and a JSON file, written last, with what it holds.
So a killed program resumes with the shards that have none. Pieces do not depend on the number of
hosts and processes, and neither do rows.
"""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    as_completed,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from lsjax.config import ConfigError, DataConfig, Path
from lsjax.data.encoding import BATCH, encode_documents, encode_long
from lsjax.data.files import write_json, write_whole
from lsjax.data.packing import TokenStore, pack, to_records
from lsjax.data.pieces import Document, Piece, Source, is_held_out
from lsjax.data.sources import document_source
from lsjax.data.tokenizer import Tokenizer

SPLITS = ("train", "validation")
ROWS = 256  # packed at a time
THREADS = min(4, os.cpu_count() or 1)  # of a process
Shards = list[tuple[int, Piece]]


@dataclass(frozen=True)
class Job:
    """What all shards of a store have in common.

    settings: hash (hex) of what determines the rows, besides the files. seen: for a separate
    validation set, the directory of the training rows, whose documents it loses.
    """

    config: DataConfig
    tokenizer: Tokenizer
    seq_len: int
    directory: Path
    settings: str
    seen: Path | None = None

    @property
    def dtype(self) -> np.dtype:
        """Type of the ids on disk."""
        return np.dtype(np.uint16 if self.tokenizer.vocab_size <= 1 << 16 else np.uint32)

    def meta(self, number: int) -> Path:
        """JSON file of a shard."""
        return self.directory / f"{number:06d}.json"

    def is_made(self, number: int) -> bool:
        """Whether a shard is complete."""
        return self.meta(number).exists()


def make_shard(job: Job, source: Source, number: int, piece: Piece) -> None:
    """Writes the files of a shard."""
    try:
        encoded = list(_encoded(source.in_piece(piece), job))
    except ConfigError:
        for index, begin, _ in piece.ranges:
            if begin:  # read the file from its begin, so that the message has the line's number
                list(source.read(source.files[index], 0, None))
        raise
    ids, prompts, keys = zip(*encoded, strict=True) if encoded else ((), (), ())
    keys_N = np.array(keys, np.uint64)
    store = TokenStore(
        tokens=np.concatenate([np.empty(0, job.dtype), *ids]),
        starts_N1=np.cumsum([0, *map(len, ids)]),
        prompts_N=np.array(prompts, np.int32),
        keys_N=keys_N,
    )
    held_N = is_held_out(keys_N, job.config.held_out_fraction)
    chosen = {"train": ~held_N, "validation": held_N}
    if job.seen is not None:
        chosen = {"validation": ~_are_seen(keys_N, job.seen)}
    meta: dict[str, Any] = {"content": source.content(piece), "documents": len(keys_N)}
    for split, chosen_N in chosen.items():
        rows = pack(store, by_key(keys_N, chosen_N), job.seq_len, job.config)
        batches = (np.arange(at, min(at + ROWS, len(rows))) for at in range(0, len(rows), ROWS))
        records = b"".join(to_records(rows.read(one), job.dtype).tobytes() for one in batches)
        write_whole(job.directory / f"{number:06d}.{split}", records)
        meta[split] = {"rows": len(rows), "chosen": int(chosen_N.sum()), "tokens": rows.num_tokens}
        meta[split] |= {name: getattr(rows, f"num_{name}") for name in LOST}
    if job.config.has_validation_set and job.seen is None:
        write_whole(job.directory / f"{number:06d}.keys", np.unique(keys_N).tobytes())
    write_json(job.meta(number), meta)


LOST = ("documents", "truncated", "dropped")


def _encoded(documents: Iterable[Document], job: Job) -> Iterator[tuple[np.ndarray, int, int]]:
    """Ids, number of prompt tokens and key of each document, encoded in batches."""
    batch: list[Document] = []
    size = 0

    def encode() -> Iterator[tuple[np.ndarray, int, int]]:
        found = encode_documents(batch, job.config, job.tokenizer)
        for document, (ids, prompt) in zip(batch, found, strict=True):
            yield np.array(ids, job.dtype), prompt, document.key

    for document in documents:
        if len(document.text) > BATCH:
            yield from encode()
            batch, size = [], 0
            ids, prompt = encode_long(document, job.config, job.tokenizer)
            yield ids.astype(job.dtype), prompt, document.key
            continue
        batch.append(document)
        size += len(document.prompt) + len(document.text)
        if size > BATCH:
            yield from encode()
            batch, size = [], 0
    yield from encode()


def by_key(
    keys_N: UInt64[np.ndarray, "N"], chosen_N: Bool[np.ndarray, "N"]
) -> Int64[np.ndarray, "M"]:
    """Numbers of the chosen documents, in the order of their keys, which is effectively random."""
    numbers = np.flatnonzero(chosen_N)
    return numbers[np.argsort(keys_N[numbers], kind="stable")]


def _are_seen(keys_N: UInt64[np.ndarray, "N"], seen: Path) -> Bool[np.ndarray, "N"]:
    """Whether documents with these keys are in the training rows."""
    found = np.zeros(len(keys_N), bool)
    for file in sorted(seen.glob("*.keys")):
        found |= np.isin(keys_N, np.frombuffer(file.read_bytes(), np.uint64))
    return found


def make_shards(
    job: Job,
    source: Source,
    pieces: Sequence[Piece],
    numbers: Sequence[int],
    workers: int,
    on_made: Callable[[int], None],
) -> None:
    """Makes the shards with these numbers in several processes, of which this is one.

    on_made: called after each. Raises ConfigError or TokenizerError for bad data, and if a process
    is killed.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the threads are here
    others = min(workers, -(-len(numbers) // THREADS)) - 1
    if others <= 0:
        with ThreadPoolExecutor(THREADS) as threads:
            made = {threads.submit(make_shard, job, source, n, pieces[n]): n for n in numbers}
            try:
                for future in as_completed(made):
                    future.result()
                    on_made(made[future])
            finally:
                threads.shutdown(cancel_futures=True)
        return
    pool = ProcessPoolExecutor(others, get_context("spawn"), _start, (job, os.getpid()))
    left: deque[Shards] = deque(
        [(number, pieces[number]) for number in numbers[at : at + THREADS]]
        for at in range(0, len(numbers), THREADS)
    )
    given: dict[Future, Shards] = {}

    def give() -> None:
        """Some shards more than the others are busy with: what they have can't be taken back."""
        with _another_main():
            while left and len(given) <= others:
                given[pool.submit(_make, left[0])] = left.popleft()

    def take(done: Iterable[Future]) -> None:
        for future in list(done):
            some = given.pop(future)
            future.result()
            for number, _ in some:
                on_made(number)

    try:
        give()
        while left:
            some = left.pop()
            make_together(job, source, some)
            for number, _ in some:
                on_made(number)
            take(future for future in given if future.done())
            give()
        while given:
            take(wait(given, return_when=FIRST_COMPLETED).done)
    except BrokenProcessPool:
        raise ConfigError(
            "a process that tokenizes was killed, perhaps because memory ran out: start again to "
            "resume, with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _another_main() -> Iterator[None]:
    """New processes import the main module first. Theirs is an empty one, because importing JAX
    takes longer than many texts."""
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


_jobs: list[tuple[Job, Source]] = []  # of a process that tokenizes


def _start(job: Job, parent: int) -> None:
    """Begins a process that tokenizes, and ends with its parent."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    _jobs.append((job, document_source(job.config, validation=job.seen is not None)))


def _make(some: Shards) -> None:
    make_together(*_jobs[0], some)


def make_together(job: Job, source: Source, some: Shards) -> None:
    """Makes a few shards in threads: tokenizers release Python's lock, and packing takes a tenth of
    the time."""
    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(lambda one: make_shard(job, source, *one), some))
