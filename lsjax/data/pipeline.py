"""One stream of rows, shuffled anew each epoch, of which each host reads its own.

The stream is a function of the data and the seed: its order does not depend on the batch size nor
on the number of hosts, and it goes on across the ends of epochs. So its whole state is the number
of rows that were taken, and going on from there costs nothing.

        the stream:       r0 r1 r2 r3 | r4 r5 r6 r7 | ...      batches of 4
        a host's [0, 1]:  r0 r1       | r4 r5       | ...
        another's [2, 3]:       r2 r3 |       r6 r7 | ...
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import grain
import numpy as np

from lsjax.config import DataConfig, check
from lsjax.data.batch import Batch
from lsjax.data.packing import Rows, pack
from lsjax.data.splits import check_split, choose, held_out
from lsjax.data.token_store import token_store
from lsjax.data.tokenizer import Tokenizer

Own = Sequence[int] | np.ndarray | None
PREFETCH = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


class Pipeline:
    """Batches without end, for one host.

    Args:
      rows: what the stream is made of.
      batch_size: rows of all hosts together.
      seed: of the order, 0 <= seed < 2^32.
      own_B: numbers of this host's rows in each batch, which `next` gives; all by default. Hosts
        that share rows have the same.
    """

    def __init__(self, rows: Rows, *, batch_size: int, seed: int, own_B: Own = None):
        check(0 <= seed < 1 << 32, f"seed {seed} must be at least 0 and below 2^32")
        self.rows = rows
        self._batch_size, self._seed = batch_size, seed
        self._own_B = check_own(batch_size, own_B)
        self._order = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat()
        self._taken = 0
        self._start()

    def next(self) -> Batch:
        """The next rows of this host, [rows of its own, T]."""
        batch = next(self._batches)
        self._taken += self._batch_size
        return batch

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self._taken / len(self.rows)

    def state(self) -> dict:
        """Where the stream is, for JSON; the same on all hosts after the same number of batches."""
        return {
            "rows_taken": self._taken,
            "seed": self._seed,
            "seq_len": self.rows.seq_len,
            "num_rows": len(self.rows),
            "data": self.rows.fingerprint,
        }

    def restore(self, state: dict) -> None:
        """Goes on with the row after the last one that was taken, at once.

        The batch size, the number of hosts and the place of the data may differ from those of the
        state.

        Raises ConfigError, with what differs, if the stream is another one.
        """
        own = self.state()
        named = {"seed": "seed", "seq_len": "seq_len", "num_rows": "rows", "data": "fingerprint"}
        others = [
            f"{name} {state[key]}, now {own[key]}"
            for key, name in named.items()
            if state[key] != own[key]
        ]
        check(
            not others,
            f"the training data differ from those that the run began with ({'; '.join(others)}): "
            "give the same data, seq_len and seed, or begin a new run",
        )
        self._taken = state["rows_taken"]
        self._start()

    def _start(self) -> None:
        rows, own_B = self.rows, self._own_B
        batches = self._order[self._taken :].batch(self._batch_size, drop_remainder=True)
        reader = batches.map(lambda numbers_B: rows.read(numbers_B[own_B]))
        self._batches = iter(reader.to_iter_dataset(PREFETCH))


class OnePass:
    """Every row of a split once, in a fixed order, for one host; can be iterated again and again.

    With max_batches fewer rows, evenly spaced: of a few long documents the first rows would show
    but the first. The last batch is filled up with padding (segments 0, labels -1).
    """

    def __init__(
        self,
        rows: Rows,
        *,
        batch_size: int,
        own_B: Own = None,
        max_batches: int | None = None,
    ):
        self.rows = rows
        self._batch_size, self._own_B = batch_size, check_own(batch_size, own_B)
        batches = -(-len(rows) // batch_size)
        self._num_batches = batches if max_batches is None else min(batches, max_batches)

    def __len__(self) -> int:
        return self._num_batches

    def whole(self) -> "OnePass":
        """The same batches with the rows of all hosts."""
        return OnePass(self.rows, batch_size=self._batch_size, max_batches=self._num_batches)

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, self._num_batches * self._batch_size, self._batch_size):
            numbers_B = np.arange(first, first + self._batch_size)
            taken = min(len(self.rows), len(self) * self._batch_size)
            numbers_B = np.where(numbers_B < taken, numbers_B * len(self.rows) // taken, -1)
            yield self.rows.read(numbers_B[self._own_B])


def make_pipeline(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    seq_len: int,
    split: str,
    seed: int,
    cache: Path,
    own_B: Own = None,
) -> Pipeline:
    """The stream of a split, "train" or "validation".

    Tokens are made and kept in `cache` if they are not there yet. All hosts must have the same
    data; with a cache on a shared disk, let one make the tokens before the others begin.

    Raises ConfigError for missing or unreadable data, for a split without documents, and for rows
    that the batch does not have.
    """
    check_own(batch_size, own_B)  # complains before the work
    rows = make_rows(config, tokenizer, seq_len=seq_len, split=split, cache=cache)
    return Pipeline(rows, batch_size=batch_size, seed=seed, own_B=own_B)


def one_pass(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    seq_len: int,
    split: str,
    cache: Path,
    own_B: Own = None,
    max_batches: int | None = None,
) -> OnePass:
    """Every row of a split once, for evaluation; with max_batches a fixed sample of them.

    Raises ConfigError as make_pipeline does.
    """
    check_own(batch_size, own_B)
    rows = make_rows(config, tokenizer, seq_len=seq_len, split=split, cache=cache)
    return OnePass(rows, batch_size=batch_size, own_B=own_B, max_batches=max_batches)


def make_rows(
    config: DataConfig, tokenizer: Tokenizer, *, seq_len: int, split: str, cache: Path
) -> Rows:
    """The packed rows of a split.

    No document of "validation" is in "train": a validation set of its own is left without those
    documents that are also in the training data.
    """
    check_split(split)
    store = token_store(config, tokenizer, cache=cache)
    if split == "validation" and config.has_validation_set:
        seen = store.keys_N
        store = token_store(config, tokenizer, cache=cache, validation=True)
        chosen_N = ~np.isin(store.keys_N, seen)
    else:
        chosen_N = held_out(store.keys_N, config.held_out_fraction) == (split == "validation")
    check(
        bool(chosen_N.any()),
        f"of {len(chosen_N)} documents none is for {split}: "
        + (
            "all of them are in the training data too"
            if config.has_validation_set
            else f"validation_fraction {config.validation_fraction} is too "
            + ("small" if split == "validation" else "large")
        ),
    )
    rows = pack(
        store,
        choose(store.keys_N, chosen_N),
        seq_len,
        packing=config.packing,
        long_documents=config.long_documents,
        train_on_prompt=config.train_on_prompt,
    )
    shared = int((~chosen_N).sum()) if config.has_validation_set else 0
    return dataclasses.replace(rows, num_shared=shared)


def check_own(batch_size: int, own_B: Own) -> np.ndarray:
    """The numbers of a host's rows, in order; all of them for None.

    Raises ConfigError where the batch does not have them.
    """
    check(batch_size >= 1, f"a batch of {batch_size} rows is none: choose 1 or more")
    if own_B is None:
        return np.arange(batch_size)
    numbers_B = np.asarray(own_B)
    numbers = numbers_B.tolist()
    check(
        numbers == sorted({*numbers} & {*range(batch_size)}) != [],
        f"rows {numbers} of a host are not some of 0..{batch_size - 1}, in order",
    )
    return numbers_B
