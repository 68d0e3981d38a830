"""Flags of programs that read a configuration file, whose fields are flags too."""

import difflib
import importlib.resources
import runpy
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from lsjax.cli.flags.parse import Program, parse_as, parse_known
from lsjax.config import AnyPath, Checked, ConfigError, TrainConfig, check

ConfigFields = Annotated[TrainConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class ConfigFile(Checked, prefix="--"):
    """The configuration of a run."""

    config: AnyPath | None = None
    """Configuration: a file, or the name of one of those in configs/, such as quickstart."""


def parse_config(
    program: Program,
    argv: Sequence[str],
    early: type[ConfigFile] = ConfigFile,
    derived: Callable[[Any], dict[str, Any]] = lambda found: {},
) -> Any:
    """Flags of a program with the fields of its --config file.

    early: flags that are read before all others. derived: other defaults of the flags, made from
    these. Raises ConfigError for a bad file, flag or value.
    """
    found, rest = parse_known(early, argv)
    if found.config is None:
        program.show_help(rest)
        near = difflib.get_close_matches("--config", rest, n=1, cutoff=0.8)
        check(not near, f"{' '.join(near)} is not a flag: did you mean --config?")
    check(found.config is not None, "--config is missing: name a file, or one such as quickstart")
    config = read_config_file(found_config(found.config))
    program.show_help(rest, config)
    default = program.flags(fields=config, **derived(found))
    return parse_as(program.flags, argv, default=default, config=(tyro.conf.AvoidSubcommands,))


def found_config(name: AnyPath) -> AnyPath:
    """The configuration file of this path, or the one of this name that lsjax comes with."""
    if name.suffix or len(name.parts) > 1 or name.exists():
        return name
    package = importlib.resources.files("lsjax")
    known = {}
    for folder in (package / "configs", package / ".." / "configs"):  # installed; in a checkout
        known |= {file.stem: file for file in Path(str(folder)).glob("*.py")}
    check(
        name.name in known,
        f"--config {name} is no file, and lsjax has no configuration of this name: choose from "
        f"{', '.join(sorted(known))}",
    )
    return known[name.name]


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
