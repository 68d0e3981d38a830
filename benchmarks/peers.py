"""Compares lsjax with transformers: same weights, prompts, threads, process and tokens.

    make peers
    lsjax convert models/SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2
    .venv/bin/python benchmarks/peers.py models/smollm2 --exit-layer 8 --num-draft-tokens 4

All sides greedily continue the same prompts by the same number of tokens, in turns, after a
warm-up. A side's time is that of N tokens minus that of one token, which excludes reading the
prompt. Exact float32 sides must match lsjax's autoregressive tokens. If one differs by more than
rounding explains, the program fails.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
import tyro
from rich.console import Console
from rich.progress import Progress

import lsjax
from lsjax.cli.benchmark import OWN_PROMPTS, PROMPTS
from lsjax.cli.errors import one_line_errors
from lsjax.cli.prompts import prompt_rows
from lsjax.cli.setup import exact_products, keep_compiled_programs
from lsjax.cli.show import table, wide_console
from lsjax.config import check
from lsjax.data.token_counts import find_counts
from lsjax.data.tokenizer import Tokenizer
from lsjax.decoding.draft_vocabulary import DraftVocabulary
from lsjax.decoding.request import Request, encode_prompt
from lsjax.decoding.strategy import Strategy
from lsjax.evaluation.comparison import FLOAT32_MARGIN, first_difference
from lsjax.evaluation.tasks import make_questions
from lsjax.io.files import cache_directory

Generate = Callable[[list[int], int], list[int]]  # (prompt, number of new tokens) -> new tokens


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compares lsjax with transformers."""

    model: tyro.conf.Positional[Path]
    """Hugging Face directory (see `lsjax convert`)."""
    prompt_file: Path | None = None
    """.txt is one prompt, .jsonl has an object with "prompt" per line; default: built-in ones."""
    limit: int | None = None
    """Maximum number of prompts."""
    exit_layer: int | None = None
    """Exit to draft from, on both sides; by default no exit drafts."""
    num_draft_tokens: int = 4
    """Drafts per round, on both sides and in prompt lookup."""
    draft_vocab: int | None = None
    """Also lets lsjax draft from this many of the most frequent tokens."""
    new_tokens: int = 64
    """New tokens per prompt; end tokens are ignored."""
    repeats: int = 5
    """Turns of each side."""
    threads: int = torch.get_num_threads()
    """Threads of torch; XLA uses all cores of the process (taskset limits both)."""
    json: Path | None = None
    """Writes one JSON object per side to this file."""


@dataclass
class Side:
    """One way to decode. exact: its tokens must be those of the full model in float32."""

    name: str
    generate: Generate
    exact: bool = True


def main(arguments: Arguments) -> None:
    """Measures in turns, compares the tokens, prints the table."""
    check(arguments.new_tokens >= 2, f"--new-tokens {arguments.new_tokens} must be at least 2")
    check(arguments.repeats >= 1, f"--repeats {arguments.repeats} must be at least 1")
    keep_compiled_programs()
    exact_products()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    console = wide_console()
    tokenizer = lsjax.load_tokenizer(arguments.model)
    model = lsjax.load(arguments.model)
    questions = make_questions(
        OWN_PROMPTS,
        prompt_rows(PROMPTS, arguments.prompt_file),
        encode=lambda text: encode_prompt(
            Request(prompt=text, max_new_tokens=arguments.new_tokens), tokenizer, model.config
        ),
    )
    prompts = [list(one.request.prompt) for one in islice(questions, arguments.limit)]
    own = [
        Side(name, lsjax_side(model, tokenizer, strategy), exact)
        for name, strategy, exact in strategies(arguments, tokenizer)
    ]
    sides = [*own, *transformers_sides(arguments)]
    # Seconds per side and turn, for all tokens except the first. The warm-up turn is not kept.
    seconds: list[list[float]] = [[] for _ in sides]
    tokens: list[list[list[int]]] = [[] for _ in sides]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        turns = (1 + arguments.repeats) * len(prompts) * len(sides)
        task = progress.add_task("decoding", total=turns)
        for repeat in range(1 + arguments.repeats):
            for prompt in prompts:
                for index, side in enumerate(sides):
                    begin = time.perf_counter()
                    new = side.generate(prompt, arguments.new_tokens)
                    middle = time.perf_counter()
                    side.generate(prompt, 1)
                    end = time.perf_counter()
                    if repeat == 0:
                        tokens[index].append(new)
                    else:
                        taken = (middle - begin) - (end - middle)
                        check(taken > 0, f"{side.name}: too fast to time; raise --new-tokens")
                        seconds[index].append(taken)
                    progress.advance(task)
    same = [
        compare(model, prompts, tokens[0], found, side)
        for side, found in zip(sides, tokens, strict=True)
    ]
    rows = list(figures(arguments, sides, seconds, same))
    title = f"{arguments.model.name}: {len(prompts)} prompts, {arguments.new_tokens} new tokens, "
    title += f"{arguments.repeats} repeats, {arguments.threads} threads, float32 unless noted"
    lines = [[v if isinstance(v, str) else f"{v:.2f}" for v in row.values()] for row in rows]
    console.print(table(title, [*rows[0]], lines, left=1))
    if arguments.json is not None:
        with arguments.json.open("w") as lines:
            for row in rows:
                print(json.dumps(row), file=lines)


def strategies(arguments: Arguments, tokenizer: Tokenizer) -> list[tuple[str, Strategy, bool]]:
    """lsjax's strategies, each with whether its text must be the full model's."""
    found: list[tuple[str, Strategy, bool]] = [("autoregressive", lsjax.Autoregressive(), True)]
    exit_layer, drafts = arguments.exit_layer, arguments.num_draft_tokens
    if exit_layer is None:
        check(arguments.draft_vocab is None, "--draft-vocab needs --exit-layer")
        return found
    speculative = lsjax.SelfSpeculative(exit_layer, drafts)
    found += [(f"early exit {exit_layer}", lsjax.EarlyExit(exit_layer), False)]
    found += [(f"self-speculative ({exit_layer}, {drafts})", speculative, True)]
    if arguments.draft_vocab is not None:
        counts = find_counts(arguments.model, cache_directory(), tokenizer)
        size = arguments.draft_vocab
        vocabulary = DraftVocabulary.most_frequent(counts, size, tokenizer.vocab_size)
        small = lsjax.SelfSpeculative(exit_layer, drafts, vocabulary)
        found += [(f"the same, drafts from {arguments.draft_vocab} tokens", small, True)]
    return found


def lsjax_side(model: lsjax.Llama, tokenizer: Tokenizer, strategy: Strategy) -> Generate:
    """Generates with a new engine for the strategy."""
    engine = lsjax.Engine(model, tokenizer, strategy, ignore_end=True)
    return lambda prompt, count: engine.generate([prompt], max_new_tokens=count)[0].token_ids


def transformers_sides(arguments: Arguments) -> list[Side]:
    """Greedy decoding in two dtypes, prompt lookup, and early-exit drafts."""
    drafts = arguments.num_draft_tokens
    single, half = (
        transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval()
        for dtype in (torch.float32, torch.bfloat16)
    )
    sides = [
        Side("greedy", transformers_side(single)),
        Side("greedy, bfloat16", transformers_side(half), exact=False),
        Side(
            f"prompt lookup, {drafts}", transformers_side(single, prompt_lookup_num_tokens=drafts)
        ),
    ]
    if arguments.exit_layer is not None:
        # A fixed number of drafts per round, whatever the exit's confidence.
        options: dict[str, Any] = dict(
            assistant_early_exit=arguments.exit_layer,
            num_assistant_tokens=drafts,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
        )
        name = f"assistant_early_exit ({arguments.exit_layer}, {drafts})"
        sides.append(Side(name, transformers_side(single, **options)))
    for side in sides:
        side.name = f"transformers {transformers.__version__}, {side.name}"
    return sides


def transformers_side(model: transformers.PreTrainedModel, **options: Any) -> Generate:
    """`generate` without an end token."""

    def generate(prompt: list[int], count: int) -> list[int]:
        ids = torch.tensor([prompt])
        config = transformers.GenerationConfig(
            do_sample=False, pad_token_id=0, max_new_tokens=count, **options
        )
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return out[0, len(prompt) :].tolist()

    return generate


def compare(
    model: lsjax.Llama,
    prompts: Sequence[list[int]],
    expected: Sequence[list[int]],
    found: Sequence[list[int]],
    side: Side,
) -> str:
    """Number of texts that equal lsjax's autoregressive decoding.

    Raises SystemExit if an exact side differs by more than rounding explains.
    """
    equal = 0
    for prompt, one, other in zip(prompts, expected, found, strict=True):
        difference = first_difference(model, prompt, one, other)
        equal += difference is None
        if side.exact and difference is not None and not difference.margin <= FLOAT32_MARGIN:
            raise SystemExit(f"{side.name} decodes other tokens: {difference}")
    return f"{equal} of {len(prompts)}" + ("" if side.exact else ", not required")


def figures(
    arguments: Arguments,
    sides: Sequence[Side],
    seconds: Sequence[list[float]],
    same: Sequence[str],
):
    """A row for each side: tokens per second (median, minimum, maximum), and its speedups over
    greedy decoding of transformers and of lsjax. Speedups compare turns of the same prompt and
    repeat."""
    peer = next(i for i, side in enumerate(sides) if side.name.endswith(" greedy"))
    for side, own, equal in zip(sides, seconds, same, strict=True):
        speeds = [(arguments.new_tokens - 1) / one for one in own]
        row = {
            "side": side.name if side.name.startswith("transformers") else f"lsjax, {side.name}",
            "tokens/s": statistics.median(speeds),
            "from": min(speeds),
            "to": max(speeds),
        }
        for name, base in (("over transformers", peer), ("over lsjax", 0)):
            pairs = zip(seconds[base], own, strict=True)
            row[name] = statistics.median(other / one for other, one in pairs)
        yield row | {"same text": equal}


if __name__ == "__main__":
    parsed = tyro.cli(Arguments, description=__doc__)
    with one_line_errors():
        main(parsed)
