"""Continues prompts with a Llama: autoregressively, from an early exit, or self-speculatively.

    python decode.py --model PATH --prompt "Once upon a time"
    python decode.py --model PATH --prompt-file prompts.jsonl --strategy self_speculative \\
        --exit-layer 8 --num-draft-tokens 4 --json results.jsonl
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, TextIO

import tyro
from rich.console import Console
from rich.progress import Progress

from lsjax.cli.errors import check_output, one_line_errors
from lsjax.cli.prompts import encode_prompts, read_prompts
from lsjax.cli.setup import cache_directory, choose_dtype, keep_compiled_programs
from lsjax.cli.show import LEGEND, coloured, summary, verbatim
from lsjax.config import ConfigError, check
from lsjax.data.chat import chat_prompt
from lsjax.data.token_counts import find_counts
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.data.tokenizers import Tokenizer
from lsjax.decoding.autoregressive import Autoregressive, EarlyExit
from lsjax.decoding.completion import Completion
from lsjax.decoding.draft_vocabulary import DraftVocabulary
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import check_settings, encode_prompt
from lsjax.decoding.sampling import Sampling
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.state import Strategy
from lsjax.model.checkpoint import assemble, open_source
from lsjax.model.huggingface import read_generation_defaults
from lsjax.model.llama import stacked


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Continues prompts with a Llama."""

    model: Path
    """Hugging Face directory (config.json, safetensors, tokenizer) or .gguf file."""
    prompt: str | None = None
    """Text to continue."""
    prompt_file: Path | None = None
    """Prompts: .txt is one prompt, .jsonl has an object with "prompt" on each line."""
    strategy: Literal["autoregressive", "early_exit", "self_speculative"] = "autoregressive"
    """All layers for each token; the first layers only; or drafts by the first layers that the
    others verify: the same tokens as autoregressive."""
    exit_layer: int | None = None
    """Layers that draft, or that early_exit runs. Self-speculation takes it from the model's
    generation_config.json (assistant_early_exit) if that has it."""
    num_draft_tokens: int | None = None
    """Tokens drafted in a round (from num_assistant_tokens of the model, if it has that)."""
    draft_vocab: int | None = None
    """Drafts from this many of the most frequent tokens only: a cheaper head, the same text.
    python -m lsjax.cli.count_tokens counts them."""
    max_new_tokens: int = 128
    """Ends a text that does not end by itself."""
    temperature: float = 0.0
    """0 is greedy: the likeliest token each time. Above 0 tokens are drawn, with logits divided by
    this."""
    top_k: int = 0
    """Draws from the k likeliest tokens only; 0 is all."""
    top_p: float = 1.0
    """Draws from the fewest tokens whose probabilities sum up to p."""
    min_p: float = 0.0
    """Draws from tokens at least min_p times as likely as the likeliest."""
    seed: int = 0
    """Of the first text; each further one has the next number."""
    num_samples: int = 1
    """Texts for each prompt."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Ends a text where it would contain this; may be given several times."""
    chat: bool = False
    """Puts the prompt into the model's chat template, as a user's message."""
    system: str | None = None
    """With --chat: the system message."""
    batch_size: int = 1
    """Prompts decoded side by side."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and cache; auto is float32 on CPUs and bfloat16 on accelerators."""
    stack_layers: bool = False
    """Runs the layers in a loop: for models so deep that programs with every layer in them take
    too long to compile. Each token takes longer."""
    max_length: int | None = None
    """Of prompt and new tokens together; the model's context by default."""
    json: Path | None = None
    """Writes a JSON object a prompt to this file ("-": to standard output, and nothing else)."""
    show_drafts: bool = False
    """Shows which tokens the draft proposed and what the verification made of them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; exits with 2 on bad input."""
    arguments = tyro.cli(Arguments, args=argv, description=__doc__)
    with one_line_errors():
        decode(arguments)
    return 0


def decode(arguments: Arguments) -> None:
    """Loads, decodes, shows.

    Raises ConfigError, CheckpointError, TokenizerError or OSError with one line for bad input.
    """
    check(
        arguments.num_samples >= 1,
        f"--num-samples {arguments.num_samples} is below 1: choose 1 or more",
    )
    check(arguments.chat or arguments.system is None, "--system needs --chat: give both or neither")
    check("" not in arguments.stop, "--stop is empty: give the text to stop at")
    to_stdout = arguments.json == Path("-")
    prompts = read_prompts(arguments.prompt, arguments.prompt_file)
    prompts = [prompt for prompt in prompts for _ in range(arguments.num_samples)]
    samplings = choose_samplings(arguments, len(prompts))
    source = open_source(arguments.model)
    tokenizer = load_tokenizer(arguments.model)
    strategy = choose_strategy(arguments, tokenizer)
    max_new_tokens, max_length = arguments.max_new_tokens, arguments.max_length
    batch_size = min(arguments.batch_size, len(prompts))
    check_settings(source.config, tokenizer, strategy, batch_size=batch_size, max_length=max_length)

    def encode(prompt: str) -> list[int]:
        ids = prompt_ids(tokenizer, prompt, arguments)
        limits = dict(max_new_tokens=max_new_tokens, max_length=max_length)
        return encode_prompt(ids, tokenizer, source.config, **limits)

    encoded = encode_prompts(prompts, encode)
    if arguments.json is not None and not to_stdout:
        check(
            arguments.prompt_file is None
            or arguments.json.resolve() != arguments.prompt_file.resolve(),
            f"--json {arguments.json} would overwrite the prompts: name another file",
        )
        check_output(arguments.json)

    keep_compiled_programs()
    dtype = choose_dtype(arguments.dtype)
    plain = partial(Console, highlight=False, markup=False, emoji=False, soft_wrap=True)
    people, notes = plain(stderr=to_stdout), plain(stderr=True, style="dim")

    with Progress(console=notes, transient=True, disable=not notes.is_terminal) as progress:
        model = assemble(
            source,
            dtype=dtype,
            track=lambda parts: progress.track(parts, description="loading"),
        )
    if arguments.stack_layers:
        model = stacked(model)
    engine = Engine(model, tokenizer, strategy, batch_size=batch_size, max_length=max_length)
    weights, cache = engine.memory_bytes(max(map(len, encoded)) + max_new_tokens)
    notes.print(
        f"{arguments.model.name}: {model.config.num_params / 1e6:.0f}M parameters, "
        f"{weights / 1e6:.0f} MB in {dtype}; cache {cache / 1e6:.0f} MB for {engine.batch_size} "
        f"row{'s' * (engine.batch_size > 1)}"
    )

    completions: list[Completion] = []
    with json_lines(arguments.json) as lines:

        def finish(index: int, completion: Completion) -> None:
            completion = dataclasses.replace(completion, prompt=prompts[index])
            completions.append(completion)
            if lines:
                print(json.dumps(completion.to_json(), ensure_ascii=False), file=lines, flush=True)

        if len(prompts) == 1 and not arguments.show_drafts and not to_stdout:
            people.print(verbatim(prompts[0]), style="dim")
            for piece in engine.stream(
                encoded[0],
                max_new_tokens=max_new_tokens,
                stop=arguments.stop,
                sampling=samplings[0],
            ):
                if isinstance(piece, Completion):
                    finish(0, piece)
                else:
                    people.print(verbatim(piece))
            people.print()
        else:
            if arguments.show_drafts:
                people.print(LEGEND)
            with Progress(console=notes, transient=True, disable=not notes.is_terminal) as progress:
                task = progress.add_task("decoding", total=len(prompts))

                def show(index: int, completion: Completion) -> None:
                    finish(index, completion)
                    progress.advance(task)
                    if to_stdout:
                        return
                    people.print(verbatim(prompts[index]), style="dim")
                    if arguments.show_drafts:
                        people.print(coloured(tokenizer, encoded[index], completion))
                    else:
                        people.print(verbatim(completion.text + "\n"))

                engine.generate(
                    encoded,
                    max_new_tokens=max_new_tokens,
                    stop=arguments.stop,
                    sampling=samplings,
                    on_completion=show,
                )
    notes.print(
        f"{summary(completions, engine.decode_seconds)}; {engine.compile_seconds:.1f} s compiling"
    )
    advise(notes, strategy, completions)


def json_lines(path: Path | None) -> AbstractContextManager[TextIO | None]:
    """Where the JSON lines go, if anywhere; a file that exists is emptied."""
    if path is None or path == Path("-"):
        return nullcontext(sys.stdout if path else None)
    return path.open("w", encoding="utf-8")


def prompt_ids(tokenizer: Tokenizer, prompt: str, arguments: Arguments) -> list[int]:
    """Token ids of a prompt, in the chat template if asked for."""
    if not arguments.chat:
        return tokenizer.encode(prompt)
    text = chat_prompt(tokenizer, prompt, arguments.system)
    return tokenizer.encode(text, add_bos=False)


def choose_strategy(arguments: Arguments, tokenizer: Tokenizer) -> Strategy:
    """The strategy that the arguments name; a self-speculative one may leave exit and draft
    length to the model's directory.

    Raises ConfigError for a missing number, and for one that the strategy does not use.
    """
    exit_layer, drafts = arguments.exit_layer, arguments.num_draft_tokens
    if arguments.strategy != "self_speculative":
        for name, value in (("num-draft-tokens", drafts), ("draft-vocab", arguments.draft_vocab)):
            check(value is None, f"--{name} means nothing to {arguments.strategy}")
    match arguments.strategy:
        case "autoregressive":
            check(exit_layer is None, "--exit-layer means nothing to autoregressive decoding")
            return Autoregressive()
        case "early_exit":
            check(exit_layer is not None, "early_exit needs --exit-layer, the layers to run")
            return EarlyExit(exit_layer)
    defaults = read_generation_defaults(arguments.model)
    exit_layer = defaults.exit_layer if exit_layer is None else exit_layer
    drafts = defaults.num_draft_tokens if drafts is None else drafts
    if exit_layer is None or drafts is None:
        raise ConfigError(
            f"self_speculative needs --exit-layer and --num-draft-tokens: {arguments.model} does "
            "not say them"
        )
    vocabulary = None
    if arguments.draft_vocab is not None:
        counts = find_counts(arguments.model, cache_directory(), tokenizer)
        vocabulary = DraftVocabulary.most_frequent(counts, arguments.draft_vocab)
    return SelfSpeculative(exit_layer, drafts, vocabulary)


def choose_samplings(arguments: Arguments, count: int) -> list[Sampling]:
    """How each text is drawn, each with a seed of its own.

    Raises ConfigError for a number out of its range, and for one that greedy decoding ignores.
    """
    numbers = {name: getattr(arguments, name) for name in ("top_k", "top_p", "min_p")}
    if arguments.temperature == 0:
        defaults = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "num_samples": 1, "seed": 0}
        for name, default in defaults.items():
            check(
                getattr(arguments, name) == default,
                f"--{name.replace('_', '-')} means nothing to greedy decoding: choose a "
                "--temperature above 0",
            )
    return [
        Sampling(temperature=arguments.temperature, seed=arguments.seed + index, **numbers)
        for index in range(count)
    ]


def advise(notes: Console, strategy: Strategy, completions: Sequence[Completion]) -> None:
    """Says why self-speculation did not pay, if it can't have."""
    drafted = sum(c.drafted for c in completions)
    accepted = sum(c.accepted for c in completions)
    if drafted and accepted < 0.3 * drafted:
        notes.print(
            f"Few drafts of exit {strategy.exit_layer} were right. A model that was not trained "
            "with LayerSkip decodes slower by early-exit drafts, though the text is the same."
        )


if __name__ == "__main__":
    sys.exit(main())
