"""The prompts of a file, and decode.py's arguments with the requests that they ask for."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lsjax.cli.flags import ModelFlags, SamplingFlags, StrategyFlags, check_sampling
from lsjax.config import ConfigError, LlamaConfig, bounded, check
from lsjax.data.chat import chat_prompt
from lsjax.data.files import Fields, PlacedRow, Refuse, file_rows, read_lines, stop_at
from lsjax.data.sources import fill
from lsjax.data.tokenizer import Tokenizer
from lsjax.decoding.request import Request, encode_prompt
from lsjax.decoding.sampling import GREEDY, Sampling
from lsjax.evaluation.tasks import first_turn

# What an object of a file may say beside its prompt.
ENDS = ("max_new_tokens", "stop", "stop_ids")
SAMPLING = tuple(field.name for field in dataclasses.fields(Sampling))


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

    def __post_init__(self):
        super().__post_init__()
        check(
            self.chat or self.interactive or self.system is None,
            "--system needs --chat or --interactive: give one of them, or no --system",
        )
        check("" not in self.stop, "--stop is empty: give the text to stop at")
        check(
            self.json is not None or not self.logprobs,
            "--logprobs needs --json, the file that they are written to: give both or none",
        )
        for name in ("prompt", "prompt_file", "num_samples", "batch_size"):
            check(
                not self.interactive or getattr(self, name) == getattr(Arguments, name),
                f"{self.name_of(name)} means nothing to --interactive: leave it out",
            )
        check(
            all(len({*some}) < 2 for some in (self.strategies, self.exit_layers))
            and len({*self.num_draft_tokens}) < 2,
            "several strategies, exit layers or draft lengths are given: this program takes one of "
            "--strategy, --exit-layer and --num-draft-tokens",
        )


def prompt_rows(
    prompts: Sequence[str], file: Path | None, refuse: Refuse = stop_at
) -> Iterator[PlacedRow]:
    """The rows of a file, of which a .txt is one prompt; without a file these prompts as rows.

    Raises ConfigError with file and line, or hands it to `refuse` and leaves the row out.
    """
    if file is None:
        for number, prompt in enumerate(prompts, start=1):
            where = f"prompt {number} of {len(prompts)}" if len(prompts) > 1 else "--prompt"
            yield str(number), where, {"prompt": prompt}
    elif file.suffix == ".txt":
        text = "".join(line for _, line in read_lines(file)).removesuffix("\n")
        yield file.name, str(file), {"prompt": text}
    else:
        yield from file_rows([str(file)], refuse)


def choose_requests(arguments: Arguments) -> list[Request]:
    """Every text that is asked for, each with a seed of its own; for a chat one that stands for its
    turns. Text number i of all has the seed of the arguments + i; where an object of the file has a
    seed of its own, its texts count from that.

    Raises ConfigError for a number out of its range, and for one that greedy decoding ignores.
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
        check(bool(requests), f"{file} has no prompts in it: it needs at least one")
    is_greedy = all(request.sampling.temperature == 0 for request in requests)
    check_sampling(arguments.sampling, arguments.num_samples, is_greedy=is_greedy)
    return requests


def read_request(where: str, row: Fields, default: Request, number: int) -> Request:
    """`default` with the row's prompt, what the row says of its own, and the seed + `number`.

    Raises ConfigError, beginning with where the row stands.
    """
    row = first_turn(row)
    check(
        isinstance(row.get("prompt"), str),
        f'{where} is no object with a text under "prompt": write {{"prompt": "..."}}',
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
            f"{', '.join(ignored)} means nothing to greedy decoding: give a temperature above 0",
        )
        sampling = dataclasses.replace(sampling, seed=sampling.seed + number)
        return dataclasses.replace(default, prompt=prompt, sampling=sampling, **given)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def encode_requests(
    requests: Sequence[Request], arguments: Arguments, tokenizer: Tokenizer, config: LlamaConfig
) -> list[list[int]]:
    """Token ids of each prompt, in the chat template if asked for.

    Raises ConfigError for what `encode_prompt` refuses, with the number of the prompt.
    """
    encoded = []
    for number, request in enumerate(requests, start=1):
        if arguments.chat or arguments.interactive:
            text = chat_prompt(tokenizer, request.prompt, arguments.system)
            ids = tokenizer.encode(text, add_bos=False)
            request = dataclasses.replace(request, prompt=ids)
        try:
            encoded.append(encode_prompt(request, tokenizer, config, arguments.max_length))
        except ConfigError as error:
            where = f"prompt {number} of {len(requests)}: " if len(requests) > 1 else ""
            raise ConfigError(f"{where}{error}") from None
    return encoded
