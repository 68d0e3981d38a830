"""Terminal output: texts coloured by origin, and tables of figures."""

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from itertools import islice
from typing import Any

from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from rich.table import Table
from rich.text import Text

from lsjax.data.tokenizer import StreamDecoder, Tokenizer
from lsjax.decoding.auto.adaptive import Adaptive
from lsjax.decoding.completion import Completion, Trace
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import Request
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.strategy import Strategy
from lsjax.evaluation.comparison import FLOAT32_MARGIN, margin_of
from lsjax.evaluation.exits import ExitScores
from lsjax.evaluation.many_rows import ACCEPTANCES, RoundCost, fastest
from lsjax.evaluation.scores import Answer
from lsjax.terminal import SafeConsole, verbatim

ACCEPTED = "bold green"
LOOKED_UP = "bold yellow"
CORRECTED = "bold red"
REJECTED = "dim red strike"
GAP = "dim red"  # the space before a rejected word; a struck space looks like a dash
ADDED = "bold blue"

# Heading -> name and format of the figure.
COLUMNS = {
    "E": ("exit_layer", ""),
    "d": ("num_draft_tokens", ""),
    "N": ("draft_vocab", ""),
    "c": ("draft_confidence", ""),
    "tokens/s": ("tokens_per_second", ".1f"),
    "from": ("slowest", ".1f"),
    "to": ("fastest", ".1f"),
    "speedup": ("speedup", ".2f"),
    "accepted": ("acceptance_rate", ".3f"),
    "tokens/round": ("tokens_per_round", ".2f"),
    "ideal": ("ideal", ".2f"),
    "share": ("share_of_ideal", ".2f"),
    "equal": ("equal", ""),
    "differ": ("differ", ""),
    "margin": ("widest_margin", ".1e"),
    "compiling, s": ("compile_seconds", ".1f"),
}


def legend(strategy: Strategy) -> Text:
    """The colours of a strategy's texts."""
    return Text.assemble(
        ("accepted draft   ", ACCEPTED),
        ("draft found in the text   " if isinstance(strategy, Adaptive) else "", LOOKED_UP),
        ("rejected draft", REJECTED),
        (" its correction   ", CORRECTED),
        ("the model's own, after a draft that was all right", ADDED),
    )


class Colours:
    """New text as it is decoded, each token coloured by its origin (see `legend`)."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer, prompt_ids)
        self._read = 0  # tokens of the trace
        self._waiting: deque[tuple[str, str]] = deque()  # text and style

    def push(self, trace: Trace, text: str, *, last: bool = False) -> Segments:
        """The next piece of text in colours, with its rejected drafts. last: the text ends with
        this piece. Tokens after it in the trace belong to a stop string."""
        for index in range(self._read, len(trace)):
            style, replaced = ADDED, int(trace.replaced_n[index])
            if replaced >= 0:
                rejected = self._tokenizer.token_bytes(replaced, skip_special=False)
                self._waiting.append((_visible(rejected), REJECTED))
                style = CORRECTED
            if trace.accepted_n[index]:
                looked_up = trace.source_n is not None and trace.source_n[index] == 0
                style = LOOKED_UP if looked_up else ACCEPTED
            self._waiting.append((self._decoder.push([int(trace.tokens_n[index])]), style))
        self._read = len(trace)
        if last:
            self._waiting.append((self._decoder.finish(), ""))
        shown: list[Segment] = []

        def show(piece: str, style: str) -> None:
            if piece:
                shown.append(Segment(piece, Style.parse(style)))

        left = len(text)
        while self._waiting:
            piece, style = self._waiting.popleft()
            if style == REJECTED:
                word = piece.lstrip(" ")
                show(piece[: len(piece) - len(word)], GAP)
                show(word, style)
                continue
            show(piece[:left], style)
            if len(piece) > left and not last:
                self._waiting.appendleft((piece[left:], style))
                break
            left -= min(left, len(piece))
        return Segments(shown)


def coloured(tokenizer: Tokenizer, prompt_ids: Sequence[int], completion: Completion) -> Segments:
    """A complete text in colours, for `SafeConsole.print`, which adds no newline to it."""
    return Colours(tokenizer, prompt_ids).push(completion.trace, completion.text, last=True)


def stream(
    people: Console, engine: Engine, request: Request, *, show_drafts: bool, **options: Any
) -> Completion:
    """Prints the text of a prompt of token ids as it is decoded, and returns its completion.
    show_drafts: in colours. options: of `Engine.watch`."""
    colours = Colours(engine.tokenizer, request.prompt)
    with closing(engine.watch(request, **options)) as updates:
        for update in updates:
            if show_drafts:
                last = update.completion is not None
                people.print(colours.push(update.trace, update.text, last=last))
            else:
                people.print(verbatim(update.text))
    people.print()
    return update.completion


def summary(completions: Sequence[Completion], wall_seconds: float) -> str:
    """One line with tokens, speed, acceptance of drafts, and reasons for ending."""
    tokens = sum(c.num_new_tokens for c in completions)
    later = tokens - len(completions)
    drafted = sum(c.drafted for c in completions)
    parts = [f"{tokens} new token{'s' * (tokens != 1)}"]
    if later and wall_seconds > 0:
        parts[0] += f" at {later / wall_seconds:.1f} tokens/s"
    if drafted:
        accepted = sum(c.accepted for c in completions)
        parts.append(f"{accepted} of {drafted} drafts accepted ({accepted / drafted:.0%})")
        rounds = sum(c.rounds for c in completions)
        parts.append(f"{later / rounds:.2f} tokens per round")
    chosen, given = Counter(), Counter()  # rounds and tokens of each source of drafts
    for completion in completions:
        for name, one in (completion.sources or {}).items():
            chosen[name] += one["rounds"]
            given[name] += one["tokens"]
    sources = [
        f"{name}: {times / chosen.total():.0%} of rounds, {given[name] / times:.2f} tokens each"
        for name, times in chosen.most_common()
    ]
    parts += [", ".join(sources)] if sources else []
    reasons = Counter(c.finish_reason for c in completions)
    parts.append(", ".join(f"{n} ended by {reason}" for reason, n in sorted(reasons.items())))
    return "; ".join(parts)


def _visible(token: bytes) -> str:
    """A rejected token's text on one line: line breaks are escaped, spaces alone drawn as ␣."""
    text = token.decode("utf-8", errors="replace")
    if text.isspace():
        text = text.replace(" ", "␣")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def notes_console() -> Console:
    """A console on stderr, for notes that are not part of the result."""
    return SafeConsole(stderr=True, soft_wrap=True, style="dim")


def wide_console() -> Console:
    """A console wide enough for tables, even if the output is a file."""
    console = SafeConsole()
    if not console.is_terminal:
        console.width = 200
    return console


def table(
    title: str,
    names: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    *,
    left: int = 0,
    best: int | None = None,
) -> Table:
    """A table with its first `left` columns left-aligned. best: index of the row shown in green."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column, name in enumerate(names):
        made.add_column(name, justify="left" if column < left else "right")
    for number, row in enumerate(rows):
        made.add_row(*row, style="bold green" if number == best else None)
    return made


def exit_table(title: str, scores: Mapping[str, ExitScores]) -> Table:
    """Loss, perplexity and agreement of each model, at the first exit and at each eighth of the
    layers. Eighths are rounded up, as in the paper: the quarters of 30 layers are 8, 15 and 23."""
    layers = max(len(one.loss_E) for one in scores.values())
    rows, names = [], ["exit"]
    for name in scores:
        names += [f"{name}: loss" if len(scores) > 1 else "loss", "perplexity", "agreement"]
    for exit_layer in sorted({1, *(-(-layers * eighth // 8) for eighth in range(1, 9))}):
        row = [str(exit_layer)]
        for one in scores.values():
            figures = zip(one.loss_E, one.perplexity_E, one.agreement_E, strict=True)
            own = next(islice(figures, exit_layer - 1, None), (None, None, None))
            row += map(or_dash, own, (".3f", ".2f", ".3f"))
        rows.append(row)
    return table(title, names, rows)


def or_dash(value: object, form: str = "") -> str:
    """The formatted value; a dash for None."""
    return "-" if value is None else format(value, form)


def show_cells(title: str, rows: Sequence[Answer]) -> None:
    """Prints the benchmark's rows as a table, with the best speedup in green."""
    best = max(range(len(rows)), key=lambda number: rows[number]["speedup"])
    lines = []
    for row in rows:
        figures = [or_dash(row[name], form) for name, form in COLUMNS.values()]
        lines.append([row["strategy"].replace("_", " "), row["group"], *figures])
    faster = best if rows[best]["speedup"] > 1 else None
    headings = ["strategy", "prompts", *COLUMNS]
    wide_console().print(table(title, headings, lines, left=2, best=faster))


def show_costs(title: str, costs: Sequence[RoundCost]) -> None:
    """Prints what rounds of many rows cost, from which acceptance on they pay, and their speedups
    at assumed acceptances. The best ones of a number of rows are green."""
    headings = ["rows", "E", "d", "token, ms", "round, ms", "round, tokens", "pays from"]
    headings += [f"at {acceptance}" for acceptance in ACCEPTANCES]
    lines = []
    for cost in costs:
        own = [other for other in costs if other.rows == cost.rows]
        times = (f"{1e3 * seconds:.1f}" for seconds in (cost.token_seconds, cost.round_seconds))
        line = [str(cost.rows), str(cost.exit_layer), str(cost.num_draft_tokens), *times]
        line += [f"{cost.tokens:.2f}", or_dash(cost.pays_from, ".2f")]
        for acceptance in ACCEPTANCES:
            is_best = cost == fastest(own, acceptance)
            line.append(Text(f"{cost.speedup(acceptance):.2f}", "bold green" * is_best))
        lines.append(line)
    wide_console().print(table(title, headings, lines))


def show_verdict(answers: Sequence[Answer], dtype: str) -> int:
    """Prints whether float32 texts match autoregressive decoding. Returns 1 if one does not."""
    console = SafeConsole(soft_wrap=True)
    differences = [one["difference"] for one in answers if one["difference"]]
    wrong = sum(margin_of(one) > FLOAT32_MARGIN for one in differences)
    drafting = (SelfSpeculative.name, Adaptive.name)
    drafted = {one["seed"] for one in answers if one["strategy"] in drafting}
    if dtype == "float32" and wrong:
        line = f"{wrong} texts differ by a margin above {FLOAT32_MARGIN:.0e}"
        console.print(line, style="bold red")
        return 1
    if dtype == "float32" and drafted == {None}:
        line = "Self-speculation gives the same tokens as autoregressive decoding."
        console.print(line, style="green")
    return 0
