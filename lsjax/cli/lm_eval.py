"""Runs tasks of lm-evaluation-harness at several exits and with several strategies.

    pip install 'lsjax[eval]'
    python -m lsjax.cli.lm_eval --model PATH --tasks gsm8k hellaswag --limit 100 \\
        --strategies autoregressive early_exit --exit-layers 8 15
    python -m lsjax.cli.lm_eval --model PATH --tasks mine --task-path DIRECTORY \\
        --strategies self_speculative --exit-layers 8 --num-draft-tokens 4 --output results

docs/evaluation.md explains the figures.
"""

from lsjax.interrupts import run_program

if __name__ == "__main__":  # before the other imports, which take seconds
    run_program("lsjax.cli.lm_eval")

from dataclasses import dataclass

from lsjax.cli import flags
from lsjax.cli.setup import program
from lsjax.cli.show import notes_console
from lsjax.config import AnyPath, bounded, check, in_bucket
from lsjax.data.chat import Dialogue
from lsjax.evaluation import installed
from lsjax.evaluation.scores import Cell
from lsjax.io.files import writing
from lsjax.terminal import SafeConsole, verbatim


@dataclass(frozen=True, kw_only=True)
class Arguments(flags.StrategyFlags, flags.ChatFlags, flags.ModelFlags):
    """Tasks of lm-evaluation-harness at several exits and with several strategies."""

    tasks: tuple[str, ...]
    """Names or patterns of tasks, groups and tags."""
    task_path: AnyPath | None = None
    """Directory of .yaml task files, instead of lm_eval's own tasks."""
    num_fewshot: int | None = None
    """Examples before each question; the task's own number by default."""
    limit: float | None = bounded(None, above=0)
    """Number of documents per task, or a share of them if below 1."""
    gen_kwargs: str | None = None
    """Overrides generation settings of tasks: "max_gen_toks=64,do_sample=True,temperature=0.8"."""
    seed: int = bounded(0, low=0, high=2**32 - 1)
    """Seed of the first sampled text. Each further text has the next seed."""
    output: AnyPath | None = None
    """Directory for lm_eval's results and samples, with a folder per strategy."""


def run_tasks(arguments: Arguments) -> None:
    """Runs every task with every strategy; lm_eval makes the tables and the files."""
    changes, path, output = arguments.gen_kwargs, arguments.task_path, arguments.output
    check(bool(arguments.tasks), "--tasks is empty: name one or more")
    check(
        changes is None or all("=" in change for change in changes.split(",")),
        f'--gen-kwargs {changes} must look like "max_gen_toks=64,do_sample=True,temperature=0.8"',
    )
    check(path is None or path.is_dir(), f"--task-path {path} is not a directory: name one")
    opened = flags.open_model(arguments)
    strategies = flags.make_strategies(arguments, opened)
    if arguments.chat:
        Dialogue(opened.tokenizer, arguments.system).prompt("?")  # fails now without a template
    if output is not None:
        check(
            not in_bucket(output),
            f"--output {output} is in a bucket, where lm_eval cannot write: name a local directory",
        )
        with writing(output):
            output.mkdir(parents=True, exist_ok=True)
    adapter = installed("lsjax.evaluation.lm_eval", "eval")
    options = adapter.find_tasks(arguments.tasks, path) | {
        "limit": arguments.limit,
        "num_fewshot": arguments.num_fewshot,
        "gen_kwargs": changes,
        "apply_chat_template": arguments.chat,
        "system_instruction": arguments.system,
    }
    engine = flags.load_engine(opened, notes_console(), strategy=strategies[0])
    people = SafeConsole(soft_wrap=True)
    model = adapter.EngineLM(engine, name=arguments.model.name, seed=arguments.seed)
    for strategy in strategies:
        engine.use(strategy)
        results = adapter.evaluate(model, output, **options)
        people.print(f"{arguments.model.name}, {engine.model.dtype}, {Cell.of(strategy)}")
        people.print(verbatim(adapter.make_table(results)))
        people.print()


main = program(Arguments, run_tasks, __doc__)
