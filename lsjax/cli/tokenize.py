"""Tokenizes the data of a configuration ahead of training, with many processes and hosts.

    python -m lsjax.cli.tokenize --config configs/continual_llama2_7b.py \\
        --init-from models/llama2-7b --data.paths 'corpus/*.txt' --data.tokenizer models/llama2-7b
    python -m lsjax.cli.tokenize --config configs/X.py --shard 3/8      (the third of eight hosts)

Give the flags of train.py, which finds the tokens in LSJAX_CACHE. A killed program resumes with the
shards that are missing. With --shard, hosts need not run at the same time; the last one joins the
shards. Without this program, train.py tokenizes by itself.
"""

from lsjax.interrupts import keeps, run_program

if __name__ == "__main__":  # before the other imports, which take seconds
    run_program("lsjax.cli.tokenize")

import re
from dataclasses import dataclass

from lsjax.checkpoints import open_checkpoint
from lsjax.cli.setup import program
from lsjax.cli.training import ConfigFields, ConfigFile, parse_config
from lsjax.config import bounded, check
from lsjax.data.pipeline import packed_rows
from lsjax.data.shards import SPLITS
from lsjax.data.token_rows import ShardsMissing, Share
from lsjax.data.vocabulary import make_tokenizer
from lsjax.io.files import cache_directory
from lsjax.training.prepare import with_model


@dataclass(frozen=True, kw_only=True)
class Arguments(ConfigFile):
    """Tokenizes the data of a configuration."""

    fields: ConfigFields
    shard: str = "1/1"
    """This host's part of the work, i/n."""
    workers: int | None = bounded(None, low=1)
    """Number of processes, of four threads each; by default one for four cores."""


def make(arguments: Arguments) -> None:
    """Makes this host's shards, and joins all if none is missing."""
    config, part = arguments.fields, re.fullmatch(r"(\d+)/(\d+)", arguments.shard)
    index, count = map(int, part.groups()) if part else (0, 0)
    check(1 <= index <= count, f"--shard {arguments.shard} must be i/n with 1 <= i <= n")
    if config.init_from:
        config = with_model(config, open_checkpoint(config.init_from).config)
    cache = cache_directory()
    tokenizer = make_tokenizer(config.data, cache=cache).fitted(config.model.vocab_size)
    share = Share(index - 1, count, alone=count > 1)
    options = dict(seq_len=config.seq_len, cache=cache, share=share, workers=arguments.workers)
    keeps("the same command makes the missing shards")
    try:
        for split in SPLITS:
            rows = packed_rows(config.data, tokenizer, split=split, **options)
            print(f"{split}: {rows.describe()}")
    except ShardsMissing as missing:
        print(missing)


main = program(Arguments, make, __doc__, parse_config)
