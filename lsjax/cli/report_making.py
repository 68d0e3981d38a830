"""Makes reports: fits the work into the time, trains, measures, and writes the page.

Each part leaves a file in the report's directory, and is left out where that is there:

    plan.json                       how much is trained and decoded
    runs/layerskip-0, plain-0       the trainings, one of each kind for each seed
    answers-layerskip-0.jsonl       decoded texts, a line for each
    measured-layerskip-0.json       what was measured of one model
    texts.json                      texts with the origin of their tokens
    report.json, .html, .md, *.svg  the report
"""

import statistics
import time
from dataclasses import replace
from typing import Any

from rich.console import Console

from lsjax.checkpoints.run import EVALUATION, is_run, read_metrics
from lsjax.cli.flags.report import Arguments
from lsjax.cli.report_measures import Measures
from lsjax.cli.shown_run import shown_run
from lsjax.config import AnyPath, ConfigError, Sampling, TrainConfig, as_path
from lsjax.config.checked import differences, shown
from lsjax.evaluation import installed
from lsjax.evaluation.tasks import TASKS
from lsjax.io.files import remove_directory, writing
from lsjax.reporting.figures import in_words
from lsjax.reporting.machine import COMMIT
from lsjax.reporting.page import plain, write_page
from lsjax.reporting.plan import (
    BATCHES,
    DEFAULT_MINUTES,
    Asked,
    Plan,
    Speeds,
    make_plan,
    read_plan,
    read_speeds,
    write_plan,
    write_speeds,
)
from lsjax.reporting.recipes import chosen, with_steps, without_layerskip
from lsjax.reporting.record import Report, write_report
from lsjax.terminal import SafeConsole

TRIAL_STEPS, TRIAL_TOKENS = 5, 32  # that are timed in the first minutes
# Five short steps are too noisy to plan with. A second trial lasts about so many seconds.
LONGER_TRIAL = 5.0
MOST_TRIAL_STEPS = 50
NEW_TOKENS = 64  # of texts that are no answers to a task


def asked(flags: Arguments, base: TrainConfig, has_config: bool) -> Asked:
    """What the flags ask for. A configuration without --minutes keeps its number of steps."""
    minutes = flags.minutes
    if minutes is None and not has_config:
        minutes = DEFAULT_MINUTES
    temperature = flags.temperature
    if temperature is None:
        temperature = float(not flags.fields.data.has_prompts)
    new_tokens = flags.new_tokens
    if new_tokens is None:
        new_tokens = TASKS[flags.task].max_new_tokens if flags.task else NEW_TOKENS
    names = ("task", "training", "seeds", "prompts", "exit_layers", "num_draft_tokens")
    return Asked(
        model="" if flags.model is None else str(flags.model),
        minutes=minutes,
        new_tokens=new_tokens,
        base=base,
        config=flags.fields,
        sampling=Sampling(temperature=temperature),
        **{name: getattr(flags, name) for name in names},
    )


def make_report(
    asked: Asked,
    directory: AnyPath,
    console: Console,
    command: str,
    num_batches: int = BATCHES[-1],
) -> tuple[Report, AnyPath]:
    """Does what is missing, and writes the report; returns it with its page.

    command: that is shown as the way to make it. num_batches: of held-out rows to score, if the
    time does not decide about it. Raises ConfigError and CheckpointError for bad
    input, and as `lsjax.train` does.
    """
    installed("matplotlib", "plots")  # fails before the work
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    plan = fitted_plan(asked, directory, console, num_batches)
    announce(plan, console)
    measures, models = Measures(plan, directory, console), []
    for seed in range(asked.seeds):
        for kind in ("layerskip", "plain") if asked.training else ("given",):
            if kind != "given":
                train(measures.config(kind, seed), measures.path(kind, seed), console)
            models.append(measures.measured(kind, seed))
    first = models[0]
    for one in models:
        for name, was, is_ in differences(first.alike, one.alike):
            raise ConfigError(
                f"{directory} was measured under different conditions ({name}: {shown(was)} and "
                f"{shown(is_)}): delete its measured-*.json and answers-*.jsonl to measure again"
            )
    about = {"command": command, **first.about}
    commits = [one.about[COMMIT] for one in models if COMMIT in one.about]
    if commits:  # a resumed report may have several
        about[COMMIT] = ", ".join(dict.fromkeys(commits))
    made = Report(
        title=as_path(asked.model).name if asked.model else "a new model",
        shape=measures.shape,
        about=about,
        recipe=chosen(plan.config) if asked.training else {},
        score=measures.score_name,
        models=tuple(models),
        texts=tuple(measures.texts(first)),
    )
    made = replace(made, answer=in_words(made))
    write_report(made, directory)
    return made, write_page(made, directory)


def fitted_plan(asked: Asked, directory: AnyPath, console: Console, num_batches: int) -> Plan:
    """The plan of an earlier start, or a new one after a trial of both trainings."""
    trial = directory / "trial"
    if trial.exists():  # of a start that was killed
        remove_directory(trial)
    plan = read_plan(directory, asked)
    if plan is not None:
        return plan
    began, prompts = time.monotonic(), asked.prompts or 1
    exits = len(asked.exit_layers or asked.config.early_exit.exits) or 3
    strategies = 2 + exits * len(asked.num_draft_tokens)
    measured = read_speeds(directory, asked)
    if measured is not None:  # refuses a time that is still too short before it loads anything
        make_plan(asked, measured, strategies, spent=0.0)
    settings = dict(num_prompts=prompts, num_batches=num_batches)
    plan = Plan(asked=asked, config=asked.config, **settings)
    with console.status("reading the data"):
        Measures(plan, directory, console).check()
    if not asked.training and asked.prompts is not None:  # nothing has to fit
        write_plan(directory, plan)
        return plan
    if measured is None:
        with console.status("timing the first steps and tokens"):
            measured = timed(asked, trial, console)
        write_speeds(directory, asked, measured)
    plan = make_plan(asked, measured, strategies, time.monotonic() - began)
    write_plan(directory, plan)
    if trial.exists():
        remove_directory(trial)
    return plan


def timed(asked: Asked, trial: AnyPath, console: Console) -> Speeds:
    """Times a few steps of each training, scoring, and tokens of autoregressive decoding."""
    found = {}
    for name in ("step", "plain_step") if asked.training else ():
        with_layerskip = name == "step"
        model = trial / name
        found[name], start = timed_steps(asked, with_layerskip, TRIAL_STEPS, model)
        found["start"] = max(found.get("start", 0.0), start)
        more = min(int(LONGER_TRIAL / found[name]), MOST_TRIAL_STEPS)
        if more > TRIAL_STEPS:
            found[name], _ = timed_steps(asked, with_layerskip, more, trial / f"{name}_longer")
    short = with_steps(asked.config, asked.base, TRIAL_STEPS)
    plan = Plan(asked=asked, config=short, num_prompts=1)
    measures = Measures(plan, trial, console)
    path = model if asked.training else measures.first
    engine = measures.engine(path)
    texts = [engine.generate([[*range(1, 9)]], max_new_tokens=TRIAL_TOKENS)[0] for _ in range(2)]
    seconds = min(text.decode_seconds for text in texts) / (TRIAL_TOKENS - 1)
    opened, score = measures.open(path), measures.scorer(path)
    batches = list(measures.held_out_of(opened.tokenizer, opened.source.config).rows)[:1]
    score(batches)  # compiles
    begin = time.monotonic()
    score(batches)
    found["batch"] = time.monotonic() - begin
    return Speeds(token=seconds, compiling=engine.programs.compile_seconds, **found)


def timed_steps(
    asked: Asked, with_layerskip: bool, number: int, workdir: AnyPath
) -> tuple[float, float]:
    """Trains `number` steps. Returns the mean seconds of a step, and the seconds of all else."""
    config = with_steps(asked.config, asked.base, number)
    if not with_layerskip:
        config = without_layerskip(config)
    # Steps that are saved are slower, and a training saves few of them.
    config = replace(config, checkpoints=replace(config.checkpoints, every=number))
    begin = time.monotonic()
    shown_run(config, workdir, SafeConsole(quiet=True), hooks=[])
    wall = time.monotonic() - begin
    seconds = [row["seconds"] for row in read_metrics(workdir) if row["kind"] == "step"]
    step = statistics.fmean(seconds[2:])  # the first ones compile
    return step, wall - number * step


def announce(plan: Plan, console: Console) -> None:
    """Prints what will be done, with every choice of the recipe as the flag that changes it."""
    if plan.asked.training:
        console.print("Training with LayerSkip, and without it on as many tokens. Its fields:")
        for path, value in chosen(plan.config).items():
            console.print(f"  {as_flag(path, value)}", style="dim")
    console.print(f"Decoding {plan.num_prompts} held-out prompts.")


def as_flag(path: str, value: Any) -> str:
    """The flag that gives a field its value."""
    section, dot, name = path.rpartition(".")
    if isinstance(value, bool):
        name, value = ("" if value else "no-") + name, ""
    return f"--{section}{dot}{name} {plain(value)}".replace("_", "-").strip()


def train(config: TrainConfig, workdir: AnyPath, console: Console) -> None:
    """Trains or resumes a run, if it has not ended with an evaluation."""
    rows = read_metrics(workdir) if is_run(workdir) else []
    if any(row["kind"] == EVALUATION and row["step"] == config.num_steps for row in rows):
        return
    console.rule(workdir.name)
    shown_run(config, workdir, console, samples=False)
