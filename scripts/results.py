"""Writes docs/results.md, and the tables of README.md, from the reports of scripts/evidence.py.

    python scripts/results.py

A section stands between two comments with its name. Sections without a report or table in
build/evidence keep what they have, so the experiments can be made on several days. A picture with
the experiment's name, such as grpo/grpo.png, is copied beside the page.
"""

import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import wrap

from evidence_list import EXPERIMENTS, TABLE, Experiment

from lsjax.reporting.figures import in_doubt, speeds, summarised
from lsjax.reporting.markdown import table
from lsjax.reporting.page import exit_table, facts, speed_table
from lsjax.reporting.record import REPORT, Report, read_report

PAGE, README = Path("docs/results.md"), Path("README.md")
HEADING = (
    "speedup of auto",
    "of the best fixed setting",
    "loss, with LayerSkip less without",
)
COLUMNS = 100
ABOUT = ("machine", "versions", "commit", "date", "held out", "prompts")


def main() -> int:
    """Writes what has a report."""
    page, rows = PAGE.read_text("utf-8"), {}
    for one in filter(lambda one: one.is_done, EXPERIMENTS):
        page = replaced(page, one.name, section(one))
        if (one.directory / REPORT).exists():
            report = read_report(one.directory)
            rows[one.title] = report.about["machine"], row(one, report)
    PAGE.write_text(page, "utf-8")
    if rows:
        readme = README.read_text("utf-8")
        README.write_text(replaced(readme, "results", tables_of(readme, rows)), "utf-8")
    return 0


def tables_of(readme: str, new: dict[str, tuple[str, Sequence[str]]]) -> list[str]:
    """README's tables with new rows, one for each machine. Others keep what they have."""
    old = readme.partition("<!-- results -->\n")[2].partition("<!-- end results -->")[0]
    found = {}
    for block in filter(None, old.split("\n\n")):
        heading, _, *rows = (line.strip("| ").split(" | ") for line in block.splitlines())
        found |= {cells[0]: (heading[0].removeprefix("on "), cells) for cells in rows}
    found |= new
    titles = [one.title for one in EXPERIMENTS if one.title in found]
    lines: list[str] = []
    for machine in dict.fromkeys(found[title][0] for title in titles):
        own = [found[title][1] for title in titles if found[title][0] == machine]
        lines += [*([""] if lines else []), *table([(f"on {machine}", *HEADING), *own])]
    return lines


def replaced(page: str, name: str, lines: Iterable[str]) -> str:
    """The page with another text between the comments of a name."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end {name} -->\n"
    if begin not in page or end not in page:
        raise SystemExit(f"the comments {begin.strip()} and {end.strip()} are missing")
    before, _, rest = page.partition(begin)
    return "".join([before, begin, *(f"{line}\n" for line in lines), end, rest.partition(end)[2]])


def section(experiment: Experiment) -> list[str]:
    """A section of docs/results.md."""
    file = experiment.directory / TABLE
    if file.exists():
        own = file.read_text("utf-8").splitlines()
    else:
        own = of_report(read_report(experiment.directory))
    text = wrap(experiment.text, COLUMNS, break_on_hyphens=False)
    lines = [f"## {experiment.title}", "", *text, "", f"    {experiment.command}", "", *own]
    picture = experiment.directory / f"{experiment.name}.png"
    if picture.exists():
        shutil.copyfile(picture, PAGE.with_name(picture.name))
        lines += ["", f"![{experiment.title}]({picture.name})"]
    paper = experiment.paper.strip().splitlines()
    return [*lines, *(["", *paper] if paper else [])]


def of_report(report: Report) -> list[str]:
    """The tables of a report, and where it was made."""
    about = [(name, report.about[name]) for name in ABOUT if name in report.about]
    parts = [("figure", "value"), *facts(report), *about], speed_table(speeds(report))
    return [line for rows in (*parts, exit_table(report)) for line in (*table(rows), "")]


def row(experiment: Experiment, report: Report) -> list[str]:
    """A row of README's tables."""
    found = summarised(report)
    cells = [experiment.title]
    for one in (found.auto, found.fixed):
        cells.append("-" if one is None else in_doubt(one))
    cells[-1] += "" if found.fixed is None else f", {found.fixed.cell}"
    gap = found.loss_difference
    return [*cells, "-" if gap is None else gap.text("+.3f")]


if __name__ == "__main__":
    sys.exit(main())
