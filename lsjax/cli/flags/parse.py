"""Flags of a program, parsed into its dataclass."""

import difflib
import io
import re
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from typing import Any, TypeVar

import tyro

from lsjax.cli.flags.fields import flags_of
from lsjax.cli.flags.help import HELP, HELP_ALL, help_text
from lsjax.config import AnyPath, ConfigError, as_path

T = TypeVar("T")
PATHS = tyro.constructors.ConstructorRegistry()


@dataclass(frozen=True)
class Program:
    """A program of the command line.

    work: "module:function" that runs it with the parsed flags. about: what it does, with examples.
    common: the fields that --help shows, with blanks between, such as optimizer.learning_rate.
    usage: the flags that must be given. parse: as `parse_flags`, for flags that depend on one
    another.
    """

    name: str
    work: str
    flags: type
    about: str
    common: str
    usage: str = ""
    parse: Callable[..., Any] | None = None

    def parsed(self, argv: Sequence[str]) -> Any:
        """The flags of a command line. Prints help and exits if they ask for it. Raises
        ConfigError."""
        return (self.parse or parse_flags)(self, argv)

    def show_help(self, argv: Sequence[str], default: Any = None) -> None:
        """Prints help and exits, if the flags ask for it. default: values that help shows."""
        if {*HELP, HELP_ALL} & {*argv}:
            common = None if HELP_ALL in argv else self.common.split()
            print(f"usage: lsjax {self.name} {self.usage} [options]\n\n{self.about.strip()}\n")
            print(help_text(self.flags, common, default))
            raise SystemExit(0)


def parse_flags(program: Program, argv: Sequence[str]) -> Any:
    """Flags of a program without a configuration file."""
    program.show_help(argv)
    return parse_as(program.flags, argv)


def parse_as(kind: type[T], argv: Sequence[str], **settings: Any) -> T:
    """Parses flags into the dataclass `kind` with `tyro.cli`. Raises ConfigError with one line for
    an unknown flag, a value of the wrong type, or a value that the dataclass rejects."""
    found, rest = parse_known(kind, argv, **settings)
    if rest:
        known = [name for flag in flags_of(kind) for name in (*flag.names, flag.negated)]
        unknown = rest[0].partition("=")[0]
        near = difflib.get_close_matches(unknown.replace("_", "-"), known, n=1)
        fix = f"did you mean {near[0]}? " if near else ""
        what = "a flag" if unknown.startswith("-") else "expected here"
        raise ConfigError(f"{unknown} is not {what}: {fix}{HELP_ALL} lists all flags")
    return found


def parse_known(kind: type[T], argv: Sequence[str], **settings: Any) -> tuple[T, list[str]]:
    """The same, and what it does not know."""
    shown, options = io.StringIO(), dict(registry=PATHS, add_help=False, return_unknown_args=True)
    try:
        with redirect_stderr(shown):
            return tyro.cli(kind, args=argv, **options, **settings)
    except SystemExit as end:
        cause: BaseException | None = end
        while cause is not None and not isinstance(cause, ConfigError):
            cause = cause.__context__
        raise cause or ConfigError(_in_a_line(shown.getvalue())) from None


def _in_a_line(box: str) -> str:
    """The text in tyro's error box on one line, without title, borders and colours."""
    lines = re.sub(r"\x1b\[[\d;]*m", "", box).splitlines()[1:]
    rows = [line.strip(" │╰╯") for line in lines]
    sections = " ".join(row if row.strip("─-") else "\n" for row in rows).split("\n")
    said = [" ".join(part.split()).removesuffix(".") for part in sections if part.strip()]
    said = [part for part in said if not re.search("full helptext|^Argument helptext", part)]
    return "; ".join((*said, f"{HELP_ALL} lists all flags"))


@PATHS.primitive_rule
def _path_flag(info: Any) -> Any:
    """Tells tyro how to read and show a path, which may be in a bucket. An empty text stays a text,
    which the dataclass refuses with the flag's name."""
    if info.type not in (AnyPath, AnyPath | None):
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: as_path(words[0]) if words[0] else "",
        is_instance=lambda value: isinstance(value, info.type),
        str_from_instance=lambda path: [str(path)],
    )
