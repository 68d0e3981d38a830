"""Tokenizes the data of a configuration ahead of training, with many processes and hosts."""

import re

from lsjax.checkpoints import open_checkpoint
from lsjax.cli.flags.tokenize import Arguments
from lsjax.config import check
from lsjax.data.pipeline import packed_rows
from lsjax.data.shards import SPLITS
from lsjax.data.token_rows import ShardsMissing, Share
from lsjax.data.vocabulary import make_tokenizer
from lsjax.interrupts import keeps
from lsjax.io.files import cache_directory
from lsjax.training.prepare import with_model


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
