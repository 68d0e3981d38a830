"""One stream of rows, reshuffled each epoch; each host reads its own part.

The stream depends only on the data and the seed. Batch size and number of hosts do not change its
order. It continues across epochs, so its state is the number of rows taken.

        the stream:       r0 r1 r2 r3 | r4 r5 r6 r7 | ...      batches of 4
        a host's [0, 1]:  r0 r1       | r4 r5       | ...
        another's [2, 3]:       r2 r3 |       r6 r7 | ...
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import grain
import numpy as np

from lsjax.config import AnyPath, DataConfig, check
from lsjax.data.packing import PackedBatch
from lsjax.data.token_rows import ALONE, Share, TokenRows, open_job, stored_rows
from lsjax.data.tokenizer import Tokenizer

PREFETCH = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


class Pipeline:
    """Endless batches for one host.

    batch_size: rows of all hosts together. seed: sets the order, 0 <= seed < 2^32. own_B: numbers
    of this host's rows in each batch; all by default.
    """

    def __init__(
        self, rows: TokenRows, *, batch_size: int, seed: int, own_B: np.ndarray | None = None
    ):
        self.rows, self.batch_size, self._seed = rows, batch_size, seed
        self._own_B = np.arange(batch_size) if own_B is None else own_B
        self._order = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat()
        self._taken, self._beside = 0, []
        self._start()

    def beside(self, read: Callable[[np.ndarray], Mapping[str, np.ndarray]]) -> None:
        """Adds arrays to each batch from now on. read: (numbers of rows) -> arrays by name."""
        self._beside.append(read)
        self._start()

    def next(self) -> PackedBatch:
        """The next rows of this host, [own rows, T]."""
        batch = next(self._batches)
        self._taken += self.batch_size
        return batch

    def state(self) -> dict:
        """Position in the stream, for JSON; equal on all hosts after equally many batches."""
        return {
            "rows_taken": self._taken,
            "seed": self._seed,
            "seq_len": self.rows.seq_len,
            "num_rows": len(self.rows),
            "data": self.rows.fingerprint,
        }

    def restore(self, state: dict) -> None:
        """Resumes after the last row that was taken.

        Raises ConfigError, which lists the differences, if the stream is another one.
        """
        own = self.state()
        names = {"num_rows": "rows", "data": "fingerprint"}
        others = [
            f"{names.get(key, key)} {state[key]}, now {own[key]}"
            for key in ("seed", "seq_len", "num_rows", "data")
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
        readers, own_B = [self.rows.read, *self._beside], self._own_B

        def read(numbers_B: np.ndarray) -> dict[str, np.ndarray]:
            batch: dict[str, np.ndarray] = {}
            for reader in readers:
                batch |= reader(numbers_B[own_B])
            return batch

        batches = self._order[self._taken :].batch(self.batch_size, drop_remainder=True)
        self._batches = iter(batches.map(read).to_iter_dataset(PREFETCH))


@dataclass(frozen=True, eq=False)
class OnePass:
    """Every row of a split once, in a fixed order, for one host; can be iterated repeatedly.

    batch_size and own_B: as for Pipeline. max_batches takes evenly spaced rows, because the first
    ones may all be of one long document. The last batch is padded (segments 0, labels -1).
    """

    rows: TokenRows
    batch_size: int
    own_B: np.ndarray | None = None
    max_batches: int | None = None

    def __len__(self) -> int:
        batches = -(-len(self.rows) // self.batch_size)
        return batches if self.max_batches is None else min(batches, self.max_batches)

    def whole(self) -> "OnePass":
        """The same batches with the rows of all hosts."""
        return replace(self, own_B=None)

    def __iter__(self) -> Iterator[PackedBatch]:
        numbers = np.full((len(self), self.batch_size), -1)
        taken = min(len(self.rows), numbers.size)
        numbers.flat[:taken] = np.arange(taken) * len(self.rows) // taken
        for numbers_B in numbers:
            yield self.rows.read(numbers_B if self.own_B is None else numbers_B[self.own_B])


def packed_rows(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    split: str,
    seq_len: int,
    cache: AnyPath,
    share: Share = ALONE,
    workers: int | None = None,
) -> TokenRows:
    """Rows of a split, "train" or "validation"; the splits share no document.

    Missing shards are made first, by `workers` processes of several threads: by default one for
    THREADS cores, but only one for less than WORTH bytes. A separate validation set loses the
    documents that are also in the training data.

    Raises ConfigError if data are missing or unreadable, or if the split has no document or row.
    Also raises it if the tokenizer lacks the end token that the config requests.
    """
    check(seq_len >= 2, f"seq_len {seq_len} must be at least 2: a token and its label")
    end = next(iter(tokenizer.eos_ids), tokenizer.vocab_size)
    check(
        not config.append_end or end < tokenizer.vocab_size,
        f"this tokenizer has no end token among the {tokenizer.vocab_size} rows of the model's "
        "table: set append_end to False",
    )
    own_set, seen = config.has_validation_set and split == "validation", None
    if own_set:
        options = dict(seq_len=seq_len, cache=cache, share=share, workers=workers)
        seen = packed_rows(config, tokenizer, split="train", **options)
    job = open_job(config, tokenizer, seq_len, cache, seen)
    rows = stored_rows(job, split, share, workers)
    size = "small" if split == "validation" else "large"
    reason = f"validation_fraction {config.validation_fraction} is too {size}"
    if own_set:
        reason = "all are in the training data too, so choose another validation set"
    found = rows.num_documents + rows.num_dropped
    check(found > 0, f"none of {rows.num_all} documents is for {split}: {reason}")
    lost = f"({rows.num_dropped} dropped)"
    check(len(rows) > 0, f"no document fits a row of {seq_len} tokens {lost}: raise seq_len")
    return rows
