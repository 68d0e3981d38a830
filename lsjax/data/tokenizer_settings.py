"""The small files beside a tokenizer: begin and end tokens, chat template; checked reading."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsjax.data.tokenizers import Tokenizer, TokenizerError, first_line

MAX_FILE_BYTES = 256 << 20  # the largest real one (a tekken file) has 19 MB


@dataclass(frozen=True)
class TokenizerSettings:
    """What the small files beside a tokenizer say of it."""

    bos: str | int | None
    eos: tuple[str | int | None, ...]
    add_bos: bool | None
    chat_template: str | None
    added_ids: tuple[int, ...]

    @classmethod
    def beside(cls, file: Path) -> TokenizerSettings:
        names = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
        files = [file.parent / name for name in names]
        config, special, generation = (read_json(f) if f.exists() else {} for f in files)

        def spelled(name: str) -> str | None:
            token = config.get(name) or special.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            return token if isinstance(token, str) else None

        ends = generation.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [ends]
        bos, add_bos = spelled("bos_token"), config.get("add_bos_token")
        jinja, template = file.parent / "chat_template.jinja", config.get("chat_template")
        if jinja.exists():
            template = read_file(jinja).decode("utf-8")
        elif isinstance(template, list):  # several, by name
            template = {t["name"]: t["template"] for t in template}.get("default")
        return cls(
            bos=generation.get("bos_token_id") if bos is None else bos,
            eos=(spelled("eos_token"), *ends),
            add_bos=add_bos if isinstance(add_bos, bool) else None,
            chat_template=template if isinstance(template, str) else None,
            added_ids=tuple(int(i) for i in config.get("added_tokens_decoder") or ()),
        )


def token_ids(
    tokens: Iterable[str | int | None], id_of: Callable[[str], int | None]
) -> tuple[int, ...]:
    """Ids of tokens given by spelling or id, each once, None left out; `id_of` maps a spelling."""
    found: dict[int, None] = {}
    for token in tokens:
        if token is not None:
            token_id = id_of(token) if isinstance(token, str) else token
            if not isinstance(token_id, int):
                raise TokenizerError(f"its tokenizer_config.json names {token!r}, which it lacks")
            found[token_id] = None
    return tuple(found)


def save_settings(tokenizer: Tokenizer, directory: Path, tokenizer_class: str) -> None:
    """Writes what `TokenizerSettings.beside` and transformers read; makes the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "tokenizer_class": tokenizer_class,
        "add_bos_token": tokenizer.add_bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        **tokenizer.special_tokens,
    }
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    _write_json(directory / "tokenizer_config.json", config)
    if len(tokenizer.eos_ids) > 1:  # tokenizer_config.json has room for one only
        file = directory / "generation_config.json"
        generation = read_json(file) if file.exists() else {}
        generation["eos_token_id"] = list(tokenizer.eos_ids)
        _write_json(file, generation)


def read_file(file: Path) -> bytes:
    """Content of a file that is there, not empty and not absurdly large."""
    try:
        if (size := file.stat().st_size) > MAX_FILE_BYTES:
            raise TokenizerError(f"{file} has {size} bytes: too large for a tokenizer, wrong file?")
        content = file.read_bytes()
    except OSError as error:
        raise TokenizerError(f"cannot read {file} ({error.strerror}): check the path") from error
    if not content:
        raise TokenizerError(f"{file} is empty: download or export it again")
    return content


def read_json(file: Path) -> dict[str, Any]:
    """Content of a file that holds a JSON object."""
    text = read_file(file)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{file} is no valid JSON ({first_line(error)}): repair it") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{file} is JSON but no object: wrong file?")
    return content


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
