"""Strategies side by side on the same prompts: how fast, how far from the limit, and are they
exact?

    python -m lsjax.cli.benchmark --model PATH --exit-layers 4 8 --num-draft-tokens 4 8
    python -m lsjax.cli.benchmark --model PATH --identity-tail 2 --exit-layers 2 4 8 15 \\
        --num-draft-tokens 2 4 8 12 --draft-vocab 2048
    python -m lsjax.cli.benchmark --model PATH --task spec_bench --data question.jsonl --groups \\
        --exit-layers 8 --num-draft-tokens 4 --repeats 1 --output benchmarks/model

Autoregressive decoding and every exit with every draft length take turns in one process, after a
warm-up. The columns are defined in docs/performance.md. Greedy texts are compared with those of
autoregressive decoding: exit code 1 if they differ in float32 by more than rounding explains.

The directory --output gets answers.jsonl, a line for each text, from which a killed run resumes;
cells.jsonl, the table; and for a grid benchmark.png and acceptance.png.
"""

import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import Progress

from lsjax.cli import answering, flags
from lsjax.cli.answering import TaskFlags
from lsjax.cli.benchmark_table import show, show_costs, verdict, write
from lsjax.cli.errors import check_output, one_line_errors
from lsjax.cli.flags import SamplingFlags, StrategyFlags, load_engine
from lsjax.cli.prompts import PromptArguments, read_encoded, read_prompts
from lsjax.config import DataConfig, LlamaConfig, bounded, check
from lsjax.data.tokenizer import Tokenizer
from lsjax.decoding.cost import RoundCosts, calibrate, memory_bandwidth
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import encode_prompt
from lsjax.decoding.sampling import GREEDY
from lsjax.decoding.self_speculative import SelfSpeculative, in_one_program
from lsjax.decoding.state import Strategy
from lsjax.evaluation.answers import ALL, Answer, Question
from lsjax.evaluation.exactness import identity_tail
from lsjax.evaluation.speed import cell_speeds, time_in_turns, warm_up
from lsjax.evaluation.tasks import TASKS, Example

PROMPTS = (
    "Once upon a time, there was a little girl named Lily who",
    "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris. It",
    "Photosynthesis is the process by which plants",
)
# Flags that mean nothing to other prompts.
TASK_ALONE = (
    *("data", "tfds_split", "offset", "response_template"),
    *("num_shots", "shots_data", "without_seen"),
)


@dataclass(frozen=True, kw_only=True)
class Arguments(TaskFlags, PromptArguments, StrategyFlags):
    """Strategies side by side on the same prompts."""

    strategies: tuple[Literal["early_exit", "self_speculative"], ...] = ("self_speculative",)
    """Beside autoregressive decoding, at every exit."""
    prompt: str | None = None
    """Text to continue; three are built in."""
    task: Literal[tuple(TASKS)] | None = None  # type: ignore[valid-type]
    """Prompts of a task (docs/evaluation.md)."""
    prompt_length: int | None = None
    """Cuts or repeats every prompt to this many tokens."""
    new_tokens: int = bounded(64, low=2)
    """Tokens per prompt; ends of text are ignored."""
    repeats: int = bounded(5, low=1)
    """Turns of each strategy with each prompt."""
    sampling: SamplingFlags = GREEDY
    identity_tail: int | None = None
    """Lets the layers from this one on add nothing, so that every draft of a later exit is right:
    the machinery without the training. The draft vocabulary is that of the model's own output."""
    capacity: int = bounded(0, low=0)
    """Least slots of the cache, for what an unused part of it costs."""
    separate_programs: bool = False
    """Compiles a program for each exit and length instead of one for all."""
    output: Path | None = None
    """Directory of the answers, the table and the pictures; nothing is written by default."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 1 where texts are not exact, 2 on bad input."""
    with one_line_errors():
        return benchmark(flags.parse_flags(Arguments, argv, __doc__))


def benchmark(arguments: Arguments) -> int:
    """Measures what is not measured yet, prints the table, writes and draws it."""
    notes = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    source, tokenizer = flags.open_model(arguments)
    config, tail = source.config, arguments.identity_tail
    check_numbers(arguments, config)
    questions = make_questions(arguments, tokenizer, config, notes)
    strategies = choose_strategies(arguments, tokenizer, None if tail is None else {})
    mesh = flags.chosen_mesh(arguments)
    flags.check_engine(arguments, config, strategies, mesh)
    file = None
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        file = arguments.output / "answers.jsonl"
        check_output(file, arguments.prompt_file)
    engine = load_engine(
        *(arguments, source, tokenizer, notes),
        mesh=mesh,
        change=lambda model: model if tail is None else identity_tail(model, tail),
        ignore_end=True,
        min_capacity=arguments.capacity,
    )
    if tail is not None and arguments.draft_vocab is not None:
        said = engine.generate([one.request for one in questions if one.sample == 0])
        counts = Counter(token for one in said for token in one.token_ids)
        strategies = choose_strategies(arguments, tokenizer, counts)

    def decode(done: Collection[tuple], keep: Callable[[Answer], None]) -> None:
        warm_up(engine, strategies, questions)
        time_in_turns(engine, strategies, questions, done, keep)

    names = ("identity_tail", "new_tokens", "capacity", "separate_programs")
    more = {name: getattr(arguments, name) for name in names}
    asked = answering.conditions(arguments, engine, strategies, arguments.sampling, **more)
    answers = answering.complete(file, asked, strategies, questions, notes, decode)
    with Progress(console=notes, transient=True) as progress:
        progress.add_task("timing the parts", total=None)
        costs, bandwidth = measured_costs(engine, strategies), memory_bandwidth()
    itemsize = engine.model.dtype.itemsize
    rows = list(cell_speeds(config, itemsize, strategies, answers, costs, bandwidth))
    title = describe(arguments, engine, questions)
    show(title, [row for row in rows if arguments.groups or row.group == ALL])
    show_costs(engine, rows[0], costs, bandwidth)
    if arguments.output is not None:
        write(arguments.output, title, rows, notes)
    return verdict(answers, engine)


def check_numbers(arguments: Arguments, config: LlamaConfig) -> None:
    """Raises ConfigError for numbers that cannot work, and for those that mean nothing."""
    check(arguments.batch_size == 1, "--batch-size means nothing here: texts are timed one by one")
    flags.check_sampling(arguments.sampling, 1)
    length, tail = arguments.prompt_length, arguments.identity_tail
    check(
        length is None or 1 <= length < config.max_context,
        f"--prompt-length {length} is not in 1..{config.max_context - 1}: choose a length there, "
        "within the model's context",
    )
    check(
        tail is None or 1 <= tail < config.num_layers,
        f"--identity-tail {tail} is not in 1..{config.num_layers - 1}: choose a layer there",
    )
    sources = ("prompt", "prompt_file", "task")
    given = [arguments.name_of(name) for name in sources if getattr(arguments, name)]
    check(len(given) < 2, f"{' and '.join(given)} are given: choose one source of prompts")


def choose_strategies(
    arguments: Arguments, tokenizer: Tokenizer, counts: Mapping[int, int] | None
) -> list[Strategy]:
    """Autoregressive decoding, then each cell of the grid, those with the full head first.

    counts: of the tokens that the draft vocabulary is chosen by; those of the model's by default.
    """
    names = ("autoregressive", *(arguments.strategies if arguments.exit_layers else ()))
    given = {field.name: getattr(arguments, field.name) for field in fields(StrategyFlags)}
    asked, model = StrategyFlags(**given | {"strategies": names}), arguments.model
    found = flags.make_strategies(asked, model, tokenizer, counts)
    if arguments.draft_vocab is not None:
        full = replace(asked, draft_vocab=None)
        found = [*flags.make_strategies(full, model, tokenizer), *found]
    found = list(dict.fromkeys(found))
    return found if arguments.separate_programs else in_one_program(found)


def make_questions(
    arguments: Arguments, tokenizer: Tokenizer, config: LlamaConfig, notes: Console
) -> list[Question]:
    """Every prompt in each repeat. A text has the same seed under every strategy."""
    new_tokens, length = arguments.new_tokens, arguments.prompt_length

    def encode(prompt: str, data: DataConfig | None = None) -> list[int]:
        """Its ids, cut or repeated; the token of the beginning stays in front."""
        ids = answering.question_ids(prompt, tokenizer, arguments, data)
        if ids and length is not None:
            begin = ids[:1] if ids[0] == tokenizer.bos_id else []
            rest = ids[len(begin) :] or ids
            ids = (begin + rest * (length // len(rest) + 1))[:length]
        limits = dict(max_new_tokens=new_tokens, max_length=arguments.max_length)
        return encode_prompt(ids, tokenizer, config, **limits)

    if arguments.task is not None:
        task = answering.with_flags(TASKS[arguments.task], arguments)
        bad_rows = answering.BadRows(arguments.bad_rows, notes)
        seed = arguments.sampling.seed
        examples, _ = answering.read_examples(task, arguments, seed, encode, bad_rows)
    else:
        for name in TASK_ALONE:
            flag = arguments.name_of(name)
            check(not getattr(arguments, name), f"{flag} needs --task, whose rows it is about")
        built_in = PROMPTS if arguments.prompt is None else read_prompts(arguments.prompt, None)
        found = read_encoded(arguments, built_in, encode, notes.print)
        examples = [(Example(id=str(n), prompt=""), ids) for n, ids in enumerate(found, start=1)]
    questions = answering.make_questions(
        examples, arguments.repeats, arguments.sampling, max_new_tokens=new_tokens
    )
    return sorted(questions, key=lambda question: question.sample)


def measured_costs(engine: Engine, strategies: Sequence[Strategy]) -> RoundCosts | None:
    """What the parts of a round cost now, beside what they are compared with; None where nothing
    drafts."""
    drafting = [one for one in strategies if isinstance(one, SelfSpeculative)]
    if not drafting:
        return None
    size = engine.model.config.vocab_size
    sizes = sorted({one.draft_vocab or size for one in drafting}, reverse=True)
    lengths = sorted({length for one in drafting for length in one.lengths if length > 0})
    return calibrate(engine.model, lengths, sizes)


def describe(arguments: Arguments, engine: Engine, questions: Sequence[Question]) -> str:
    """The title of the table."""
    lengths = [len(one.request.prompt) for one in questions if one.sample == 0]
    title = (
        f"{arguments.model.name}, {engine.model.dtype}, {len(lengths)} prompts of {min(lengths)} "
        f"to {max(lengths)} tokens, {arguments.new_tokens} new ones, {arguments.repeats} repeat"
        + "s"
        * (arguments.repeats > 1)
    )
    if arguments.sampling.temperature:
        title += f", temperature {arguments.sampling.temperature:g}"
    if arguments.draft_confidence is not None:
        title += f", drafts at {arguments.draft_confidence:g} or more"
    if arguments.identity_tail is not None:
        title += f"; identity tail from layer {arguments.identity_tail} on"
    return title


if __name__ == "__main__":
    sys.exit(main())
