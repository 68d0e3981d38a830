"""Strategies side by side on the same prompts: speed, speedup, and how far it is from the limit.

    python -m lsjax.cli.benchmark --model PATH --exit-layers 4 8 --num-draft-tokens 4 8
    python -m lsjax.cli.benchmark --model PATH --identity-tail 2 --exit-layers 2 4 8 15 \\
        --num-draft-tokens 2 4 8 12 --draft-vocab 2048

One process, the strategies in turns after a warm-up, medians over prompts and repeats. The columns
are defined in docs/performance.md.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from lsjax.cli.errors import check_output, one_line_errors
from lsjax.cli.prompts import encode_prompts, read_prompts
from lsjax.cli.setup import cache_directory, choose_dtype, keep_compiled_programs, machine
from lsjax.config import check
from lsjax.data.token_counts import find_counts
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.decoding.autoregressive import Autoregressive
from lsjax.decoding.calibration import calibrated, memory_bandwidth
from lsjax.decoding.completion import Completion
from lsjax.decoding.cost import weight_bytes
from lsjax.decoding.draft_vocabulary import DraftVocabulary
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import check_settings, encode_prompt
from lsjax.decoding.sampling import Sampling
from lsjax.decoding.self_speculative import Choices, SelfSpeculative
from lsjax.decoding.state import Strategy
from lsjax.evaluation.identity_tail import identity_tail
from lsjax.evaluation.speed import Row, compare
from lsjax.model.checkpoint import assemble, open_source
from lsjax.model.llama import stacked

PROMPTS = (
    "Once upon a time, there was a little girl named Lily who",
    "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris. It",
    "Photosynthesis is the process by which plants",
)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Strategies side by side on the same prompts."""

    model: Path
    """Hugging Face directory or .gguf file."""
    exit_layers: tuple[int, ...] = ()
    """Exits to draft from; none measures autoregressive decoding alone."""
    num_draft_tokens: tuple[int, ...] = (4,)
    """Draft lengths; every exit is tried with every length."""
    draft_vocab: int | None = None
    """Also drafts from this many of the most frequent tokens (lsjax.cli.count_tokens; with an
    identity tail the tokens of the model's own output are counted)."""
    identity_tail: int | None = None
    """Lets the layers from this one on add nothing, so that every draft of a later exit is right:
    the machinery without the training."""
    prompt: str | None = None
    """Text to continue; three are built in."""
    prompt_file: Path | None = None
    """.txt or .jsonl ("prompt", or Spec-Bench's "turns")."""
    prompt_length: int | None = None
    """Cuts or repeats every prompt to this many tokens."""
    new_tokens: int = 64
    """Tokens per prompt; ends of text are ignored."""
    repeats: int = 5
    """Turns of each strategy with each prompt, after one to warm up."""
    temperature: float = 0.0
    """Of the sampling; 0 is greedy. Every strategy has the same seeds, and its own texts."""
    capacity: int = 0
    """Least slots of the cache, for what an unused part of it costs."""
    separate_programs: bool = False
    """Compiles a program for each exit and length instead of one for all."""
    stack_layers: bool = False
    """Runs the layers in a loop, as decode.py --stack-layers does."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and cache; auto is float32 on CPUs and bfloat16 on accelerators."""
    json: Path | None = None
    """Writes a JSON object a strategy to this file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; exits with 2 on bad input."""
    arguments = tyro.cli(Arguments, args=argv, description=__doc__)
    with one_line_errors():
        benchmark(arguments)
    return 0


def benchmark(arguments: Arguments) -> None:
    """Measures, prints the table and writes the rows."""
    for name in ("new_tokens", "repeats"):
        value = getattr(arguments, name)
        low = 2 if name == "new_tokens" else 1
        check(value >= low, f"--{name.replace('_', '-')} {value} is below {low}: choose {low} up")
    sampling = Sampling(temperature=arguments.temperature)
    source = open_source(arguments.model)
    config, tokenizer = source.config, load_tokenizer(arguments.model)
    texts = list(PROMPTS)
    if arguments.prompt is not None or arguments.prompt_file is not None:
        texts = read_prompts(arguments.prompt, arguments.prompt_file)
    length = arguments.prompt_length
    check(length is None or length >= 1, f"--prompt-length {length} is below 1: choose 1 up")

    def encode(text: str) -> list[int]:
        ids = tokenizer.encode(text)
        if ids and length is not None:
            ids = (ids * (length // len(ids) + 1))[:length]
        limits = dict(max_new_tokens=arguments.new_tokens, max_length=None)
        return encode_prompt(ids, tokenizer, config, **limits)

    prompts = encode_prompts(texts, encode)
    tail = arguments.identity_tail
    check(
        tail is None or 1 <= tail < config.num_layers,
        f"--identity-tail {tail} is not in 1..{config.num_layers - 1}: choose a layer there",
    )
    check(
        bool(arguments.num_draft_tokens) or not arguments.exit_layers,
        "--exit-layers needs --num-draft-tokens, one draft length or several",
    )
    plain = strategies(arguments, None)
    for strategy in [Autoregressive(), *plain]:
        check_settings(config, tokenizer, strategy, batch_size=1, max_length=None)
    size = arguments.draft_vocab if plain else None
    counts = {}
    if size is not None and tail is None:
        counts = find_counts(arguments.model, cache_directory(), tokenizer)
    if size is not None:
        DraftVocabulary.most_frequent(counts, size).validate(config)
    if arguments.json is not None:
        check_output(arguments.json)

    keep_compiled_programs()
    dtype = choose_dtype(arguments.dtype)
    model = assemble(source, dtype=dtype)
    if tail is not None:
        model = identity_tail(model, tail)
    if arguments.stack_layers:
        model = stacked(model)
    engine = Engine(model, tokenizer, ignore_end=True, min_capacity=arguments.capacity)
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 160  # a file has room for the table
    with Progress(console=Console(stderr=True), transient=True) as progress:
        vocabulary = None
        if size is not None:
            if tail is not None:
                counts = own_tokens(engine, prompts, arguments.new_tokens, sampling)
            vocabulary = DraftVocabulary.most_frequent(counts, size)
        everything = [
            Autoregressive(),
            *plain,
            *(strategies(arguments, vocabulary) if vocabulary else ()),
        ]
        task = progress.add_task(
            "decoding", total=len(everything) * len(prompts) * (1 + arguments.repeats)
        )
        advance = partial(progress.advance, task)
        runs = measure(engine, everything, prompts, arguments, sampling, advance)
        bandwidth = memory_bandwidth()
        costs = None
        if plain:
            progress.update(task, description="timing the parts")
            costs = calibrated(
                cache_directory(),
                machine(),
                model,
                arguments.num_draft_tokens,
                [config.vocab_size, *([len(vocabulary)] if vocabulary else [])],
                again=True,  # beside what it is compared with
            )
    rows = list(compare(config, model.dtype.itemsize, everything, runs, costs, bandwidth))
    what = f"{arguments.model.name}, {dtype}, {len(prompts)} prompts of "
    what += f"{min(map(len, prompts))} to {max(map(len, prompts))} tokens, "
    what += f"{arguments.new_tokens} new ones, {arguments.repeats} repeats"
    if arguments.temperature:
        what += f", temperature {arguments.temperature:g}"
    if tail is not None:
        what += f"; identity tail from layer {tail} on"
    show(console, what, rows)
    weights = weight_bytes(config, model.dtype.itemsize)
    console.print(
        f"{engine.num_programs} programs, {engine.compile_seconds:.1f} s compiling; autoregressive "
        f"decoding reads {weights / 1e6:.0f} MB of weights a token, "
        f"{rows[0].bandwidth / 1e9:.1f} GB/s, {rows[0].share_of_bandwidth:.0%} of this memory's "
        f"{bandwidth / 1e9:.1f} GB/s"
    )
    if costs is not None:
        one = costs.pass_seconds(config.num_layers, 1)
        passes = ", ".join(
            f"{width} at {costs.pass_seconds(config.num_layers, width) / one:.2f}"
            for width in costs.head
        )
        console.print(f"A pass of one position takes {one * 1e3:.1f} ms; times that, {passes}")
    if arguments.json is not None:
        with arguments.json.open("w") as lines:
            for row in rows:
                print(json.dumps(asdict(row)), file=lines)


def strategies(arguments: Arguments, vocabulary: DraftVocabulary | None) -> list[SelfSpeculative]:
    """Every exit with every length, in one program unless told otherwise."""
    exits, lengths = sorted(set(arguments.exit_layers)), sorted(set(arguments.num_draft_tokens))
    choices = None
    if not arguments.separate_programs and len(exits) * len(lengths) > 1:
        choices = Choices(tuple(exits), tuple(lengths))
    return [
        SelfSpeculative(exit_layer, drafts, vocabulary, choices)
        for exit_layer in exits
        for drafts in lengths
    ]


def own_tokens(
    engine: Engine, prompts: list[list[int]], new_tokens: int, sampling: Sampling
) -> dict[int, int]:
    """How often the model says each token, by decoding the prompts."""
    counts: dict[int, int] = {}
    for completion in engine.generate(prompts, max_new_tokens=new_tokens, sampling=sampling):
        for token in completion.token_ids:
            counts[token] = counts.get(token, 0) + 1
    return counts


def measure(
    engine: Engine,
    everything: Sequence[Strategy],
    prompts: list[list[int]],
    arguments: Arguments,
    sampling: Sampling,
    advance: Callable[[], None],
) -> list[list[list[Completion]]]:
    """Completions by repeat, strategy and prompt; the warm-up is left out. A text has the same seed
    under every strategy."""
    runs = []
    for repeat in range(1 + arguments.repeats):
        of_repeat: list[list[Completion]] = [[] for _ in everything]
        for number, prompt in enumerate(prompts):
            sampling = replace(sampling, seed=repeat * len(prompts) + number)
            for index, strategy in enumerate(everything):
                engine.use(strategy)
                of_repeat[index] += engine.generate(
                    [prompt], sampling=sampling, max_new_tokens=arguments.new_tokens
                )
                advance()
        if repeat:
            runs.append(of_repeat)
    return runs


def show(console: Console, title: str, rows: Sequence[Row]) -> None:
    """The rows as a table; the best speedup is green."""
    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False)
    names = ["", "E", "d", "N", "tokens/s", "from", "to", "speedup", "accepted", "tokens/round"]
    for name in (*names, "ideal", "share", "predicted", "off by", "round/parts"):
        table.add_column(name, justify="right" if name else "left")
    best = max(row.speedup for row in rows)
    for row in rows:
        off = None if row.predicted is None else row.predicted / row.speedup - 1
        cells = [
            row.strategy.replace("_", " "),
            *(
                "-" if value is None else str(value)
                for value in (row.exit_layer, row.num_draft_tokens, row.draft_vocab)
            ),
            *(f"{x:.1f}" for x in (row.tokens_per_second, row.slowest, row.fastest)),
            f"{row.speedup:.2f}x",
            *(_or_dash(row.acceptance_rate, ".3f"), _or_dash(row.tokens_per_round, ".2f")),
            *(_or_dash(row.ideal, ".2f"), _or_dash(row.share_of_ideal, ".2f")),
            *(_or_dash(row.predicted, ".2f"), _or_dash(off, "+.0%")),
            _or_dash(row.round_over_parts, ".2f"),
        ]
        table.add_row(*cells, style="bold green" if row.speedup == best > 1 else None)
    console.print(table)


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    sys.exit(main())
