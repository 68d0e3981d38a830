"""Prompts from the command line or a file."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from lsjax.config import ConfigError, check


def read_prompts(prompt: str | None, file: Path | None) -> list[str]:
    """The prompt, or those of a file: .txt is one prompt, .jsonl has an object on each line with
    "prompt", or with Spec-Bench's "turns", of which the first is taken.

    Raises ConfigError with file and line for what is not that.
    """
    check(
        (prompt is None) != (file is None),
        "give one of --prompt and --prompt-file" + (" and not both" if prompt else ""),
    )
    if file is None:
        return [_valid(prompt, "--prompt")]
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)
        raise ConfigError(f"{file}, line {line} is not UTF-8 text: save it as UTF-8") from None
    match file.suffix:
        case ".txt":
            return [_valid(text.removesuffix("\n"), str(file))]
        case ".jsonl":
            lines = enumerate(text.split("\n"), start=1)  # JSON may hold other line separators
            prompts = [_from_line(line, f"{file}, line {n}") for n, line in lines if line.strip()]
            check(bool(prompts), f"{file} has no prompts in it: it needs at least one")
            return prompts
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


def _from_line(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        problem = getattr(error, "msg", error)  # without the line: there is but one
        raise ConfigError(f'{where} is not JSON ({problem}): write {{"prompt": "..."}}') from None
    match row:
        case {"prompt": str(prompt)} | {"turns": [str(prompt), *_]}:
            return _valid(prompt, where)
    raise ConfigError(f'{where} is no object with a text under "prompt": write {{"prompt": "..."}}')


def _valid(prompt: str, where: str) -> str:
    check(bool(prompt), f"{where} is an empty prompt: it needs at least one character")
    half = next((c for c in prompt if "\ud800" <= c <= "\udfff"), None)
    check(half is None, f"{where} holds {half!r}, half a character: give valid Unicode")
    return prompt
