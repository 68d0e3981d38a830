"""Prompt files, decode.py's arguments, and the requests made from both."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from lsjax.cli.flags import ModelFlags, SamplingFlags, check_sampling
from lsjax.cli.strategies import StrategyFlags, StrategyName
from lsjax.config import ConfigError, LlamaConfig, Path, bounded, check
from lsjax.data.files import Fields, PlacedRow, Refuse, file_rows, read_lines, stop_at
from lsjax.data.sources import fill
from lsjax.data.tokenizer import Dialogue, Tokenizer
from lsjax.decoding.request import Request, encode_prompt
from lsjax.decoding.sampling import GREEDY, Sampling
from lsjax.evaluation.tasks import first_turn

# Fields that a row of a prompt file may have in addition to its prompt.
ENDS = ("max_new_tokens", "stop", "stop_ids")
SAMPLING = tuple(field.name for field in dataclasses.fields(Sampling))


@dataclass(frozen=True, kw_only=True)
class Arguments(StrategyFlags, ModelFlags):
    """Continues prompts with a Llama."""

    strategies: Annotated[tuple[StrategyName, ...], tyro.conf.arg(aliases=("--strategy",))] = ()
    """autoregressive runs all layers. early_exit runs only the first layers. self_speculative
    drafts with the first layers and verifies with the others: the same greedy tokens, up to
    rounding. auto chooses exit and draft length in each round, or looks drafts up in the text.
    Default: auto if the model was trained with exits, else autoregressive."""
    prompt: str | None = None
    """Text to continue."""
    prompt_file: Path | None = None
    """File of prompts. A .txt file is one prompt. A .jsonl file has an object with "prompt" on each
    line, and optionally max_new_tokens, stop, stop_ids, and sampling fields such as temperature."""
    interactive: bool = False
    """Chats in the terminal, with the model's chat template."""
    max_new_tokens: int = 128
    """Maximum number of new tokens."""
    sampling: SamplingFlags = GREEDY
    """Choice of tokens: penalties apply first, then temperature, top_k, top_p and min_p."""
    num_samples: int = bounded(1, low=1)
    """Number of texts per prompt."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Ends a text before this string; may be repeated."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end a text, in addition to the model's own."""
    logprobs: bool = False
    """Writes the log-probability of each new token to the JSON lines."""
    chat: bool = False
    """Formats the prompt as a user message with the model's chat template."""
    system: str | None = None
    """System message, with --chat or --interactive."""
    json: Path | None = None
    """Writes one JSON object per text to this file. With "-", standard output has only these."""
    show_drafts: bool = False
    """Colours accepted drafts, rejected drafts, and the model's own tokens."""
    profile: Path | None = None
    """Writes a trace of decoding, for xprof or TensorBoard, to this directory."""

    def __post_init__(self):
        super().__post_init__()
        check(
            self.chat or self.interactive or self.system is None,
            "--system needs --chat or --interactive: add one of them, or drop --system",
        )
        check("" not in self.stop, "--stop is empty: give the text to stop at")
        check(
            self.json is not None or not self.logprobs,
            "--logprobs needs --json, the file to write them to: add --json or drop --logprobs",
        )
        for name in ("prompt", "prompt_file", "num_samples", "batch_size"):
            check(
                not self.interactive or getattr(self, name) == getattr(Arguments, name),
                f"{self.name_of(name)} has no effect with --interactive: leave it out",
            )
        check(
            all(len({*some}) < 2 for some in (self.strategies, self.exit_layers))
            and len({*self.num_draft_tokens}) < 2,
            "several strategies, exit layers or draft lengths are given: give one value each to "
            "--strategy, --exit-layer and --num-draft-tokens",
        )


def prompt_rows(
    prompts: Sequence[str], file: Path | None, refuse: Refuse = stop_at
) -> Iterator[PlacedRow]:
    """Rows of a file (.txt is one prompt). Without a file, `prompts` as rows.

    Raises ConfigError with file and line, or passes it to `refuse` and skips the row.
    """
    if file is None:
        for number, prompt in enumerate(prompts, start=1):
            where = f"prompt {number} of {len(prompts)}" if len(prompts) > 1 else "--prompt"
            yield str(number), where, {"prompt": prompt}
    elif file.suffix == ".txt":
        text = "".join(line for *_, line in read_lines(file)).removesuffix("\n")
        yield file.name, str(file), {"prompt": text}
    else:
        yield from file_rows([str(file)], refuse)


def choose_requests(arguments: Arguments) -> list[Request]:
    """One request per text, each with its own seed. A chat has a single request, which every turn
    copies. Text number i has the seed of the arguments + i. If a row has its own seed, the seeds of
    its texts count from there.

    Raises ConfigError for a number out of range, or for one that greedy decoding ignores.
    """
    default = Request(
        prompt="?",  # the shortest message of a chat
        max_new_tokens=arguments.max_new_tokens,
        stop=arguments.stop,
        stop_ids=arguments.stop_ids,
        log_probs=arguments.logprobs,
        sampling=arguments.sampling,
    )
    requests: list[Request] = []
    if arguments.interactive:
        requests = [default]
    else:
        prompt, file = arguments.prompt, arguments.prompt_file
        check(
            (prompt is None) != (file is None),
            "give one of --prompt and --prompt-file" + (" and not both" if prompt else ""),
        )
        for _, where, row in prompt_rows([prompt], file):
            for sample in range(arguments.num_samples):
                number = len(requests) if row.get("seed") is None else sample
                requests.append(read_request(where, row, default, number))
        check(bool(requests), f"{file} has no prompts: add at least one")
    is_greedy = all(request.sampling.temperature == 0 for request in requests)
    check_sampling(arguments.sampling, arguments.num_samples, is_greedy=is_greedy)
    return requests


def read_request(where: str, row: Fields, default: Request, number: int) -> Request:
    """`default` with the row's prompt and other fields, and the seed + `number`.

    Raises ConfigError, which begins with the row's location.
    """
    row = first_turn(row)
    check(
        isinstance(row.get("prompt"), str),
        f'{where} is not an object with a text under "prompt": write {{"prompt": "..."}}',
    )
    prompt = fill("{prompt}", row, where)
    check(bool(prompt), f"{where} is an empty prompt: it needs at least one character")
    given, own = (
        {name: row[name] for name in names if row.get(name) is not None}
        for names in (ENDS, SAMPLING)
    )
    for name in {"stop", "stop_ids"} & given.keys():  # one or a list
        value = given[name]
        given[name] = tuple(value) if isinstance(value, list) else (value,)
    try:
        sampling = dataclasses.replace(default.sampling, **own)
        ignored = sorted({"top_k", "top_p", "min_p"} & own.keys())
        check(
            sampling.temperature > 0 or not ignored,
            f"{', '.join(ignored)} has no effect on greedy decoding: give a temperature above 0",
        )
        sampling = dataclasses.replace(sampling, seed=sampling.seed + number)
        return dataclasses.replace(default, prompt=prompt, sampling=sampling, **given)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def encode_requests(
    requests: Sequence[Request], arguments: Arguments, tokenizer: Tokenizer, config: LlamaConfig
) -> list[list[int]]:
    """Token ids of each prompt, in the chat template if requested.

    Raises ConfigError, with the prompt's number, for a prompt that `encode_prompt` rejects.
    """
    encoded = []
    for number, request in enumerate(requests, start=1):
        if arguments.chat or arguments.interactive:
            _, ids = Dialogue(tokenizer, arguments.system).prompt(request.prompt)
            request = dataclasses.replace(request, prompt=ids)
        try:
            encoded.append(encode_prompt(request, tokenizer, config, arguments.max_length))
        except ConfigError as error:
            where = f"prompt {number} of {len(requests)}: " if len(requests) > 1 else ""
            raise ConfigError(f"{where}{error}") from None
    return encoded
