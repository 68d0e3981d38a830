"""Runs tasks of lm-evaluation-harness at several exits and with several strategies."""

from lsjax.cli import engines
from lsjax.cli.flags.lm_eval import Arguments
from lsjax.cli.notes import notes_console
from lsjax.config import check, in_bucket
from lsjax.data.chat import Dialogue
from lsjax.evaluation import installed
from lsjax.evaluation.scores import Cell
from lsjax.io.files import writing
from lsjax.terminal import SafeConsole, verbatim


def run_tasks(arguments: Arguments) -> None:
    """Runs every task with every strategy; lm_eval makes the tables and the files."""
    changes, path, output = arguments.gen_kwargs, arguments.task_path, arguments.output
    check(bool(arguments.tasks), "--tasks is empty: name one or more")
    check(
        changes is None or all("=" in change for change in changes.split(",")),
        f'--gen-kwargs {changes} must look like "max_gen_toks=64,do_sample=True,temperature=0.8"',
    )
    check(path is None or path.is_dir(), f"--task-path {path} is not a directory: name one")
    opened = engines.open_model(arguments)
    strategies = engines.make_strategies(arguments, opened)
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
    engine = engines.load_engine(opened, notes_console(), strategy=strategies[0])
    people = SafeConsole(soft_wrap=True)
    model = adapter.EngineLM(engine, name=arguments.model.name, seed=arguments.seed)
    for strategy in strategies:
        engine.use(strategy)
        results = adapter.evaluate(model, output, **options)
        people.print(f"{arguments.model.name}, {engine.model.dtype}, {Cell.of(strategy)}")
        people.print(verbatim(adapter.make_table(results)))
        people.print()
