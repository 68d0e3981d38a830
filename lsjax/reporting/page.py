"""The page of a report, as HTML without outside parts and as Markdown."""

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import jinja2

from lsjax.config import AnyPath
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.evaluation.intervals import Estimate
from lsjax.evaluation.speeds import doubts
from lsjax.io.files import write_whole
from lsjax.reporting import pictures
from lsjax.reporting.figures import (
    NAMES,
    Speed,
    agreements,
    choices,
    equal_texts,
    in_doubt,
    losses,
    speeds,
    summarised,
)
from lsjax.reporting.markdown import table
from lsjax.reporting.record import Report

HTML, MARKDOWN = "report.html", "report.md"
SHOWN_EXITS = 8  # rows of the table of exits, evenly spaced


def write_page(report: Report, directory: AnyPath) -> AnyPath:
    """Draws the pictures and writes both pages; returns the HTML file."""
    shown = content(report) | {"pictures": pictures.draw(report, directory)}
    return write_forms(shown, directory)


def write_forms(shown: dict[str, Any], directory: AnyPath) -> AnyPath:
    """Writes the content of a page in both forms; returns the HTML file."""
    svgs = {name: (directory / name).read_text("utf-8") for name in shown["pictures"]}
    html = template("page.html.jinja", autoescape=True).render(shown, svgs=svgs)
    write_whole(directory / HTML, html.encode())
    write_whole(directory / MARKDOWN, template("page.md.jinja").render(shown).encode())
    return directory / HTML


def template(name: str, autoescape: bool = False) -> jinja2.Template:
    """One of the templates beside this file."""
    source = files("lsjax.reporting").joinpath(name).read_text("utf-8")
    settings = dict(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment = jinja2.Environment(autoescape=autoescape, **settings)
    environment.filters["table"] = lambda rows: "\n".join(table(rows))
    environment.filters["as_code"] = lambda named: [(k, f"`{v}`") for k, v in named.items()]
    return environment.from_string(source)


def content(report: Report) -> dict[str, Any]:
    """All that the templates show, but for the pictures."""
    found = speeds(report)
    drafting = [answer for one in report.of(report.main) for answer in one.answers]
    drafting = [one for one in drafting if one["strategy"] == SelfSpeculative.name]
    return shown_content(f"Does LayerSkip pay for {report.title}?", report.answer) | {
        "warning": doubts([one.figures for one in found]),
        "facts": facts(report),
        "tables": {"exits": exit_table(report), "speeds": speed_table(found)},
        "texts": report.texts,
        "longest": max((len(one["drafted_by_position"]) for one in drafting), default=0),
        "about": report.about,
        "recipe": {path: plain(value) for path, value in report.recipe.items()},
    }


def shown_content(title: str, sentence: str) -> dict[str, Any]:
    """What the templates need at least; other parts are empty."""
    names = ("facts", "texts", "pictures")
    empty: dict[str, Any] = {name: [] for name in names} | {"about": {}, "recipe": {}}
    return empty | {"title": title, "answer": sentence, "warning": "", "tables": {}}


def facts(report: Report) -> list[tuple[str, str]]:
    """The figures of the answer, with what they are taken from."""
    found = summarised(report)
    rows = [("held-out loss of the last exit", with_source(found.loss, ".3f"))]
    if found.plain_loss is not None and found.loss_difference is not None:
        rows.append(("the same without LayerSkip", with_source(found.plain_loss, ".3f")))
        rows.append(("difference", with_source(found.loss_difference, "+.3f")))
    rows += [
        (f"{report.score}, {NAMES[kind]}", with_source(one, ".3f"))
        for kind, one in found.scores.items()
    ]
    if found.score_difference is not None:
        rows.append(("difference of the scores", with_source(found.score_difference, "+.3f")))
    for one in (found.auto, found.fixed):
        if one is not None:
            rows.append((f"speedup of {one.cell}", with_source(one.speedup, ".2f")))
    drafted = [
        f"{name} in {share:.0%} of its rounds, {tokens:.1f} new tokens a round"
        for name, share, tokens in choices(report)
    ]
    if drafted:
        rows.append(("auto drafted with", "; ".join(drafted)))
    equal, texts = equal_texts(report)
    if texts:
        same = f"{equal} of {texts} equal the text of autoregressive decoding"
        rows.append(("greedy texts with drafts", same))
    shape = report.shape
    size = f"{shape.num_params / 1e6:,.1f} million parameters, {shape.num_layers} layers"
    rows.append(("model", f"{size} of width {shape.hidden_size}"))
    for model in report.models:
        if model.training_seconds:
            name = f"training {NAMES[model.kind]}, seed {model.seed}"
            rows.append((name, f"{model.training_seconds / 60:.1f} minutes"))
    return rows


def with_source(found: Estimate, form: str) -> str:
    """A figure with its interval, and what the interval comes from."""
    if found.low is None:
        return found.text(form)
    return f"{found.text(form)}, 95% interval from {found.count} {found.of}"


def exit_table(report: Report) -> list[list[str]]:
    """Loss and agreement at some exits, of which those with a loss in training are marked."""
    kinds = [kind for kind in NAMES if report.of(kind)]
    trained = report.of(report.main)[0].exits
    layers = report.shape.num_layers
    most = min(SHOWN_EXITS, layers)
    shown = sorted({*trained, *(-(-layers * part // most) for part in range(1, most + 1))})
    heading, columns = ["exit"], []
    for kind in kinds:
        heading += [f"loss {NAMES[kind]}", f"agreement {NAMES[kind]}"]
        columns += [losses(report, kind), agreements(report, kind)]
    rows = [
        [f"{exit_layer}{'*' * (exit_layer in trained)}"]
        + [column[exit_layer - 1].text(".3f") for column in columns]
        for exit_layer in shown
    ]
    return [heading, *rows]


FIGURES = {  # of a strategy, after its speed, with their formats
    "acceptance_rate": ".3f",
    "tokens_per_round": ".2f",
    "ideal": ".2f",
    "repeated_4grams": ".2f",
}


def speed_table(found: Sequence[Speed]) -> list[list[str]]:
    """Speed of each strategy, the fastest first; empty without any."""
    names = ["strategy", "speedup", "tokens/s", "accepted", "tokens/round", "ideal", "repeated"]
    rows = [names] if found else []
    for one in sorted(found, key=lambda one: -one.speedup.value):
        row, doubt = one.figures, "" if one.figures["trusted"] else "?"
        cells = [str(one.cell), in_doubt(one), f"{row['tokens_per_second']:.1f}{doubt}"]
        for name, form in FIGURES.items():
            cells.append("-" if row[name] is None else format(row[name], form))
        rows.append(cells)
    return rows


def plain(value: Any) -> str:
    """A field's value in words."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
