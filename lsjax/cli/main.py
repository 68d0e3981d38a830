"""The command `lsjax`: its programs, which it parses before it imports what they need.

    lsjax train --config quickstart --workdir runs/quickstart
    lsjax decode --model runs/quickstart --prompt "import "

train.py and decode.py of a checkout are the first two.
"""

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module

from lsjax.cli.errors import one_line_errors
from lsjax.cli.flags.help import HELP
from lsjax.cli.flags.parse import Program
from lsjax.config import check
from lsjax.interrupts import importing

PROGRAMS = (
    *("train", "decode", "benchmark", "evaluate", "lm-eval", "convert", "tokenize"),
    *("count-tokens", "aot", "report", "answers"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a program and returns its exit code. Bad input exits with code 2."""
    name, *flags = (sys.argv[1:] if argv is None else argv) or HELP[:1]
    with one_line_errors():
        if name in HELP:
            print(overview())
            return 0
        if name == "--version":
            print(import_module("lsjax").__version__)
            return 0
        near = difflib.get_close_matches(name, PROGRAMS, n=1)
        fix = f"did you mean {near[0]}?" if near else f"choose from {', '.join(PROGRAMS)}"
        check(name in PROGRAMS, f"lsjax has no program {name}: {fix}")
        program = find(name)
        arguments = program.parsed(flags)
        module, function = program.work.split(":")
        with importing():
            work = getattr(import_module(module), function)
        return work(arguments) or 0


def find(name: str) -> Program:
    """The program of this name."""
    return import_module(f"lsjax.cli.flags.{name.replace('-', '_')}").PROGRAM


def overview() -> str:
    """A line about each program."""
    lines = ["usage: lsjax PROGRAM [options]", ""]
    for name in PROGRAMS:
        about = find(name).about.strip().splitlines()[0]
        lines.append(f"  {name:14}{about}")
    return "\n".join([*lines, "", "lsjax PROGRAM --help shows the options of a program."])
