"""Flags of programs that read a configuration file."""

import runpy
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import tyro

from lsjax.cli.setup import parse_flags
from lsjax.config import AnyPath, Checked, ConfigError, TrainConfig, check
from lsjax.training.hosts import Hosts

T = TypeVar("T", bound="ConfigFile")
ConfigFields = Annotated[TrainConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class ConfigFile(Checked, prefix="--"):
    """Configuration file. Its fields are also flags: --config FILE --help lists them."""

    config: AnyPath | None = None
    """configs/NAME.py"""


@dataclass(frozen=True, kw_only=True)
class TrainingFlags(ConfigFile):
    """Flags of train.py."""

    workdir: AnyPath | None = None
    """Directory of the run; required."""
    distributed: Hosts = Hosts()
    fields: ConfigFields


def parse_config(
    kind: type[T],
    argv: Sequence[str] | None,
    description: str,
    early: type[ConfigFile] = ConfigFile,
    derived: Callable[[Any], dict[str, Any]] = lambda found: {},
) -> T:
    """Flags of a `kind` with the fields of its --config file.

    early: flags that are read before all others. derived: other defaults of `kind`, made from
    these. Raises ConfigError for a bad file, flag or value.
    """
    found, rest = parse_flags(early, argv, "", return_unknown_args=True, add_help=False)
    if found.config is None and {"-h", "--help"} & {*rest}:
        parse_flags(early, ["--help"], description)
    check(bool(found.config), "--config is missing: name a file such as configs/quickstart.py")
    default = kind(fields=read_config_file(found.config), **derived(found))
    config = (tyro.conf.AvoidSubcommands,)
    return parse_flags(kind, argv, description, default=default, config=config)


def read_config_file(file: AnyPath) -> TrainConfig:
    """The `config` of a Python file. Raises ConfigError, with the line, if the file is missing or
    fails, defines no `config`, or gives a field a value that it rejects."""
    try:
        config = runpy.run_path(str(file)).get("config")
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
        line = getattr(error, "lineno", None) or (frames[-1].lineno if frames else None)
        where = f"{file}:{line}" if line else f"--config {file}"
        raise ConfigError(f"{where}: {type(error).__name__}: {error}") from None
    check(
        isinstance(config, TrainConfig),
        f"{file}: `config` is missing or of another type: set config = TrainConfig(...)",
    )
    return config
