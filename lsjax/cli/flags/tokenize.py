"""Tokenizes the data of a configuration ahead of training.

    lsjax tokenize --config configs/continual_llama2_7b.py \\
        --init-from models/llama2-7b --data.paths 'corpus/*.txt' --data.tokenizer models/llama2-7b
    lsjax tokenize --config configs/X.py --shard 3/8      (the third of eight hosts)

Give the flags of train.py, which finds the tokens in LSJAX_CACHE. A killed program resumes with the
shards that are missing. With --shard, hosts need not run at the same time; the last one joins the
shards. Without this program, train.py tokenizes by itself.
"""

from dataclasses import dataclass

from lsjax.cli.flags.config_file import ConfigFields, ConfigFile, parse_config
from lsjax.cli.flags.parse import Program
from lsjax.config import bounded


@dataclass(frozen=True, kw_only=True)
class Arguments(ConfigFile):
    """Tokenizes the data of a configuration."""

    fields: ConfigFields
    shard: str = "1/1"
    """This host's part of the work, i/n."""
    workers: int | None = bounded(None, low=1)
    """Number of processes, of four threads each; by default one for four cores."""


PROGRAM = Program(
    "tokenize",
    "lsjax.cli.tokenize:make",
    Arguments,
    __doc__,
    common="""
        config data.paths data.tokenizer init_from seq_len shard workers
    """,
    usage="--config FILE",
    parse=parse_config,
)
