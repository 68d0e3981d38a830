"""Texts as they are decoded, with marks that say which tokens were drafted, rejected or corrected.

In colours where the console has them. Elsewhere, such as in files, as git diff --word-diff does:
[-rejected draft-] and {+token of the full model+}; accepted drafts have no mark.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from rich.text import Text

from lsjax.data.tokenizer import StreamDecoder, Tokenizer
from lsjax.decoding.auto.adaptive import Adaptive
from lsjax.decoding.completion import Completion, Origin, Trace
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import Request
from lsjax.decoding.strategy import Strategy
from lsjax.terminal import verbatim

ACCEPTED = "bold green"
LOOKED_UP = "bold yellow"
CORRECTED = "bold red"
REJECTED = "dim red strike"
GAP = "dim red"  # the space before a rejected word; a struck space looks like a dash
ADDED = "bold blue"
STYLES: dict[Origin, str] = {
    "accepted": ACCEPTED,
    "looked-up": LOOKED_UP,
    "corrected": CORRECTED,
    "added": ADDED,
}

Piece = tuple[str, str]  # text and style


def has_colours(console: Console) -> bool:
    """Whether colours are seen there: not in files, nor if NO_COLOR is set."""
    return console.color_system is not None and not console.no_color


def legend(console: Console, strategy: Strategy) -> Text:
    """What the marks in a strategy's texts mean."""
    if not has_colours(console):
        return Text(
            "New text begins at the first mark: {+token of the full model+}, [-rejected draft-]"
            "{+its correction+}, accepted drafts without a mark. Drafts after a rejected one are "
            "not shown. The text without marks follows."
        )
    return Text.assemble(
        ("accepted draft   ", ACCEPTED),
        ("draft found in the text   " if isinstance(strategy, Adaptive) else "", LOOKED_UP),
        ("rejected draft", REJECTED),
        (" its correction   ", CORRECTED),
        ("the model's own, after a draft that was all right", ADDED),
    )


class MarkedText:
    """New text as it is decoded, each token marked by its origin (see `legend`)."""

    def __init__(self, console: Console, tokenizer: Tokenizer, prompt_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer, prompt_ids)
        self._read = 0  # tokens of the trace
        self._waiting: deque[Piece] = deque()
        self._render = _coloured if has_colours(console) else WordDiff()

    def push(self, trace: Trace, text: str, *, last: bool = False) -> Segments:
        """The next piece of text with its rejected drafts. last: the text ends with this piece.
        Tokens after it in the trace belong to a stop string."""
        for index in range(self._read, len(trace)):
            if (replaced := int(trace.replaced_n[index])) >= 0:
                rejected = self._tokenizer.token_bytes(replaced, skip_special=False)
                self._waiting.append((_visible(rejected), REJECTED))
            piece = self._decoder.push([int(trace.tokens_n[index])])
            self._waiting.append((piece, STYLES[trace.origin(index)]))
        self._read = len(trace)
        if last:
            self._waiting.append((self._decoder.finish(), ADDED))
        return Segments([*self._render(list(self._pieces(len(text), last)), last)])

    def _pieces(self, left: int, last: bool) -> Iterator[Piece]:
        """The waiting pieces, up to `left` characters of text."""
        while self._waiting:
            piece, style = self._waiting.popleft()
            if style == REJECTED:
                yield piece, style
                continue
            yield piece[:left], style
            if len(piece) > left and not last:
                self._waiting.appendleft((piece[left:], style))
                return
            left -= min(left, len(piece))


def _coloured(pieces: Sequence[Piece], last: bool) -> Iterator[Segment]:
    for piece, style in pieces:
        if style == REJECTED:
            word = piece.lstrip(" ")
            parts = [(piece[: len(piece) - len(word)], GAP), (word, style)]
        else:
            parts = [(piece, style)]
        yield from (Segment(text, Style.parse(style)) for text, style in parts if text)


class WordDiff:
    """Marks pieces without colours. Tokens of the full model that follow each other share a mark,
    which stays open from one call to the next."""

    def __init__(self):
        self._is_open = False

    def __call__(self, pieces: Sequence[Piece], last: bool) -> Iterator[Segment]:
        for piece, style in pieces:
            if not piece:
                continue
            added = style in (ADDED, CORRECTED)
            if self._is_open != added:
                yield Segment("{+" if added else "+}")
                self._is_open = added
            if added:  # a line break is named, as its mark would not be seen at the end of a line
                self._is_open = not piece.endswith("\n")
                piece = piece.replace("\n", "\\n+}\n{+")
                piece = piece if self._is_open else piece.removesuffix("{+")
            yield Segment(f"[-{piece}-]" if style == REJECTED else piece)
        if last and self._is_open:
            yield Segment("+}")


def marked(
    console: Console, tokenizer: Tokenizer, prompt_ids: Sequence[int], completion: Completion
) -> Segments:
    """A complete text with its marks, for `SafeConsole.print`, which adds no newline to it."""
    text = MarkedText(console, tokenizer, prompt_ids)
    return text.push(completion.trace, completion.text, last=True)


def show_unmarked(console: Console, text: str) -> None:
    """Prints the text once more, by itself between empty lines, if marks stand in it."""
    if not has_colours(console):
        console.print(verbatim(f"\n{text}\n"))
        console.print()


@contextmanager
def silent(engine: Engine) -> Iterator[None]:
    """Does not say what is compiled: a terminal would erase the unfinished line of text."""
    before, engine.programs.compiling = engine.programs.compiling, nullcontext
    try:
        yield
    finally:
        engine.programs.compiling = before


def stream(
    people: Console,
    engine: Engine,
    request: Request,
    *,
    show_drafts: bool,
    opening: str = "",
    **options: Any,
) -> Completion:
    """Prints the text of a prompt of token ids as it is decoded, and returns its completion.
    show_drafts: with marks. opening: printed when the text begins. Progress has its own line before
    that, and none after. options: of `Engine.watch`."""
    text = MarkedText(people, engine.tokenizer, request.prompt)
    with ExitStack() as stack:
        updates = stack.enter_context(closing(engine.watch(request, **options)))
        for number, update in enumerate(updates):
            if number == 0:
                people.print(verbatim(opening), style="dim")
                stack.enter_context(silent(engine))
            if show_drafts:
                last = update.completion is not None
                people.print(text.push(update.trace, update.text, last=last))
            else:
                people.print(verbatim(update.text))
    people.print()
    return update.completion


def _visible(token: bytes) -> str:
    """A rejected token's text on one line: line breaks are escaped, spaces alone drawn as ␣."""
    text = token.decode("utf-8", errors="replace")
    if text.isspace():
        text = text.replace(" ", "␣")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
