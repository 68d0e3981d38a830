"""Prompts from the command line or a file, and requests, which have settings of their own."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from lsjax.config import Checked, ConfigError, bounded, check
from lsjax.data.documents import stop_at
from lsjax.data.sources import fill
from lsjax.decoding.request import Request
from lsjax.decoding.sampling import Sampling
from lsjax.evaluation.examples import file_rows

SAMPLING_FIELDS = [field.name for field in dataclasses.fields(Sampling)]
# What an object of a .jsonl file may say beside its prompt.
OPTIONS = ("max_new_tokens", "stop", "stop_ids", *SAMPLING_FIELDS)


def read_prompts(prompt: str | None, file: Path | None) -> list[str]:
    """The prompt, or those of a file: .txt is one prompt, .jsonl has an object on each line with
    "prompt", or with Spec-Bench's "turns", of which the first is taken.

    Raises ConfigError with file and line for what is not that.
    """
    return [text for text, _, _ in _read(prompt, file)]


@dataclass(frozen=True, kw_only=True)
class RowFlags(Checked, prefix="--"):
    """Which rows are taken, and what makes a prompt of each."""

    prompt_template: str | None = None
    """Makes the prompt of a row, its fields in braces: '{question}'. A task has its own, and a run
    that was finetuned on rows with these fields too."""
    every: int = bounded(1, low=1)
    """Takes every n-th row."""
    limit: int | None = bounded(None, low=1)
    """Takes no more than so many rows."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """Whether a row that is no prompt, or is too long, ends the program. Either way it is named."""


@dataclass(frozen=True, kw_only=True)
class PromptArguments(RowFlags):
    """Which prompts of a file are taken."""

    prompt_file: Path | None = None
    """.txt is one prompt, .jsonl has an object with "prompt" (or Spec-Bench's "turns") on each
    line; with --prompt-template also .tsv and .csv, each also as .gz."""


def read_encoded(
    arguments: PromptArguments,
    built_in: Sequence[str],
    encode: Callable[[str], list[int]],
    warn: Callable[[str], None],
) -> list[list[int]]:
    """Token ids of the file's prompts, or of the built-in prompts if no file is given.

    warn: is told of each row that is skipped. Raises ConfigError with file and line for a bad row
    that is not, among them those that `encode` refuses, and for a file in which nothing is left.
    """
    file, template = arguments.prompt_file, arguments.prompt_template
    if file is None:
        check(template is None, "--prompt-template needs --prompt-file, whose rows it is for")
        return encode_prompts(built_in, encode)

    def skip(error: ConfigError) -> None:
        warn(f"skipped: {error}")

    refuse = skip if arguments.bad_rows == "skip" else stop_at

    def prompts() -> Iterator[tuple[str, str]]:
        if template is None:
            yield from ((text, where) for text, _, where in _read(None, file, refuse))
            return
        for _, where, row in file_rows([str(file)], refuse):
            try:
                yield _valid(fill(template, row, where), where), where
            except ConfigError as error:
                refuse(error)

    encoded: list[list[int]] = []
    for text, where in islice(prompts(), 0, None, arguments.every):
        try:
            encoded.append(encode(text))
        except ConfigError as error:
            refuse(ConfigError(f"{where}: {error}"))
        if len(encoded) == arguments.limit:
            break
    check(bool(encoded), f"{file}: no row of it can be decoded: give another file")
    return encoded


def read_requests(
    prompt: str | None, file: Path | None, default: Request, num_samples: int = 1
) -> list[Request]:
    """The same as requests, `num_samples` for each prompt: `default` with the prompt, and with what
    an object of a .jsonl file says of its own (OPTIONS).

    Text number i of all has the seed of `default` + i; where an object has a seed of its own, its
    texts count from that.

    Raises ConfigError with file and line.
    """
    requests: list[Request] = []
    for text, row, where in _read(prompt, file):
        for sample in range(num_samples):
            number = len(requests) if row.get("seed") is None else sample
            requests.append(_request(text, row, where, default, number))
    return requests


def _read(
    prompt: str | None, file: Path | None, refuse: Callable[[ConfigError], None] = stop_at
) -> list[tuple[str, dict, str]]:
    """Prompts with the objects that held them and where they stood."""
    check(
        (prompt is None) != (file is None),
        "give one of --prompt and --prompt-file" + (" and not both" if prompt else ""),
    )
    if file is None:
        return [(_valid(prompt, "--prompt"), {}, "--prompt")]
    lines = file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    match file.suffix:
        case ".txt":
            text = "\n".join(_text(line, f"{file}, line {n}") for n, line in enumerate(lines, 1))
            return [(_valid(text.removesuffix("\n"), str(file)), {}, str(file))]
        case ".jsonl":
            rows = []
            for number, line in enumerate(lines, start=1):
                try:
                    if line.strip():
                        rows.append(_from_line(line, f"{file}, line {number}"))
                except ConfigError as error:
                    refuse(error)
            check(bool(rows), f"{file} has no prompts in it: it needs at least one")
            return rows
        case suffix:
            raise ConfigError(f"{file}: prompts come from .txt or .jsonl, not {suffix or 'that'}")


def encode_prompts(prompts: Sequence[str], encode: Callable[[str], list[int]]) -> list[list[int]]:
    """Each prompt's token ids. Of several prompts, an error names the one that it is about."""
    encoded = []
    for number, prompt in enumerate(prompts, start=1):
        try:
            encoded.append(encode(prompt))
        except ConfigError as error:
            where = f"prompt {number} of {len(prompts)}: " if len(prompts) > 1 else ""
            raise ConfigError(f"{where}{error}") from None
    return encoded


def _text(line: bytes, where: str) -> str:
    try:
        return line.decode().removesuffix("\r")
    except UnicodeDecodeError:
        raise ConfigError(f"{where} is not UTF-8 text: save it as UTF-8") from None


def _from_line(line: bytes, where: str) -> tuple[str, dict, str]:
    text = _text(line, where)
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = getattr(error, "msg", error)  # without the line: there is but one
        raise ConfigError(f'{where} is not JSON ({problem}): write {{"prompt": "..."}}') from None
    match row:
        case {"prompt": str(prompt)} | {"turns": [str(prompt), *_]}:
            return _valid(prompt, where), row, where
    raise ConfigError(f'{where} is no object with a text under "prompt": write {{"prompt": "..."}}')


def _request(prompt: str, row: dict, where: str, default: Request, number: int) -> Request:
    given = {name: row[name] for name in OPTIONS if row.get(name) is not None}
    for name in {"stop", "stop_ids"} & given.keys():  # one or a list
        value = given[name]
        given[name] = tuple(value) if isinstance(value, list) else (value,)
    try:
        own = {name: given.pop(name) for name in SAMPLING_FIELDS if name in given}
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


def _valid(prompt: str, where: str) -> str:
    check(bool(prompt), f"{where} is an empty prompt: it needs at least one character")
    half = next((c for c in prompt if "\ud800" <= c <= "\udfff"), None)
    check(half is None, f"{where} holds {half!r}, half a character: give valid Unicode")
    return prompt
