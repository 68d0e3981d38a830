"""Terminal output: a line of figures about texts, and tables."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lsjax.decoding.auto.adaptive import Adaptive
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.evaluation.comparison import FLOAT32_MARGIN, margin_of
from lsjax.evaluation.exits import ExitScores
from lsjax.evaluation.many_rows import ACCEPTANCES, RoundCost, fastest
from lsjax.evaluation.scores import Answer
from lsjax.evaluation.speeds import doubts
from lsjax.terminal import SafeConsole

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
    "repeated": ("repeated_4grams", ".2f"),
    "ideal": ("ideal", ".2f"),
    "share": ("share_of_ideal", ".2f"),
    "equal": ("equal", ""),
    "differ": ("differ", ""),
    "margin": ("widest_margin", ".1e"),
    "compiling, s": ("compile_seconds", ".1f"),
}
TIMED = ("tokens_per_second", "speedup", "share_of_ideal")  # figures that a busy machine changes
LEGEND = (
    "E exit, d draft tokens, N draft vocabulary, c draft confidence, repeated: share of 4-grams "
    "that the text contains earlier, ideal: speedup by bytes read, share: speedup / ideal, equal "
    "and differ: greedy texts beside those of autoregressive decoding"
)


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
    """Prints the benchmark's rows as a table, with the best trusted speedup in green."""
    best = max(range(len(rows)), key=lambda n: (rows[n]["trusted"], rows[n]["speedup"]))
    lines = []
    for row in rows:
        figures = []
        for name, form in COLUMNS.values():
            doubt = "?" * (name in TIMED and row[name] is not None and not row["trusted"])
            figures.append(or_dash(row[name], form) + doubt)
        lines.append([row["strategy"].replace("_", " "), row["group"], *figures])
    faster = best if rows[best]["speedup"] > 1 else None
    headings, console = ["strategy", "prompts", *COLUMNS], wide_console()
    console.print(table(title, headings, lines, left=2, best=faster))
    console.print(LEGEND, style="dim")
    if doubt := doubts(rows):
        console.print(doubt, style="bold yellow")


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
