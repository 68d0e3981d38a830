"""Rows of tokens of a source: made once by many processes, cached, and read by random access.

Each store is a directory of the cache, named by a hash of everything but the contents of the files
that determines the rows. shards.py describes its shards. index.json, written last, joins them:

    files      name, size and time of the last change of each file, as they were read
    contents   hash of the bytes that each shard comes from
    train      rows of each shard, and counts of documents and tokens; likewise validation

A later start compares the files' names, sizes and times, and reads contents only where they differ.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from jaxtyping import Int64
from rich.progress import Progress

from lsjax.config import AnyPath, ConfigError, DataConfig, check
from lsjax.data.packing import PackedBatch, from_records, record_type
from lsjax.data.records import Records
from lsjax.data.shards import SPLITS, THREADS, Job, make_shards
from lsjax.data.sources import document_source
from lsjax.data.tokenizer import Tokenizer
from lsjax.io.files import read_json, remove_directory, write_json
from lsjax.terminal import SafeConsole

log = logging.getLogger(__name__)

FORMAT = 4  # raise it if the code makes other rows from the same text, or other files
WORTH = 50_000_000  # bytes that another process begins for, which takes seconds
INDEX, FILES = "index.json", "files.json"
INDEX_NAMES = ("splits", "contents", "documents")  # that are read here


@dataclass(frozen=True)
class Share:
    """The part of the work of one host: the shards index, index + count, ..."""

    index: int = 0
    count: int = 1
    # Returns once all hosts have called it; the argument names the occasion.
    wait: Callable[[str], Any] = lambda what: None
    alone: bool = False  # other hosts run at other times, and their shards are left to them


ALONE = Share()


class ShardsMissing(ConfigError):
    """Shards that other hosts have not made yet."""


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Rows of one split.

    rows_S: number of rows of each shard. num_documents, num_truncated, num_dropped: documents in
    the rows, those of them that were truncated, and dropped. num_shared: validation documents also
    in training, left out. fingerprint: hash (hex) of all that determines the rows.
    """

    directory: AnyPath
    split: str
    seq_len: int
    dtype: np.dtype
    rows_S: Int64[np.ndarray, "S"]
    fingerprint: str
    num_tokens: int
    num_all: int  # documents of all splits
    num_documents: int
    num_truncated: int = 0
    num_dropped: int = 0
    num_shared: int = 0

    def __len__(self) -> int:
        return len(self._records)

    @cached_property
    def _records(self) -> Records:
        layout = record_type(self.seq_len, self.dtype)
        return Records(self.directory, self.split, layout, self.rows_S)

    def describe(self) -> str:
        """One line: documents, tokens, rows, share that is filled, and documents lost."""
        full = self.num_tokens / (len(self) * self.seq_len)
        text = f"{self.num_documents:,} documents, {self.num_tokens:,} tokens, "
        text += f"{len(self):,} rows of {self.seq_len:,}, {full:.1%} full"
        lost = {"truncated": self.num_truncated, "dropped": self.num_dropped}
        lost["left out, as they are also in the training data"] = self.num_shared
        return text + "".join(f", {number:,} {why}" for why, number in lost.items() if number)

    def read(self, rows: np.ndarray) -> PackedBatch:
        """Reads rows by number, as int32; number -1 is a row of padding."""
        return from_records(self._records.read(rows))


def open_job(
    config: DataConfig, tokenizer: Tokenizer, seq_len: int, cache: AnyPath, seen: TokenRows | None
) -> Job:
    """The job of a store, in the directory that its settings and the sizes of its files name."""
    source = document_source(config, validation=seen is not None)
    settings = [
        *(FORMAT, seq_len, seen and seen.fingerprint, source.part, source.limit),
        *(tokenizer.fingerprint, tokenizer.add_bos, tokenizer.bos_id, tokenizer.eos_ids[:1]),
        *(tokenizer.vocab_size, config.append_end, config.allow_special, config.packing),
        *(config.source, config.separator, config.long_documents, config.train_on_prompt),
        *(config.text_template, config.prompt_template, config.response_template),
        *(config.held_out_fraction, config.ids_field),
    ]
    sizes = [size for _, size, _ in source.stats()]
    directory = cache / "tokens" / _hash([settings, sizes])[:32]
    told = _hash(settings), seen and seen.directory
    return Job(config, tokenizer, seq_len, source, directory, *told)


def stored_rows(job: Job, split: str, share: Share, workers: int | None) -> TokenRows:
    """The rows of a split; makes the store's missing shards first."""
    if share.index == 0:
        prepare_directory(job)
    share.wait("old tokens are removed")
    if not (job.directory / INDEX).exists():
        make_missing(job, share, workers)
    index = read_json(job.directory / INDEX, ConfigError, INDEX_NAMES)
    own = index["splits"][split]
    return TokenRows(
        directory=job.directory,
        split=split,
        seq_len=job.seq_len,
        dtype=job.dtype,
        rows_S=np.array(own["rows"], np.int64),
        fingerprint=_hash([job.settings, split, index["contents"]])[:16],
        num_all=index["documents"],
        num_shared=index["documents"] - own["chosen"] if job.seen else 0,
        **{f"num_{name}": own[name] for name in ("tokens", "documents", "truncated", "dropped")},
    )


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def prepare_directory(job: Job) -> None:
    """Creates the directory, or empties it if its shards come from files that have changed."""
    directory, source = job.directory, job.source
    files, index = directory / FILES, directory / INDEX
    now = {"files": [list(stat) for stat in source.stats()]}
    before = read_json(files, ConfigError) if files.exists() else None
    if before == now:
        return
    if before is not None:
        contents = [source.content(piece) for piece in source.pieces()] if index.exists() else []
        if not index.exists() or read_json(index, ConfigError, INDEX_NAMES)["contents"] != contents:
            remove_directory(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(files, now)


def make_missing(job: Job, share: Share, workers: int | None) -> None:
    """Makes this host's shards that are missing, and waits for the other hosts. On a disk that they
    do not share, then makes theirs too. Joins all shards. Raises ShardsMissing if `share.alone`
    leaves some to other hosts."""
    for warning in job.source.warnings if share.index == 0 else ():
        log.warning("%s", warning)
    pieces = job.source.pieces()
    every = range(len(pieces))
    for mine in [every[share.index :: share.count]] + [every] * (not share.alone):
        missing = [(n, pieces[n]) for n in mine if not job.meta(n).exists()]
        notes = SafeConsole(stderr=True)
        with Progress(console=notes, transient=True, disable=not notes.is_terminal) as progress:
            size = sum(end - begin for _, piece in missing for _, begin, end in piece.ranges)
            most = min((os.cpu_count() or 1) // THREADS, size // WORTH)
            task = progress.add_task(f"tokens of {job.source.name}", total=len(missing))
            make_shards(job, missing, workers or max(1, most), partial(progress.advance, task))
        share.wait("shards of tokens are made")
    if left := sum(not job.meta(number).exists() for number in every):
        raise ShardsMissing(
            f"{left} of {len(pieces)} shards are missing: run the other parts of --shard"
        )
    if share.index == 0:
        join(job, len(pieces))
    share.wait("the index of tokens is made")
    if not (job.directory / INDEX).exists():  # hosts do not share this disk
        join(job, len(pieces))


def join(job: Job, shards: int) -> None:
    """Writes the index of shards that are all made. Raises ConfigError if there is no document."""
    metas = [read_json(job.meta(n), ConfigError, ("documents",)) for n in range(shards)]
    documents = sum(meta["documents"] for meta in metas)
    name = job.source.name
    check(documents > 0, f"{name} holds no text: every document is empty, check its files")
    splits = {}
    for split in [split for split in SPLITS if split in metas[0]]:
        own = [meta[split] for meta in metas]
        splits[split] = {name: sum(one[name] for one in own) for name in own[0]}
        splits[split]["rows"] = [one["rows"] for one in own]
    contents = [meta["content"] for meta in metas]
    index = {"documents": documents, "contents": contents, "splits": splits}
    write_json(job.directory / INDEX, index)
