"""Draws what a program prints in a terminal, colours included, as a PNG.

    FORCE_COLOR=1 python decode.py --model PATH --prompt "..." --strategy self_speculative \\
        --exit-layer 4 --num-draft-tokens 4 --show-drafts | \\
        python scripts/terminal_picture.py out.png

Needs the plots extra.
"""

import argparse
import re
import sys
from pathlib import Path

from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import MONOKAI
from rich.text import Text

SIZE, MARGIN = 22, 24  # pixels
FONTS = Path(get_data_path()) / "fonts" / "ttf"
REGULAR, BOLD = (
    ImageFont.truetype(str(FONTS / f"DejaVuSansMono{kind}.ttf"), SIZE) for kind in ("", "-Bold")
)
CELL_WIDTH, CELL_HEIGHT = round(REGULAR.getlength("0")), round(SIZE * 1.35)
PAPER = tuple(MONOKAI.background_color)


def colour_of(style: Style) -> tuple[int, int, int]:
    """Colour of the letters. Dim letters are halfway to the background."""
    ink = MONOKAI.foreground_color
    if style.color is not None and not style.color.is_default:
        ink = style.color.get_truecolor(MONOKAI)
    if style.dim:
        return tuple((a + b) // 2 for a, b in zip(ink, PAPER, strict=True))
    return tuple(ink)


def draw(lines: list[Text], columns: int) -> Image.Image:
    """A picture of the lines, wrapped where they are longer than a row of the terminal."""
    console = Console(width=columns, color_system="truecolor", force_terminal=True)
    rows = [row for line in lines for row in console.render_lines(line, pad=False)]
    size = 2 * MARGIN + columns * CELL_WIDTH, 2 * MARGIN + len(rows) * CELL_HEIGHT
    image = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(image)
    for number, row in enumerate(rows):
        x, y = MARGIN, MARGIN + number * CELL_HEIGHT
        for segment in row:
            style = segment.style or Style()
            width = segment.cell_length * CELL_WIDTH
            ink = colour_of(style)
            font = BOLD if style.bold else REGULAR
            for place, letter in enumerate(segment.text):  # on the grid, whatever the font says
                pen.text((x + place * CELL_WIDTH, y), letter, fill=ink, font=font)
            if style.strike:
                pen.line((x, y + CELL_HEIGHT // 2, x + width, y + CELL_HEIGHT // 2), ink, 2)
            x += width
    return image


def main() -> None:
    """Reads the terminal's text from standard input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--columns", type=int, default=100)
    arguments = parser.parse_args()
    # Only colours count: what moves the cursor or erases is left out.
    text = re.sub(r"\r|\x1b\[\??[\d;]*[A-HJKhl]", "", sys.stdin.read().rstrip("\n"))
    lines = [Text.from_ansi(line) for line in text.split("\n")]
    draw(lines, arguments.columns).save(arguments.output)


if __name__ == "__main__":
    main()
