"""What people see of a completion: the text in the colours of its origin, and a line of figures."""

from collections import deque
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.segment import Segment, Segments
from rich.text import Text

from lsjax.data.tokenizer import StreamDecoder, Tokenizer
from lsjax.decoding.completion import Completion, Trace
from lsjax.decoding.run import Update

ACCEPTED = "bold green"
CORRECTED = "bold red"
REFUSED = "dim red strike"
GAP = "dim red"  # the space before a refused word: struck, it would look like a dash
ADDED = "bold blue"

LEGEND = Text.assemble(
    ("accepted draft", ACCEPTED),
    "   ",
    ("refused draft", REFUSED),
    (" its correction", CORRECTED),
    "   ",
    ("the model's own, after a draft that was all right", ADDED),
)

ORIGINS = {
    ACCEPTED: "accepted",
    CORRECTED: "corrected",
    REFUSED: "refused",
    GAP: "refused",
    ADDED: "added",
}


class Colours:
    """New text as it is found, each token in the colour of where it came from (see LEGEND)."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer, prompt_ids)
        self._read = 0  # tokens of the trace
        self._waiting: deque[tuple[str, str]] = deque()  # text and style

    def push(self, trace: Trace, text: str, *, last: bool = False) -> Text:
        """The next piece of the text in colours, and what was refused on the way. last: what the
        trace holds behind the piece is no text, a stop string."""
        for index in range(self._read, len(trace)):
            accepted, replaced = trace.accepted_n[index], int(trace.replaced_n[index])
            if replaced >= 0:
                refused = self._tokenizer.token_bytes(replaced, skip_special=False)
                self._waiting.append((_visible(refused), REFUSED))
            style = ACCEPTED if accepted else CORRECTED if replaced >= 0 else ADDED
            self._waiting.append((self._decoder.push([int(trace.tokens_n[index])]), style))
        self._read = len(trace)
        if last:
            self._waiting.append((self._decoder.finish(), ""))
        shown, left = Text(), len(text)
        while self._waiting:
            piece, style = self._waiting.popleft()
            if style == REFUSED:
                word = piece.lstrip(" ")
                shown.append(piece[: len(piece) - len(word)], GAP)
                shown.append(word, style)
                continue
            shown.append(piece[:left], style)
            if len(piece) > left and not last:
                self._waiting.appendleft((piece[left:], style))
                break
            left -= min(left, len(piece))
        return shown


def coloured(tokenizer: Tokenizer, prompt_ids: Sequence[int], completion: Completion) -> Text:
    """A whole text in colours."""
    return Colours(tokenizer, prompt_ids).push(completion.trace, completion.text, last=True)


def origins(text: Text) -> list[tuple[str, str]]:
    """Coloured text in pieces: each with where it came from, a word of ORIGINS or ""."""
    pieces = [(text.plain[span.start : span.end], ORIGINS[str(span.style)]) for span in text.spans]
    end = text.spans[-1].end if text.spans else 0
    return [*pieces, (text.plain[end:], "")] if end < len(text.plain) else pieces


def stream(people: Console, updates: Iterable[Update], colours: Colours | None) -> Completion:
    """Shows one text as it is found, in colours if there are some; gives its completion."""
    for update in updates:
        if colours is None:
            people.print(verbatim(update.text))
        else:
            last = update.completion is not None
            people.print(colours.push(update.trace, update.text, last=last), end="")
    people.print()
    return update.completion


def verbatim(text: str) -> Segments:
    """For a console's print: rich expands tabs and turns ":smile:" into a picture otherwise."""
    return Segments([Segment(text)])


def summary(completions: Sequence[Completion], wall_seconds: float) -> str:
    """One line: tokens, seconds, speed, and how the drafts did."""
    tokens = sum(c.num_new_tokens for c in completions)
    later = tokens - len(completions)
    drafted = sum(c.drafted for c in completions)
    rounds = sum(c.rounds for c in completions)
    parts = [f"{tokens} new token{'s' * (tokens != 1)}"]
    if later and wall_seconds > 0:
        parts[0] += f" at {later / wall_seconds:.1f} tokens/s"
    if drafted:
        accepted = sum(c.accepted for c in completions)
        parts.append(f"{accepted} of {drafted} drafts accepted ({accepted / drafted:.0%})")
        parts.append(f"{later / rounds:.2f} tokens per round")
    reasons = [c.finish_reason for c in completions]
    parts.append(", ".join(f"{reasons.count(r)} ended by {r}" for r in sorted(set(reasons))))
    return "; ".join(parts)


def _visible(token: bytes) -> str:
    """A refused token's text on one line; a line break in it would move the text around it, and
    spaces alone would not be seen."""
    text = token.decode("utf-8", errors="replace")
    if text.isspace():
        text = text.replace(" ", "␣")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
