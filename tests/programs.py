"""Programs of the command line, by name."""

from collections.abc import Callable, Sequence

from lsjax.cli.main import main


def program(name: str) -> Callable[[Sequence[str]], int]:
    """The program, which is given its flags."""
    return lambda argv: main([name, *map(str, argv)])
