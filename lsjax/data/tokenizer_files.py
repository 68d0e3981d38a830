"""Loading a tokenizer from tokenizer.json, tokenizer.model (SentencePiece or tiktoken) or GGUF."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import tokenizers

from lsjax.config import split_step
from lsjax.data.tokenizer import Tokenizer, TokenizerError, first_line
from lsjax.data.tokenizer_gguf import load_gguf
from lsjax.data.tokenizer_huggingface import (
    HuggingFaceTokenizer,
    added_token,
    all_merges,
    byte_characters,
    byte_level_bpe,
    llama3_words,
)
from lsjax.data.tokenizer_sentencepiece import SentencePieceTokenizer

MAX_FILE_BYTES = 256 << 20  # far above any real one
TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]{1,9}")
LLAMA3_NAMED_SPECIALS = {  # offset from the first special token; all the others are reserved
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a tokenizer.json, a tokenizer.model (SentencePiece or tiktoken), a *.gguf, or a
    directory with one of the first two. That may be a training run; a step after its @ is ignored.

    If a directory has both, tokenizer.json wins: transformers reads it, and it alone has tokens
    that were added later. A SentencePiece model of the same size wins over it, since the json is
    then a conversion, which is not exact on runs of whitespace. Settings (bos, eos, add_bos_token,
    chat template) come from the files beside.

    Raises:
      TokenizerError: missing, empty, truncated or unsuitable files.
    """
    path, _ = split_step(path)
    try:
        return _load(path)
    except TokenizerError as error:
        if str(path) in str(error):
            raise
        raise TokenizerError(f"{path}: {error}") from error
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the Rust library panics with a BaseException of its own
        raise TokenizerError(
            f"{path} holds no usable tokenizer ({first_line(error)}): download or export it again"
        ) from error


def _load(path: Path) -> Tokenizer:
    if path.suffix == ".gguf":
        return load_gguf(path)
    if path.is_dir():
        json_file, model_file = path / "tokenizer.json", path / "tokenizer.model"
        if not json_file.exists() and not model_file.exists():
            raise TokenizerError(
                f"{path} has neither tokenizer.json nor tokenizer.model: name a directory or file "
                "that does, or a .gguf"
            )
        if not json_file.exists():
            return _load_model(model_file)
        from_json = _load_json(json_file)
        try:
            from_model = _load_model(model_file) if model_file.exists() else None
        except TokenizerError:  # it lacks added tokens that the settings name: the json has all
            return from_json
        exact = isinstance(from_model, SentencePieceTokenizer)
        return from_model if exact and from_model.vocab_size == from_json.vocab_size else from_json
    if path.suffix == ".json":
        return _load_json(path)
    return _load_model(path)


def _load_json(file: Path) -> HuggingFaceTokenizer:
    if "model" not in _read_json(file):
        raise TokenizerError(f"{file} is JSON but no tokenizer (no 'model'): wrong file?")
    backend = tokenizers.Tokenizer.from_file(str(file))
    return HuggingFaceTokenizer(backend, **_settings(file, backend.token_to_id))


def _load_model(file: Path) -> Tokenizer:
    model = _read_file(file)
    if TIKTOKEN_LINE.match(model.partition(b"\n")[0]):
        return _tiktoken(file, model)
    try:
        tokenizer = SentencePieceTokenizer(model)
    except TokenizerError as error:
        raise TokenizerError(f"{file} is {error}: truncated or another file?") from error
    added = _beside(file, "tokenizer_config.json").get("added_tokens_decoder") or ()
    if (largest := max(map(int, added), default=-1)) >= tokenizer.vocab_size:
        raise TokenizerError(
            f"tokenizer_config.json adds a token {largest} that {file} lacks: add the "
            "tokenizer.json of this model"
        )
    settings = _settings(file, tokenizer.piece_id)
    tokenizer.eos_ids = settings["eos_ids"] or tokenizer.eos_ids
    tokenizer.add_bos &= settings["add_bos"] is not False
    tokenizer.chat_template = settings["chat_template"]
    return tokenizer


def _tiktoken(file: Path, content: bytes) -> HuggingFaceTokenizer:
    """Llama 3's file: a line `base64 rank` for each token, then 256 special tokens."""
    tokens: list[str] = []
    characters = byte_characters()
    for number, line in enumerate(content.splitlines()):
        if not TIKTOKEN_LINE.fullmatch(line) or int(line.split()[1]) != number:
            raise TokenizerError(
                f"line {number + 1} is not 'base64 {number}': truncated or damaged, download again"
            )
        token = base64.b64decode(line.split()[0], validate=True)
        tokens.append("".join(characters[byte] for byte in token))
    vocab = {token: rank for rank, token in enumerate(tokens)}
    if len(vocab) != len(tokens) or not vocab.keys() >= set(characters.values()):
        raise TokenizerError("tokens appear twice or single bytes are missing: a damaged file")
    merges = all_merges(tokens, vocab)
    backend = byte_level_bpe(vocab, merges, llama3_words(), whole_words=True)
    reserved = count()
    specials = (
        LLAMA3_NAMED_SPECIALS.get(i) or f"<|reserved_special_token_{next(reserved)}|>"
        for i in range(256)
    )
    backend.add_special_tokens([added_token(name) for name in specials])
    first = len(tokens)
    settings = _settings(file, backend.token_to_id)
    settings |= {"bos_id": first, "eos_ids": (first + 1, first + 9, first + 8)}
    settings["add_bos"] = settings["add_bos"] is not False
    return HuggingFaceTokenizer(backend, **settings)


def _settings(file: Path, id_of: Callable[[str], int | None]) -> dict[str, Any]:
    """The settings of HuggingFaceTokenizer, by the small files beside a tokenizer.

    id_of: maps the spelling of a token to its id, or to None where it has none.
    """
    names = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
    config, special, generation = (_beside(file, name) for name in names)

    def spelled(name: str) -> str | None:
        token = config.get(name) or special.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        return token if isinstance(token, str) else None

    def ids(*tokens: str | int | None) -> tuple[int, ...]:
        found: dict[int, None] = {}  # each once
        for token in tokens:
            token_id = id_of(token) if isinstance(token, str) else token
            if isinstance(token_id, int):
                found[token_id] = None
            elif token is not None:
                raise TokenizerError(f"its tokenizer_config.json names {token!r}, which it lacks")
        return tuple(found)

    ends = generation.get("eos_token_id")
    bos, add_bos = spelled("bos_token"), config.get("add_bos_token")
    bos_ids = ids(generation.get("bos_token_id") if bos is None else bos)
    jinja, template = file.parent / "chat_template.jinja", config.get("chat_template")
    if jinja.exists():
        template = _read_file(jinja).decode("utf-8")
    elif isinstance(template, list):  # several, by name
        template = {t["name"]: t["template"] for t in template}.get("default")
    return {
        "bos_id": next(iter(bos_ids), None),
        "eos_ids": ids(spelled("eos_token"), *(ends if isinstance(ends, list) else [ends])),
        "add_bos": add_bos if isinstance(add_bos, bool) else None,
        "chat_template": template if isinstance(template, str) else None,
    }


def _beside(file: Path, name: str) -> dict[str, Any]:
    other = file.parent / name
    return _read_json(other) if other.exists() else {}


def _read_file(file: Path) -> bytes:
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


def _read_json(file: Path) -> dict[str, Any]:
    """Content of a file that holds a JSON object."""
    text = _read_file(file)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{file} is no valid JSON ({first_line(error)}): repair it") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{file} is JSON but no object: wrong file?")
    return content
