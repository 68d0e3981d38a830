"""Loading a tokenizer from tokenizer.json, tokenizer.model (SentencePiece or tiktoken) or GGUF."""

from __future__ import annotations

import base64
import re
from itertools import count
from pathlib import Path

import tokenizers

from lsjax.config import split_step
from lsjax.data.tokenizer_bpe import (
    added_token,
    all_merges,
    byte_characters,
    byte_level_bpe,
    llama3_words,
)
from lsjax.data.tokenizer_gguf import load_gguf
from lsjax.data.tokenizer_huggingface import HuggingFaceTokenizer
from lsjax.data.tokenizer_sentencepiece import SentencePieceTokenizer
from lsjax.data.tokenizer_settings import TokenizerSettings, read_file, read_json, token_ids
from lsjax.data.tokenizers import Tokenizer, TokenizerError, first_line

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
    directory with one of the first two, such as that of a training run (a step after its @ is
    read over).

    Of both in one directory tokenizer.json wins: it is what transformers reads, and only it has
    tokens added later. But if the other is a SentencePiece model of the same size, that is taken:
    there the json is a conversion, which is not exact on runs of whitespace. Settings (bos, eos,
    add_bos_token, chat template) come from the files beside.

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
    if "model" not in read_json(file):
        raise TokenizerError(f"{file} is JSON but no tokenizer (no 'model'): wrong file?")
    backend = tokenizers.Tokenizer.from_file(str(file))
    settings = TokenizerSettings.beside(file)
    bos_ids = token_ids([settings.bos], backend.token_to_id)
    return HuggingFaceTokenizer(
        backend,
        bos_id=next(iter(bos_ids), None),
        eos_ids=token_ids(settings.eos, backend.token_to_id),
        # transformers adds nothing without a post-processor, and believes an explicit setting
        add_bos=settings.add_bos,
        chat_template=settings.chat_template,
    )


def _load_model(file: Path) -> Tokenizer:
    model, settings = read_file(file), TokenizerSettings.beside(file)
    if TIKTOKEN_LINE.match(model.partition(b"\n")[0]):
        return _tiktoken(model, settings)
    try:
        tokenizer = SentencePieceTokenizer(
            model, add_bos=settings.add_bos is not False, chat_template=settings.chat_template
        )
    except TokenizerError as error:
        raise TokenizerError(f"{file} is {error}: truncated or another file?") from error
    beyond = [i for i in settings.added_ids if i >= tokenizer.vocab_size]
    if beyond:
        raise TokenizerError(
            f"tokenizer_config.json adds tokens ({beyond[0]}, ...) that {file} lacks: add the "
            "tokenizer.json of this model"
        )
    tokenizer.eos_ids = token_ids(settings.eos, tokenizer.piece_id) or tokenizer.eos_ids
    return tokenizer


def _tiktoken(content: bytes, settings: TokenizerSettings) -> HuggingFaceTokenizer:
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
    bos_id = len(tokens)
    return HuggingFaceTokenizer(
        backend,
        bos_id=bos_id,
        eos_ids=(bos_id + 1, bos_id + 9, bos_id + 8),
        add_bos=settings.add_bos is not False,
        chat_template=settings.chat_template,
    )
