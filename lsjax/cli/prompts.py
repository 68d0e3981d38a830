"""Prompts of decode.py, from flags and files."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace

from lsjax.cli import engines
from lsjax.cli.flags.decode import Arguments
from lsjax.config import AnyPath, ConfigError, LlamaConfig, Sampling, check
from lsjax.data.chat import Dialogue
from lsjax.data.sources import fill
from lsjax.data.tokenizer import Tokenizer
from lsjax.decoding.request import Request, encode_prompt
from lsjax.evaluation.tasks import first_turn
from lsjax.io.rows import Fields, PlacedRow, Refuse, file_rows, read_lines, stop_at

# Fields that a row of a prompt file may have in addition to its prompt.
ENDS = ("max_new_tokens", "stop", "stop_ids")
SAMPLING = tuple(field.name for field in fields(Sampling))
COMMANDS = "Ctrl-C stops an answer, /new forgets the chat, Ctrl-D ends."


def prompt_rows(
    prompts: Sequence[str], file: AnyPath | None, refuse: Refuse = stop_at
) -> Iterator[PlacedRow]:
    """Rows of a file (.txt is one prompt). Without a file, `prompts` as rows. Raises ConfigError
    with file and line, or passes it to `refuse` and skips the row."""
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
    """One request per text, or one for a chat. Text i has the seed of the arguments + i. If a row
    has its own seed, its texts count from it. Raises ConfigError for a bad or ignored number."""
    default = Request(
        prompt="?",  # the shortest message of a chat
        max_new_tokens=arguments.max_new_tokens,
        stop=arguments.stop,
        stop_ids=arguments.stop_ids,
        log_probs=arguments.logprobs,
        sampling=arguments.sampling,
    )
    requests = [default] if arguments.interactive else []
    prompt, file = arguments.prompt, arguments.prompt_file
    if not arguments.interactive:
        check(
            (prompt is None) != (file is None),
            "give one of --prompt and --prompt-file" + (" and not both" if prompt else ""),
        )
        for _, where, row in prompt_rows([prompt], file):
            for sample in range(arguments.num_samples):
                number = len(requests) if row.get("seed") is None else sample
                requests.append(read_request(where, row, default, number))
        check(bool(requests), f"{file} has no prompts: add at least one")
    hottest = max(request.sampling.temperature for request in requests)
    given = replace(arguments.sampling, temperature=hottest)
    engines.check_sampling(given, arguments.num_samples)
    return requests


def read_request(where: str, row: Fields, default: Request, number: int) -> Request:
    """`default` with the row's prompt and other fields, and the seed + `number`. Raises
    ConfigError, which begins with the row's location."""
    row = first_turn(row)
    check(
        isinstance(row.get("prompt"), str),
        f'{where} is not an object with a text under "prompt": write {{"prompt": "..."}}',
    )
    prompt = fill("{prompt}", row, where)
    check(bool(prompt), f"{where} is an empty prompt: it needs at least one character")
    given = {name: row[name] for name in ENDS if row.get(name) is not None}
    own = {name: row[name] for name in SAMPLING if row.get(name) is not None}
    for name in {"stop", "stop_ids"} & given.keys():
        if not isinstance(given[name], list):
            given[name] = [given[name]]
    try:
        sampling = replace(default.sampling, **own)
        ignored = sorted({*engines.FILTERS} & own.keys())
        check(
            sampling.temperature > 0 or not ignored,
            f"{', '.join(ignored)} has no effect on greedy decoding: give a temperature above 0",
        )
        return replace(default, prompt=prompt, sampling=sampling.of_text(number), **given)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def encode_requests(
    requests: Sequence[Request], arguments: Arguments, tokenizer: Tokenizer, config: LlamaConfig
) -> list[Request]:
    """The requests with token ids as prompts, in the chat template if requested. Raises
    ConfigError, with the prompt's number, for a prompt that `encode_prompt` rejects."""
    encoded = []
    for number, request in enumerate(requests, start=1):
        if arguments.chat:
            _, ids = Dialogue(tokenizer, arguments.system).prompt(request.prompt)
            request = replace(request, prompt=ids)
        try:
            ids = encode_prompt(request, tokenizer, config, arguments.max_length)
        except ConfigError as error:
            where = f"prompt {number} of {len(requests)}: " if len(requests) > 1 else ""
            raise ConfigError(f"{where}{error}") from None
        encoded.append(replace(request, prompt=ids))
    return encoded
