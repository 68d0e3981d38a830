"""Makes reports: fits the work into the time, trains, measures, and writes the page.

Each part leaves a file in the report's directory, and is left out where that is there:

    plan.json                       how much is trained and decoded
    runs/layerskip-0, plain-0       the trainings, one of each kind for each seed
    answers-layerskip-0.jsonl       decoded texts, a line for each
    measured-layerskip-0.json       what was measured of one model
    texts.json                      texts with the origin of their tokens
    report.json, .html, .md, *.svg  the report
"""

import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from typing import Any

from rich.console import Console

from lsjax.checkpoints.run import CHECKPOINTS, is_run, read_metrics, read_run_config
from lsjax.checkpoints.steps import saved_steps
from lsjax.cli.flags.report import Arguments, Parsed, base_config
from lsjax.cli.report_measures import Measures
from lsjax.cli.setup import keep_compiled_programs, keep_freed_memory
from lsjax.cli.show import show_cells
from lsjax.cli.shown_run import shown_run
from lsjax.config import AnyPath, DataConfig, Sampling, TrainConfig, as_path, check
from lsjax.evaluation import installed
from lsjax.interrupts import keeps
from lsjax.io.files import remove_directory, writing
from lsjax.reporting import machine
from lsjax.reporting.compared import compare
from lsjax.reporting.figures import in_words, speeds
from lsjax.reporting.page import write_page
from lsjax.reporting.plan import (
    DEFAULT_MINUTES,
    Asked,
    Plan,
    Speeds,
    make_plan,
    read_plan,
    write_plan,
)
from lsjax.reporting.recipes import chosen, with_steps, without_layerskip
from lsjax.reporting.record import REPORT, Kind, Report, write_report
from lsjax.terminal import SafeConsole
from lsjax.training.run import Interrupted, TooManySkipped

TRIAL_STEPS, TRIAL_TOKENS = 5, 32  # that are timed in the first minutes
COMPARED_PROMPTS = 16  # of runs and models that have no report


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
        return show(*compare(reports, output), console)
    command = shlex.join(["lsjax", "report", *sys.argv[2:]])
    try:
        wanted = asked(parsed.flags, parsed.base, has_config=parsed.given.config is not None)
        made, page = make_report(wanted, output, console, command)
    except Interrupted as stopped:
        console.print(f"{stopped}: the same command resumes it")
        return 128 + stopped.number
    except TooManySkipped as failure:
        console.print(f"error: {failure}", style="bold red")
        return 1
    rows = [one.figures for one in speeds(made)]
    if rows:
        show_cells(made.title, rows)
    return show(made.answer, page, console)


def show(sentence: str, page: AnyPath, console: Console) -> int:
    """Prints the answer, and where its page is."""
    console.print(sentence, style="bold")
    console.print(f"page: {page}")
    return 0


def as_reports(paths: Sequence[AnyPath], output: AnyPath, console: Console) -> list[AnyPath]:
    """Report directories of reports, runs and models. Reports on runs and models as they are get
    made in the output, on the held-out data of the first run. Raises ConfigError if there is none.
    """
    config = next((read_run_config(path) for path in paths if is_run(path)), None)
    found = []
    for path in paths:
        if not (path / REPORT).exists():
            check(
                config is not None,
                f"{path} has no {REPORT}, and no run tells which text is held out: name reports or "
                "a run",
            )
            console.rule(path.name)
            data = replace(config.data, tokenizer=str(path))
            given = replace(config, model=None, init_from=str(path), data=data)
            flags = Arguments(model=path, training=False, prompts=COMPARED_PROMPTS, fields=given)
            wanted, path = asked(flags, given, has_config=False), output / path.name
            command = f"lsjax report --compare {shlex.join(map(str, paths))}"
            make_report(wanted, path, console, command)
        found.append(path)
    return found


def report_of(
    output: AnyPath,
    console: Console,
    *,
    model: AnyPath | None,
    config: TrainConfig | None,
    data: DataConfig | None,
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
        return found

    base = base_config(model, training, config, chosen_data)
    flags = Arguments(output=output, model=model, training=training, fields=base, **options)
    wanted = asked(flags, base, has_config=config is not None)
    return make_report(wanted, output, console, "lsjax.report(...)")[0]


def asked(flags: Arguments, base: TrainConfig, has_config: bool) -> Asked:
    """What the flags ask for. A configuration without --minutes keeps its number of steps."""
    minutes = flags.minutes
    if minutes is None and not has_config:
        minutes = DEFAULT_MINUTES
    temperature = flags.temperature
    if temperature is None:
        temperature = float(not flags.fields.data.has_prompts)
    names = ("task", "training", "seeds", "prompts", "new_tokens", "exit_layers")
    names += ("num_draft_tokens",)
    return Asked(
        model="" if flags.model is None else str(flags.model),
        minutes=minutes,
        base=base,
        config=flags.fields,
        sampling=Sampling(temperature=temperature),
        **{name: getattr(flags, name) for name in names},
    )


def make_report(
    asked: Asked, directory: AnyPath, console: Console, command: str
) -> tuple[Report, AnyPath]:
    """Does what is missing, and writes the report; returns it with its page.

    command: that is shown as the way to make it. Raises ConfigError and CheckpointError for bad
    input, and as `lsjax.train` does.
    """
    installed("matplotlib", "plots")  # fails before the work
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    kinds: tuple[Kind, ...] = ("layerskip", "plain") if asked.training else ("given",)
    plan = fitted_plan(asked, directory, console)
    announce(plan, console)
    measures = Measures(plan, directory, console)
    models = []
    for seed in range(asked.seeds):
        for kind in kinds:
            if kind != "given":
                train(measures.config(kind, seed), measures.path(kind, seed), console)
            models.append(measures.measured(kind, seed))
    made = Report(
        title=as_path(asked.model).name if asked.model else "a new model",
        shape=measures.shape,
        about={
            "command": command,
            "date": f"{date.today()}",
            "machine": machine.machine_name(),
            "versions": machine.versions(),
            **({"commit": machine.commit()} if machine.commit() else {}),
            **measures.about(),
        },
        recipe=chosen(plan.config) if asked.training else {},
        alike=measures.alike(),
        score=measures.score_name,
        models=tuple(models),
        texts=tuple(measures.texts(models[0])),
    )
    made = replace(made, answer=in_words(made))
    write_report(made, directory)
    return made, write_page(made, directory)


def fitted_plan(asked: Asked, directory: AnyPath, console: Console) -> Plan:
    """The plan of an earlier start, or a new one after a trial of both trainings."""
    plan = read_plan(directory, asked)
    if plan is not None:
        return plan
    if not asked.training and asked.prompts is not None:  # nothing to be fitted
        plan = Plan(asked=asked, config=asked.config, num_prompts=asked.prompts)
        write_plan(directory, plan)
        return plan
    began, trial = time.monotonic(), directory / "trial"
    if trial.exists():  # of a start that was killed
        remove_directory(trial)
    with console.status("timing the first steps and tokens"):
        measured = timed(asked, trial, console)
    exits = len(asked.exit_layers or asked.config.early_exit.exits) or 3
    strategies = 2 + exits * len(asked.num_draft_tokens)
    plan = make_plan(asked, measured, strategies, time.monotonic() - began)
    write_plan(directory, plan)
    if trial.exists():
        remove_directory(trial)
    return plan


def timed(asked: Asked, trial: AnyPath, console: Console) -> Speeds:
    """Times a few steps of each training, and tokens of autoregressive decoding."""
    found = {}
    short = with_steps(asked.config, asked.base, TRIAL_STEPS)
    both = {"step": short, "plain_step": without_layerskip(short)}
    for name, config in both.items() if asked.training else ():
        begin, model = time.monotonic(), trial / name
        shown_run(config, model, SafeConsole(quiet=True), hooks=[])
        wall = time.monotonic() - begin
        rows = [row["seconds"] for row in read_metrics(model) if row["kind"] == "step"]
        found[name] = statistics.median(rows[2:])
        found["start"] = max(found.get("start", 0.0), wall - TRIAL_STEPS * found[name])
    plan = Plan(asked=asked, config=short, num_prompts=1)
    measures = Measures(plan, trial, console)
    engine = measures.engine(model if asked.training else measures.first)
    texts = [engine.generate([[*range(1, 9)]], max_new_tokens=TRIAL_TOKENS)[0] for _ in range(2)]
    seconds = min(text.decode_seconds for text in texts) / (TRIAL_TOKENS - 1)
    return Speeds(token=seconds, compiling=engine.programs.compile_seconds, **found)


def announce(plan: Plan, console: Console) -> None:
    """Prints what will be done, with every choice of the recipe as the flag that changes it."""
    if plan.asked.training:
        console.print("Training with LayerSkip, and without it on as many tokens. Its fields:")
        for path, value in chosen(plan.config).items():
            console.print(f"  --{path.replace('_', '-')} {value}", style="dim")
    console.print(f"Decoding {plan.num_prompts} held-out prompts.")


def train(config: TrainConfig, workdir: AnyPath, console: Console) -> None:
    """Trains or resumes a run, if it has not ended."""
    if any(step.number == config.num_steps for step in saved_steps(workdir / CHECKPOINTS)):
        return
    console.rule(workdir.name)
    shown_run(config, workdir, console, samples=False)
