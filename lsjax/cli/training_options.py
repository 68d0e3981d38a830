"""The command line of train.py: a configuration file, and its fields as flags."""

import argparse
import runpy
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lsjax.cli.flags import parse_flags
from lsjax.cli.hosts import Hosts
from lsjax.config import ConfigError, TrainConfig, check


@dataclass(frozen=True)
class Arguments:
    """What a run is asked to be, and where it lies."""

    config: TrainConfig
    workdir: Path
    hosts: Hosts


@dataclass(frozen=True)
class _Flags:
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    distributed: Hosts = Hosts()


def parse(argv: Sequence[str], description: str) -> Arguments:
    """Reads `--config FILE --workdir DIRECTORY` and any field of the configuration.

    Raises ConfigError for what is wrong with the file, a flag or a value.
    """
    first = config_parser("train.py", description)
    first.add_argument("--workdir", type=Path, metavar="DIRECTORY", help="of the run")
    known, default, rest = read_config(first, argv)
    flags = parse_flags(
        _Flags,
        rest,
        description,
        default=_Flags(default),
        config=(tyro.conf.AvoidSubcommands,),
    )
    check(known.workdir is not None, "--workdir is missing: name the directory of the run")
    return Arguments(flags.config, known.workdir, flags.distributed)


def config_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """Reads the name of the configuration file before all else."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="configs/NAME.py")
    return parser


def read_config(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, TrainConfig, list[str]]:
    """What the parser knows, the configuration of the file, and the other arguments.

    Raises ConfigError where no file is named, and for what is wrong with it.
    """
    known, rest = parser.parse_known_args(argv)
    if known.config is None:
        if {"-h", "--help"} & {*rest}:
            parser.print_help()
            raise SystemExit(0)
        raise ConfigError("--config is missing: name a file such as configs/quickstart.py")
    return known, read_config_file(known.config), rest


def read_config_file(file: Path) -> TrainConfig:
    """The `config` of a Python file.

    Raises ConfigError, with the line, where the file fails or holds none, and for a value of
    another type than its field's: 5e4 is no whole number.
    """
    check(file.is_file(), f"--config {file} is no file: name one such as configs/quickstart.py")
    try:
        found = runpy.run_path(str(file))
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
        line = getattr(error, "lineno", None) or (frames[-1].lineno if frames else "?")
        raise ConfigError(f"{file}:{line}: {type(error).__name__}: {error}") from None
    config = found.get("config")
    check(
        isinstance(config, TrainConfig),
        f"{file}: has no `config` that is a TrainConfig: set config = TrainConfig(...)",
    )
    return config
