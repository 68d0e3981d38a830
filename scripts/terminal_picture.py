"""Draws a program's terminal output as an SVG, with its colours.

    FORCE_COLOR=1 python decode.py --model PATH --prompt "..." --strategy self_speculative \\
        --exit-layer 4 --num-draft-tokens 4 --show-drafts | \\
        python scripts/terminal_picture.py out.svg
"""

import io
import re
import sys

import tyro
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text


def main(output: tyro.conf.Positional[str], columns: int = 100) -> None:
    """Reads the text of a terminal with this many columns from standard input."""
    console = Console(width=columns, record=True, force_terminal=True, file=io.StringIO())
    # Only colours count. Sequences that move the cursor or erase are dropped.
    text = re.sub(r"\r|\x1b\[\??[\d;]*[A-HJKhl]", "", sys.stdin.read().rstrip("\n"))
    for line in text.split("\n"):
        console.print(Text.from_ansi(line))
    console.save_svg(output, title="", theme=MONOKAI)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
