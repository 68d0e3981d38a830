"""One HTML page of training runs, sweeps and evaluations, with everything in it.

    python -m lsjax.cli.report runs/quickstart runs/plain --output report.html

RUN is a --workdir of train.py, the --output of lsjax.cli.sweep or a summary of lsjax.cli.evaluate;
those that lie in a run's directory, or one level below, belong to the run. Several runs are drawn
side by side. The pictures are in the page (for bright and for dark screens), which needs no other
file, no network and no script.
"""

import base64
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Annotated, Any

import jinja2
import tyro
from rich.console import Console

from lsjax.cli.errors import check_output, one_line_errors
from lsjax.cli.flags import parse_flags
from lsjax.cli.report_files import Evaluation, Found, Sweep, find
from lsjax.config import check
from lsjax.evaluation.exits import ExitScores, exits_to_show
from lsjax.evaluation.figures import check_plots, dark
from lsjax.evaluation.plots import plot_exits, plot_training
from lsjax.evaluation.speed import Row
from lsjax.evaluation.speed_plots import best_row, plot_acceptance, plot_sweep
from lsjax.evaluation.summary import WHOLE


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """One HTML page of training runs, sweeps and evaluations."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Directories of runs, sweeps and evaluations."""
    output: Path = Path("report.html")
    """The page."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; exits with 2 on bad input."""
    with one_line_errors():
        report(parse_flags(Arguments, argv, __doc__))
    return 0


def report(arguments: Arguments) -> None:
    """Reads everything and writes the page."""
    check(bool(arguments.runs), "no RUN is given: name the directory of one")
    check_plots()
    found = [find(path) for path in arguments.runs]
    names = [one.name for one in found]
    check(len({*names}) == len(names), f"runs of one name ({names}) can't be told apart: rename")
    check_output(arguments.output)
    arguments.output.write_text(page(found), encoding="utf-8")
    size = arguments.output.stat().st_size / 1e6
    Console(highlight=False, markup=False).print(f"{arguments.output}: {size:.1f} MB")


def page(found: Sequence[Found]) -> str:
    """The HTML; every text of a run is escaped by the template."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lsjax.cli", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scores = {one.name: one.scores for one in found if one.scores is not None}
    return environment.get_template("report.html").render(
        title=", ".join(one.name for one in found),
        version=metadata.version("lsjax"),
        glance=[glance(one) for one in found],
        exits=exits(scores) if scores else None,
        runs=[section(one) for one in found],
    )


def glance(found: Found) -> dict[str, str]:
    """A run in one line."""
    scores, line = found.scores, {"run": found.name}
    if found.model is not None:
        line["layers"] = str(found.model.num_layers)
        line["parameters"] = f"{found.model.num_params / 1e6:,.1f}M"
    if found.step is not None:
        line["steps"] = f"{found.step:,}"
    if scores is not None:
        line["held-out loss"] = f"{scores.loss_E[-1]:.3f}"
        quarter = max(1, len(scores.loss_E) // 4)
        line["agreement of exit L/4"] = f"{scores.agreement_E[quarter - 1]:.3f}"
    best = best_row([row for sweep in found.sweeps for row in sweep.rows])
    if best is not None:
        line |= {"best cell": cell_name(best), "speedup": f"{best.speedup:.2f}x"}
        line |= {"accepted": _or_dash(best.acceptance_rate, ".3f")}
        line |= {"share of the ideal": _or_dash(best.share_of_ideal, ".2f")}
    return line


def section(found: Found) -> dict[str, Any]:
    """All that is shown of one run."""
    config, metrics = found.config, found.metrics
    shown: dict[str, Any] = {"name": found.name, "training": None}
    shown["settings"] = [] if config is None else settings(config)
    if any(row["kind"] == "step" for row in metrics):
        shown["training"] = picture(lambda file: plot_training(metrics, file))
    texts = [row for row in metrics if row["kind"] == "sample"]
    shown["text"] = texts[-1] if texts else None
    shown["sweeps"] = [sweep_section(sweep) for sweep in found.sweeps]
    shown["evaluations"] = [evaluation_section(one) for one in found.evaluations]
    return shown


def settings(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The configuration, a line for each of its parts; what is empty or off is left out."""

    def words(part: Mapping[str, Any]) -> str:
        on = {k: v for k, v in part.items() if v is not False and v not in (None, "", [], {})}
        return ", ".join(f"{name} {_plain(value)}" for name, value in on.items())

    parts = {name: value for name, value in config.items() if isinstance(value, Mapping)}
    rest = {name: value for name, value in config.items() if name not in parts}
    lines = {"run": words(rest)} | {name: words(part) for name, part in parts.items()}
    return [(name.replace("_", " "), line) for name, line in lines.items() if line]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def exits(scores: dict[str, ExitScores]) -> dict[str, Any]:
    """Loss and agreement by exit of all runs that have been evaluated."""
    layers = max(len(score.loss_E) for score in scores.values())
    rows = []
    for exit_layer in exits_to_show(layers):
        cells = (cell for score in scores.values() for cell in score.cells(exit_layer))
        rows.append([str(exit_layer), *cells])
    return {
        "picture": picture(lambda file: plot_exits(scores, file)),
        "names": list(scores),
        "tokens": sorted({score.tokens for score in scores.values()}),
        "rows": rows,
    }


def sweep_section(sweep: Sweep) -> dict[str, Any]:
    """Heat maps, every cell, acceptance by position, and texts in the colours of their drafts."""
    best = best_row(sweep.rows)
    return {
        "name": sweep.name,
        "title": sweep.title,
        "best": None if best is None else cell_name(best),
        "picture": best and picture(lambda file: plot_sweep(sweep.rows, file)),
        "acceptance": best and picture(lambda file: plot_acceptance(sweep.rows, file)),
        "rows": [
            [
                "autoregressive" if row.exit_layer is None else cell_name(row),
                f"{row.tokens_per_second:,.1f}",
                f"{row.speedup:.2f}x",
                _or_dash(row.acceptance_rate, ".3f"),
                _or_dash(row.tokens_per_round, ".2f"),
                _or_dash(row.ideal, ".2f"),
                _or_dash(row.share_of_ideal, ".2f"),
                _or_dash(row.predicted, ".2f"),
            ]
            for row in sweep.rows
        ],
        "samples": sweep.samples,
    }


def evaluation_section(one: Evaluation) -> dict[str, Any]:
    """The scores and speeds of each strategy and group of examples."""
    names = list(dict.fromkeys(name for row in one.figures for name in row["scores"]))
    rows, categories = [], []
    for row in one.figures:
        cells = [row["strategy"], row["group"], str(row["examples"])]
        for name in names:
            score = row["scores"].get(name, {"mean": None, "stderr": None})
            cells.append(_or_dash(score["mean"], ".3f"))
            if score["stderr"] is not None:
                cells[-1] += f" ± {score['stderr']:.3f}"
        figures = (("tokens_per_second", ".1f"), ("ms_per_token", ".2f"), ("speedup", ".2f"))
        figures += (("acceptance_rate", ".3f"), ("tokens_per_round", ".2f"))
        figures += (("ideal", ".2f"), ("share_of_ideal", ".2f"))
        cells += [_or_dash(row[name], form) for name, form in figures]
        (rows if row["group"] in WHOLE else categories).append(cells)
    return {
        "name": one.name,
        "asked": [
            (name, json.dumps(value, ensure_ascii=False)) for name, value in one.asked.items()
        ],
        "bad_rows": one.bad_rows,
        "scores": names,
        "rows": rows,
        "categories": categories,
    }


def cell_name(row: Row) -> str:
    """E, d and the draft vocabulary."""
    vocabulary = f", {row.draft_vocab} tokens" if row.draft_vocab else ""
    return f"E = {row.exit_layer}, d = {row.num_draft_tokens}{vocabulary}"


def picture(draw: Callable[[IO[bytes]], None]) -> dict[str, str]:
    """A drawing as data URIs, for bright and for dark pages."""

    def uri() -> str:
        file = io.BytesIO()
        draw(file)
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

    with dark():
        on_dark = uri()
    return {"bright": uri(), "dark": on_dark}


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    sys.exit(main())
