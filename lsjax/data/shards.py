"""Shards: the rows of one piece of a source, as records on disk (packing.py).

A shard has one file of records for each split, and a JSON file, written last, with what it holds.
So a killed program resumes with the shards that lack a JSON file. Neither pieces nor rows depend on
the number of hosts and processes.

Documents are encoded in batches, and long ones in parts, which bounds the memory that ids take.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import (
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    as_completed,
)
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import chain, islice
from multiprocessing import Pipe, get_context, resource_tracker
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

import numpy as np

from lsjax.config import AnyPath, ConfigError, DataConfig, check
from lsjax.data.packing import pack
from lsjax.data.pieces import Document, Piece, Source, is_held_out
from lsjax.data.sources import document_source
from lsjax.data.tokenizer import Tokenizer, TokenizerError
from lsjax.io.files import write_json, write_whole

SPLITS = ("train", "validation")
THREADS = min(4, os.cpu_count() or 1)  # of a process
BATCH = 1_000_000  # characters that are encoded at a time, which take about 40 bytes each
# SentencePiece rarely joins these with the next character. Its normalizers drop the first.
MARKS = ("\x01", ".", ":", "0", "\u4e00")
Numbered = Sequence[tuple[int, Piece]]  # pieces with the numbers of their shards


@dataclass(frozen=True)
class Job:
    """What all shards of a store have in common."""

    config: DataConfig
    tokenizer: Tokenizer
    seq_len: int
    source: Source | None  # another process opens its own
    directory: AnyPath
    settings: str  # hash (hex) of what determines the rows, besides the files
    # For a separate validation set: directory of the training rows, whose documents it loses.
    seen: AnyPath | None = None

    @property
    def dtype(self) -> np.dtype:
        """Type of the ids on disk."""
        return np.dtype(np.uint16 if self.tokenizer.vocab_size <= 1 << 16 else np.uint32)

    def meta(self, number: int) -> AnyPath:
        """JSON file of a shard; exists once the shard is complete."""
        return self.directory / f"{number:06d}.json"


def make_shard(job: Job, number: int, piece: Piece) -> None:
    """Writes the files of a shard."""
    ids, prompts, keys = [np.empty(0, job.dtype)], [], []
    try:
        for batch in _batches(job.source.in_piece(piece)):
            for one, prompt in encode_documents(batch, job.config, job.tokenizer):
                ids.append(one.astype(job.dtype))
                prompts.append(prompt)
            keys += [document.key for document in batch]
    except ConfigError:
        for index, begin, _ in piece.ranges:
            if begin:  # read the file from its begin, so that the message has the line's number
                list(job.source.read(job.source.files[index], 0, None))
        raise
    # The first of the ids is an empty array, for the type and the first start.
    tokens, starts_N1 = np.concatenate(ids), np.cumsum([len(one) for one in ids])
    prompts_N = np.array(prompts, np.int32)
    keys_N = np.array(keys, np.uint64)
    held_N = is_held_out(keys_N, job.config.held_out_fraction)
    chosen = {"train": ~held_N, "validation": held_N}
    if job.seen is not None:
        new_N = np.ones(len(keys_N), bool)
        for file in job.seen.glob("*.keys"):
            new_N &= ~np.isin(keys_N, np.frombuffer(file.read_bytes(), np.uint64))
        chosen = {"validation": new_N}
    meta: dict[str, Any] = {"content": job.source.content(piece), "documents": len(keys_N)}
    for split, chosen_N in chosen.items():
        documents_M = np.flatnonzero(chosen_N)
        # In the order of their keys, which is effectively random.
        documents_M = documents_M[np.argsort(keys_N[documents_M], kind="stable")]
        records, counts = pack(tokens, starts_N1, prompts_N, documents_M, job.seq_len, job.config)
        write_whole(job.directory / f"{number:06d}.{split}", records)
        meta[split] = counts | {"chosen": len(documents_M)}
    if job.config.has_validation_set and job.seen is None:
        write_whole(job.directory / f"{number:06d}.keys", np.unique(keys_N).tobytes())
    write_json(job.meta(number), meta)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Batches of at most BATCH characters; a longer document is alone."""
    batch: list[Document] = []
    room = BATCH
    for document in documents:
        size = len(document.prompt) + len(document.text)
        if batch and size > room:
            yield batch
            batch, room = [], BATCH
        batch.append(document)
        room -= size
    if batch:
        yield batch


def encode_documents(
    documents: Sequence[Document], config: DataConfig, tokenizer: Tokenizer
) -> list[tuple[np.ndarray, int]]:
    """Token ids of documents, and the number of prompt tokens of each.

    A prompt is encoded separately, as in decoding, and includes a beginning-of-text token. A long
    text is encoded in parts of at most BATCH characters.
    """
    if any(document.ids for document in documents):
        size = tokenizer.vocab_size
        tokens = chain.from_iterable(document.ids for document in documents)
        extra = next((token for token in tokens if not 0 <= token < size), None)
        fix = "set data.tokenizer to the one that made the records"
        check(extra is None, f"token {extra} of a record is not below {size}: {fix}")
        return [(np.array(document.ids), 0) for document in documents]
    special, end = config.allow_special, [*tokenizer.eos_ids[:1]] * config.append_end
    parts = [[*_parts(document.text)] for document in documents]
    heads = [document.prompt or own.pop(0) for document, own in zip(documents, parts, strict=True)]
    tails, found = [*chain(*parts)], []
    # Parts of a long document, which is alone, become arrays at once: lists take 40 bytes a token.
    step = 1 if len(documents) == 1 else max(1, len(tails))
    batches = (tails[at : at + step] for at in range(0, len(tails), step))
    ids = (one for batch in batches for one in _continuations(batch, tokenizer, special))
    rest = (np.array(one, np.uint32) for one in ids)
    encoded = tokenizer.encode_batch(heads, allow_special=special)
    for document, head, own in zip(documents, encoded, parts, strict=True):
        pieces = np.array(head, np.uint32), *islice(rest, len(own)), np.array(end, np.uint32)
        found.append((np.concatenate(pieces), len(head) if document.prompt else 0))
    return found


def _parts(text: str) -> Iterator[str]:
    """The text in parts of at most BATCH characters, at line ends where there are any."""
    begin = 0
    while len(text) - begin > BATCH:
        end = text.rfind("\n", begin, begin + BATCH) + 1 or begin + BATCH
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _continuations(texts: Sequence[str], tokenizer: Tokenizer, special: bool) -> list[list[int]]:
    """Ids of continuations, without the space that SentencePiece puts before a text."""
    if not texts or not tokenizer.leading_spaces:
        return tokenizer.encode_batch(texts, add_bos=False, allow_special=special)
    for mark in MARKS:
        alone = tokenizer.encode(mark, add_bos=False)
        marked = [mark + text for text in texts]
        batch = tokenizer.encode_batch(marked, add_bos=False, allow_special=special)
        split = all(ids[: len(alone)] == alone for ids in batch)
        if tokenizer.decode(alone) == mark and split:
            return [ids[len(alone) :] for ids in batch]
    raise TokenizerError(f"the tokenizer joins {texts[0][:40]!r} with its prompt: use another one")


def make_shards(job: Job, pieces: Numbered, workers: int, on_made: Callable[[int], None]) -> None:
    """Makes the shards of these pieces in several processes, or in threads of this one.

    on_made: called with the number of shards that are newly made. Raises ConfigError or
    TokenizerError for bad data, and if a process is killed.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the threads are here
    parts = [pieces[at : at + THREADS] for at in range(0, len(pieces), THREADS)]
    pool: Executor = ThreadPoolExecutor(THREADS)
    workers, here, wait = min(workers, len(parts)), job, True
    until, alive = Pipe(duplex=False)  # only this process holds `alive`
    if workers > 1:
        told, here = (replace(job, source=None), until), None
        pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, told)
    else:
        parts = [[piece] for piece in pieces]
    # New processes import the main module first. Theirs is an empty one, because importing JAX
    # takes longer than many texts.
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        with ThreadPoolExecutor(1) as starter:
            made = starter.submit(_submit, pool, here, parts).result()
        for future in as_completed(made):
            future.result()
            on_made(len(made[future]))
    except BrokenProcessPool:
        raise ConfigError(
            "a process that tokenizes was killed, perhaps because memory ran out: start again to "
            "resume, with fewer --workers"
        ) from None
    except (KeyboardInterrupt, SystemExit):
        alive.close()
        wait = workers > 1  # threads would finish their pieces
        raise
    finally:
        sys.modules["__main__"] = main
        pool.shutdown(wait, cancel_futures=True)


def _submit(pool: Executor, job: Job | None, parts: Sequence[Numbered]) -> dict[Future, Numbered]:
    """Submits the parts, for which the pool starts its processes. In a thread of its own, whose
    mask they inherit: Ctrl-C does not reach them. No signal interrupts a thread in their start."""
    if job is None:
        resource_tracker.ensure_running()  # resets the mask if it starts
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    return {pool.submit(_make, job, part): part for part in parts}


_jobs: list[Job] = []  # of a process that tokenizes


def _start(job: Job, until: Connection) -> None:
    """Begins a process that tokenizes. It ends when the other end of `until` is closed, at the
    latest with the process that holds it."""

    def watch() -> None:
        until.poll(None)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    source = document_source(job.config, validation=job.seen is not None)
    _jobs.append(replace(job, source=source))


def _make(job: Job | None, pieces: Numbered) -> None:
    """Makes shards of the job, or of this process's, in threads: encoding releases the lock."""
    own = job or _jobs[0]
    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(lambda piece: make_shard(own, *piece), pieces))
