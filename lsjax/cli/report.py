"""Reports, from the command line and from Python (`lsjax report`, `lsjax.report`)."""

import shlex
import sys
from dataclasses import replace
from typing import Any

from rich.console import Console

from lsjax.cli.flags.evaluate import TaskName
from lsjax.cli.flags.report import Arguments, Parsed, base_config, templates_of
from lsjax.cli.report_compare import as_reports
from lsjax.cli.report_making import asked, make_report
from lsjax.cli.setup import keep_compiled_programs, keep_freed_memory
from lsjax.cli.show import show_cells
from lsjax.cli.shown_run import to_its_end
from lsjax.config import AnyPath, DataConfig, TrainConfig, check
from lsjax.interrupts import keeps
from lsjax.reporting.compared import compare
from lsjax.reporting.figures import speeds
from lsjax.reporting.record import Report
from lsjax.terminal import SafeConsole


def report(parsed: Parsed) -> int:
    """Makes the report and prints its answer. Returns 1 if training fails, or 128 + the number of a
    signal that stopped it."""
    output, console = parsed.given.output, SafeConsole(soft_wrap=True)
    check(output is not None, "--output is missing: name the directory of the report")
    keeps("the same command goes on with what is missing")
    keep_freed_memory()
    keep_compiled_programs()
    if parsed.given.compare:
        reports = as_reports(parsed.given.compare, output, console)
        show(*compare(reports, output), console)
        return 0
    command = shlex.join(["lsjax", "report", *sys.argv[2:]])
    wanted = asked(parsed.flags, parsed.base, has_config=parsed.given.config is not None)

    def make() -> None:
        made, page = make_report(wanted, output, console, command)
        rows = [one.figures for one in speeds(made)]
        if rows:
            show_cells(made.title, rows)
        show(made.answer, page, console)

    return to_its_end(make, console)


def show(sentence: str, page: AnyPath, console: Console) -> None:
    """Prints the answer, and where its page is."""
    console.print(sentence, style="bold")
    console.print(f"page: {page}")


def report_of(
    output: AnyPath,
    console: Console,
    *,
    model: AnyPath | None,
    config: TrainConfig | None,
    data: DataConfig | None,
    task: TaskName | None = None,
    training: bool = True,
    **options: Any,
) -> Report:
    """`lsjax.report`. Raises ConfigError if there is no model, no configuration or no data."""
    check(
        model is not None or config is not None,
        "model and config are both None: give a model to train further, or the config of a new one",
    )

    def chosen_data(own: DataConfig | None) -> DataConfig:
        found = data or own
        check(found is not None, "data is None: give the text to train and to measure on")
        settings = templates_of(task)
        if model is not None and data is not None:
            settings["tokenizer"] = str(model)
        return replace(found, **settings)

    base = base_config(model, training, config, chosen_data)
    given = dict(output=output, model=model, task=task, training=training, **options)
    flags = Arguments(fields=base, **given)
    wanted = asked(flags, base, has_config=config is not None)
    return make_report(wanted, output, console, "lsjax.report(...)")[0]
