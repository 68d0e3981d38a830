"""What people see of a completion: the text in the colours of its origin, and a line of figures."""

from collections.abc import Sequence

from rich.segment import Segment, Segments
from rich.text import Text

from lsjax.data.detokenize import StreamDecoder
from lsjax.data.tokenizers import Tokenizer
from lsjax.decoding.completion import Completion

ACCEPTED = "bold green"
CORRECTED = "bold red"
REFUSED = "dim red strike"
ADDED = "bold blue"

LEGEND = Text.assemble(
    ("accepted draft", ACCEPTED),
    "   ",
    ("refused draft", REFUSED),
    (" its correction", CORRECTED),
    "   ",
    ("the model's own token after a draft that was all right", ADDED),
)


def coloured(tokenizer: Tokenizer, prompt_ids: Sequence[int], completion: Completion) -> Text:
    """The new text, each token in the colour of where it came from (see LEGEND)."""
    trace = completion.trace
    stream = StreamDecoder(tokenizer, prompt_ids)
    text = Text()
    shown = 0
    for token, accepted, replaced in zip(
        trace.tokens_n, trace.accepted_n, trace.replaced_n, strict=True
    ):
        if replaced >= 0:
            refused = tokenizer.token_bytes(int(replaced), skip_special=False)
            text.append(_visible(refused), REFUSED)
        style = ACCEPTED if accepted else CORRECTED if replaced >= 0 else ADDED
        piece = stream.push([int(token)])
        # The completion's text ends before a stop string, the tokens behind it.
        text.append(piece[: max(0, len(completion.text) - shown)], style)
        shown += len(piece)
    text.append(stream.finish()[: max(0, len(completion.text) - shown)])
    return text


def verbatim(text: str) -> Segments:
    """For a console's print: rich expands tabs and turns ":smile:" into a picture otherwise."""
    return Segments([Segment(text)])


def summary(completions: Sequence[Completion], wall_seconds: float) -> str:
    """One line: tokens, seconds, speed, and how the drafts did."""
    tokens = sum(c.num_new_tokens for c in completions)
    later = tokens - len(completions)
    drafted = sum(c.drafted for c in completions)
    rounds = sum(c.rounds for c in completions)
    parts = [f"{tokens} new tokens"]
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
    """A refused token's text on one line; a line break in it would move the text around it."""
    text = token.decode("utf-8", errors="replace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
