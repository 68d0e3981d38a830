"""Trains a Llama with layer dropout and the early-exit loss.

    python train.py --config configs/quickstart.py --workdir runs/quickstart
    python train.py --config configs/quickstart.py --workdir runs/b --optimizer.learning-rate 3e-3
    python decode.py --model runs/quickstart --prompt "import " --strategy self_speculative \\
        --exit-layer 4 --num-draft-tokens 4

Running the same command again resumes a stopped run. Fields of the configuration are flags:
--help-all lists them.
"""

from dataclasses import dataclass

from lsjax.cli.flags.config_file import ConfigFields, ConfigFile, parse_config
from lsjax.cli.flags.parse import Program
from lsjax.config import AnyPath, Hosts


@dataclass(frozen=True, kw_only=True)
class Arguments(ConfigFile):
    """Flags of train.py."""

    workdir: AnyPath | None = None
    """Directory of the run; required."""
    distributed: Hosts = Hosts()
    fields: ConfigFields


PROGRAM = Program(
    "train",
    "lsjax.cli.train:train",
    Arguments,
    __doc__,
    common="""
        config workdir num_steps batch_size seq_len init_from seed optimizer.learning_rate
        optimizer.warmup_steps layer_dropout.p_max early_exit.curriculum early_exit.exits
        data.source data.paths data.tokenizer lora.rank micro_batches remat
        mesh.data mesh.fsdp checkpoints.every evaluation.every
    """,
    usage="--config FILE --workdir DIRECTORY",
    parse=parse_config,
)
