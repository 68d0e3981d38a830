"""The arguments of decode.py, and the requests that they ask for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lsjax.cli.flags import ModelFlags, SamplingFlags, StrategyFlags, check_sampling
from lsjax.cli.prompts import encode_prompts, read_requests
from lsjax.config import LlamaConfig, bounded, check
from lsjax.data.chat import chat_prompt
from lsjax.data.tokenizer import Tokenizer
from lsjax.decoding.request import Request, encode_prompt
from lsjax.decoding.sampling import GREEDY


@dataclass(frozen=True, kw_only=True)
class Arguments(StrategyFlags, ModelFlags):
    """Continues prompts with a Llama."""

    prompt: str | None = None
    """Text to continue."""
    prompt_file: Path | None = None
    """Prompts: .txt is one prompt, .jsonl has an object with "prompt" on each line, which may say
    of its own: max_new_tokens, stop, stop_ids, temperature and all that is about tokens here."""
    interactive: bool = False
    """A chat in the terminal, in the model's chat template."""
    max_new_tokens: int = 128
    """Ends a text that does not end by itself."""
    sampling: SamplingFlags = GREEDY
    """How tokens are chosen: penalties come first, then temperature, top_k, top_p and min_p."""
    num_samples: int = bounded(1, low=1)
    """Texts for each prompt."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Ends a text where it would contain this; may be given several times."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end a text, beside the model's own."""
    logprobs: bool = False
    """Writes the log-probability of each new token to the JSON lines."""
    chat: bool = False
    """Puts the prompt into the model's chat template, as a user's message."""
    system: str | None = None
    """With --chat or --interactive: the system message."""
    json: Path | None = None
    """Writes a JSON object a text to this file ("-": to standard output, and nothing else)."""
    show_drafts: bool = False
    """Shows which tokens the draft proposed and what the verification made of them."""


def choose_requests(arguments: Arguments) -> list[Request]:
    """Every text that is asked for, each with a seed of its own; for a chat one that stands for its
    turns.

    Raises ConfigError for arguments that don't fit each other, for a number out of its range, and
    for one that greedy decoding ignores.
    """
    _check_together(arguments)
    default = Request(
        prompt="?",  # the shortest message of a chat
        max_new_tokens=arguments.max_new_tokens,
        stop=arguments.stop,
        stop_ids=arguments.stop_ids,
        log_probs=arguments.logprobs,
        sampling=arguments.sampling,
    )
    requests = [default]
    if not arguments.interactive:
        requests = read_requests(
            arguments.prompt, arguments.prompt_file, default, arguments.num_samples
        )
    check_sampling(
        arguments.sampling,
        arguments.num_samples,
        is_greedy=all(request.sampling.temperature == 0 for request in requests),
        unused=("top_k", "top_p", "min_p", "seed"),
    )
    return requests


def encode_requests(
    requests: Sequence[Request], arguments: Arguments, tokenizer: Tokenizer, config: LlamaConfig
) -> list[list[int]]:
    """Token ids of each prompt, in the chat template if asked for.

    Raises ConfigError for what `encode_prompt` refuses, with the number of the prompt.
    """

    def encode(request: Request) -> list[int]:
        ids = request.prompt
        if arguments.chat or arguments.interactive:
            text = chat_prompt(tokenizer, request.prompt, arguments.system)
            ids = tokenizer.encode(text, add_bos=False)
        return encode_prompt(
            ids,
            tokenizer,
            config,
            max_new_tokens=request.max_new_tokens,
            max_length=arguments.max_length,
            stop_ids=request.stop_ids,
        )

    return encode_prompts(requests, encode)


def _check_together(arguments: Arguments) -> None:
    check(
        arguments.chat or arguments.interactive or arguments.system is None,
        "--system needs --chat or --interactive: give one of them, or no --system",
    )
    check("" not in arguments.stop, "--stop is empty: give the text to stop at")
    check(
        arguments.json is not None or not arguments.logprobs,
        "--logprobs needs --json, the file that they are written to: give both or none",
    )
    if arguments.interactive:
        for name in ("prompt", "prompt_file"):
            check(
                getattr(arguments, name) is None,
                f"--{name.replace('_', '-')} means nothing to --interactive: leave it out",
            )
        check(arguments.num_samples == 1, "--num-samples means nothing to --interactive")
        check(arguments.batch_size == 1, "--batch-size means nothing to --interactive")
