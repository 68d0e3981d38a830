"""Runs tasks of lm-evaluation-harness at several exits and with several strategies.

    pip install 'lsjax[eval]'
    python -m lsjax.cli.harness --model PATH --tasks gsm8k hellaswag --limit 100 \\
        --strategy autoregressive early_exit --exit-layers 8 15
    python -m lsjax.cli.harness --model PATH --tasks mine --task-path DIRECTORY \\
        --strategy self_speculative --exit-layers 8 --num-draft-tokens 4 --json results.jsonl

docs/evaluation.md says what the figures mean.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lsjax.checkpoints import open_checkpoint
from lsjax.cli.errors import check_output, one_line_errors
from lsjax.cli.flags import parse_flags
from lsjax.cli.loading import load_shown
from lsjax.cli.setup import choose_dtype, keep_compiled_programs
from lsjax.cli.strategies import StrategyName, choose_strategies, fitting_mesh
from lsjax.config import ConfigError, MeshConfig, check
from lsjax.data.chat import chat_prompt
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.decoding.engine import Engine
from lsjax.decoding.state import Strategy
from lsjax.evaluation.answers import Answer, acceptance_rate


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Tasks of lm-evaluation-harness at several exits and with several strategies."""

    model: Path
    """Hugging Face directory, .gguf file, or directory of a training run."""
    tasks: tuple[str, ...]
    """Names or patterns of tasks, groups and tags."""
    task_path: Path | None = None
    """A directory with .yaml files of tasks; they come before lm_eval's own."""
    strategy: tuple[StrategyName, ...] = ("autoregressive",)
    """One or several, one after the other."""
    exit_layers: tuple[int, ...] = ()
    """Each is tried with early_exit and self_speculative. Self-speculation alone may take it from
    the model's generation_config.json."""
    num_draft_tokens: int | None = None
    """Tokens drafted in a round (from the model, if it says so)."""
    draft_vocab: int | None = None
    """Drafts from this many of the most frequent tokens only (lsjax.cli.count_tokens)."""
    draft_confidence: float | None = None
    """Ends a draft before the token with which the exit gives it less than this probability."""
    num_fewshot: int | None = None
    """Examples before each question; the task's own number by default."""
    limit: float | None = None
    """Takes the first so many documents of a task; below 1 it is a share of them."""
    gen_kwargs: str | None = None
    """Changes what tasks say of generation: "max_gen_toks=64,do_sample=True,temperature=0.8"."""
    seed: int = 0
    """Of the first sampled text; each further one has the next number."""
    chat: bool = False
    """Puts questions into the model's chat template."""
    system: str | None = None
    """With --chat: the system message."""
    batch_size: int = 1
    """Texts decoded or scored side by side."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and cache; auto is float32 on CPUs and bfloat16 on accelerators."""
    stack_layers: bool = False
    """Runs the layers in a loop, as decode.py --stack-layers does."""
    max_length: int | None = None
    """Of prompt and new tokens together, and of a scored window; the model's context by default."""
    mesh: MeshConfig = MeshConfig()
    """Devices to run on; one by default."""
    json: Path | None = None
    """Writes a JSON object a strategy to this file: lm_eval's results without the samples."""
    samples: Path | None = None
    """Writes a JSON object a sample to this file, with who answered it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; exits with 2 on bad input."""
    with one_line_errors():
        harness(parse_flags(Arguments, argv, __doc__))
    return 0


def harness(arguments: Arguments) -> None:
    """Runs every task with every strategy, prints the table and writes the results."""
    limit, changes = arguments.limit, arguments.gen_kwargs
    files = [file for file in (arguments.json, arguments.samples) if file is not None]
    check(limit is None or limit > 0, f"--limit {limit} is not above 0: choose a number of samples")
    check(bool(arguments.tasks), "--tasks names no task: give one or more")
    check(
        changes is None or all("=" in change for change in changes.split(",")),
        f'--gen-kwargs {changes} is not like "max_gen_toks=64,do_sample=True,temperature=0.8"',
    )
    check(arguments.chat or arguments.system is None, "--system needs --chat: give both or none")
    path = arguments.task_path
    check(path is None or path.is_dir(), f"--task-path {path} is no directory: name one")
    source = open_checkpoint(arguments.model)
    tokenizer = load_tokenizer(arguments.model).fitted(source.config.vocab_size)
    strategies = choose_strategies(
        arguments.model,
        tokenizer,
        arguments.strategy,
        arguments.exit_layers,
        arguments.num_draft_tokens,
        arguments.draft_vocab,
        arguments.draft_confidence,
        flag="--strategy",
    )
    mesh = fitting_mesh(
        arguments.mesh,
        strategies,
        source.config,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
    )
    if arguments.chat:
        chat_prompt(tokenizer, "?", arguments.system)  # whether there is a template
    for file in files:
        check_output(file)
    lm_eval = need_lm_eval()
    manager, tasks = lm_eval.find_tasks(arguments.tasks, path)

    keep_compiled_programs()
    dtype = choose_dtype(arguments.dtype)
    notes = Console(stderr=True, highlight=False, markup=False, style="dim")
    model = load_shown(source, notes, dtype=dtype, stack_layers=arguments.stack_layers, mesh=mesh)
    engine = Engine(
        model,
        tokenizer,
        strategies[0],
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        mesh=mesh,
    )
    answering = lm_eval.HarnessModel(engine, name=arguments.model.name, seed=arguments.seed)
    for file in files:
        file.write_text("")
    rows = []
    for strategy in strategies:
        engine.use(strategy)
        results = lm_eval.evaluate(
            answering,
            manager,
            tasks,
            limit=limit,
            num_fewshot=arguments.num_fewshot,
            gen_kwargs=changes,
            apply_chat_template=arguments.chat,
            system_instruction=arguments.system,
        )
        samples = results.pop("samples")
        rows += figures(strategy, results, samples)
        who = {key: results["config"][key] for key in ("model", "strategy", "exit_layer")}
        append(arguments.json, [who | results])
        append(
            arguments.samples,
            [who | {"task": task} | sample for task in samples for sample in samples[task]],
        )
    show(f"{arguments.model.name}, {dtype}", rows)


def need_lm_eval() -> ModuleType:
    """The module that imports lm_eval. Raises ConfigError where that is not installed."""
    try:
        from lsjax.evaluation import harness
    except ModuleNotFoundError as error:
        if error.name not in ("lm_eval", "tqdm"):  # tqdm comes with it
            raise
        raise ConfigError(
            "tasks come from lm-evaluation-harness, which is not installed: "
            "pip install 'lsjax[eval]'"
        ) from None
    return harness


def figures(
    strategy: Strategy, results: dict[str, Any], samples: dict[str, list[dict]]
) -> Iterator[list[str]]:
    """The table's rows for one strategy: every metric of every task, and who answered."""
    for task, metrics in results["results"].items():
        own = [one for sample in samples.get(task, ()) for one in sample["answered_by"]]
        answers = [Answer(**one) for one in own]
        count = results["n-samples"].get(task, {}).get("effective")
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{metric}_stderr,{kind}")
            yield [
                task,
                metric if kind == "none" else f"{metric}, {kind}",
                str(Answer.by(strategy)),
                "; ".join(sorted({str(answer) for answer in answers})) or "-",
                "-" if count is None else str(count),
                f"{value:.4g}",
                f"{stderr:.2g}" if isinstance(stderr, int | float) else "-",
                _or_dash(acceptance_rate(answers)),
            ]


def show(title: str, rows: Sequence[Sequence[str]]) -> None:
    """The rows as a table, the strategies of a metric one below the other."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 160  # a file has room for the table
    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False)
    for name in ("task", "metric", "strategy", "answered by"):
        table.add_column(name)
    for name in ("samples", "value", "±", "accepted"):
        table.add_column(name, justify="right")
    metrics = list(dict.fromkeys(tuple(row[:2]) for row in rows))
    before = None
    for row in sorted(rows, key=lambda row: metrics.index(tuple(row[:2]))):
        what = tuple(row[:2])
        table.add_row(*(("", "") if what == before else what), *row[2:])
        before = what
    console.print(table)


def append(file: Path | None, objects: Iterable[dict]) -> None:
    """Adds JSON lines to a file; what JSON does not have is spelled as Python does."""
    if file is not None:
        with file.open("a", encoding="utf-8") as lines:
            for one in objects:
                print(json.dumps(one, ensure_ascii=False, default=str), file=lines)


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    sys.exit(main())
