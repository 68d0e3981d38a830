"""Prompts from the command line or a file."""

import json
from pathlib import Path

from lsjax.config import ConfigError, check


def read_prompts(prompt: str | None, file: Path | None) -> list[str]:
    """The prompt, or those of a file: .txt is one prompt, .jsonl an object with "prompt" a line.

    Raises ConfigError with file and line for what is not that.
    """
    check(
        (prompt is None) != (file is None),
        "give one of --prompt and --prompt-file" + (" and not both" if prompt else ""),
    )
    if file is None:
        return [_nonempty(prompt, "--prompt")]
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text (byte {error.start})") from None
    match file.suffix:
        case ".txt":
            return [_nonempty(text.removesuffix("\n"), str(file))]
        case ".jsonl":
            lines = enumerate(text.splitlines(), start=1)
            prompts = [_from_line(line, f"{file}, line {n}") for n, line in lines if line.strip()]
            check(bool(prompts), f"{file} has no prompts in it")
            return prompts
        case suffix:
            raise ConfigError(f"{file}: prompts come from .txt or .jsonl, not {suffix or 'that'}")


def _from_line(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {error}") from None
    check(
        isinstance(row, dict) and isinstance(row.get("prompt"), str),
        f'{where} is no object with a text under "prompt"',
    )
    return _nonempty(row["prompt"], where)


def _nonempty(prompt: str, where: str) -> str:
    check(bool(prompt), f"{where} is an empty prompt: it needs at least one character")
    return prompt
