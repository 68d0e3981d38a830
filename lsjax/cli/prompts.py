"""Prompts from the command line or a file, and requests, which have settings of their own."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lsjax.config import ConfigError, check
from lsjax.decoding.request import Request
from lsjax.decoding.sampling import Sampling

# What an object of a .jsonl file may say beside its prompt, with the kind of the value.
OPTIONS: dict[str, Any] = {
    **{"max_new_tokens": int, "top_k": int, "seed": int, "no_repeat_ngram": int},
    **{"temperature": float, "top_p": float, "min_p": float, "repetition_penalty": float},
    **{"stop": str, "stop_ids": int},  # one or a list
}


def read_prompts(prompt: str | None, file: Path | None) -> list[str]:
    """The prompt, or those of a file: .txt is one prompt, .jsonl has an object on each line with
    "prompt", or with Spec-Bench's "turns", of which the first is taken.

    Raises ConfigError with file and line for what is not that.
    """
    return [text for text, _, _ in _read(prompt, file)]


def read_encoded(
    file: Path,
    encode: Callable[[str], list[int]],
    *,
    every: int = 1,
    skip: Callable[[str], None] | None = None,
) -> list[list[int]]:
    """Token ids of every n-th prompt of a file (`read_prompts`).

    skip: is told of a row that is no prompt, or one that `encode` refuses, and the others are
    taken. Without it such a row is a ConfigError with file and line, as is a file in which nothing
    is left.
    """
    encoded = []
    for text, _, where in _read(None, file, skip)[::every]:
        try:
            encoded.append(encode(text))
        except ConfigError as error:
            _refuse(f"{where}: {error}", skip)
    check(bool(encoded), f"{file}: no prompt is left: none of its rows can be decoded")
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
    prompt: str | None, file: Path | None, skip: Callable[[str], None] | None = None
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
                    _refuse(str(error), skip)
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


def _refuse(message: str, skip: Callable[[str], None] | None) -> None:
    if skip is None:
        raise ConfigError(message)
    skip(message)


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
    given: dict[str, Any] = {}
    for name, kind in OPTIONS.items():
        if (value := row.get(name)) is None:
            continue
        several = name in ("stop", "stop_ids")
        values = value if several and isinstance(value, list) else [value]
        kinds = (int, float) if kind is float else kind
        check(
            all(isinstance(value, kinds) and not isinstance(value, bool) for value in values),
            f"{where}: {name} is {json.dumps(value)}, but must be {kind.__name__}"
            + (" or a list of such" if several else ""),
        )
        given[name] = tuple(values) if several else kind(value)
    given["seed"] = given.get("seed", default.sampling.seed) + number
    names = {field.name for field in dataclasses.fields(Sampling)}
    try:
        sampling = {name: given.pop(name) for name in names & given.keys()}
        sampling = dataclasses.replace(default.sampling, **sampling)
        return dataclasses.replace(default, prompt=prompt, sampling=sampling, **given)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _valid(prompt: str, where: str) -> str:
    check(bool(prompt), f"{where} is an empty prompt: it needs at least one character")
    half = next((c for c in prompt if "\ud800" <= c <= "\udfff"), None)
    check(half is None, f"{where} holds {half!r}, half a character: give valid Unicode")
    return prompt
