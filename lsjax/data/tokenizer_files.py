"""Loading a tokenizer from tokenizer.json, tokenizer.model (SentencePiece) or GGUF."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import tokenizers
from tokenizers import normalizers, pre_tokenizers

from lsjax.config import Path, split_step
from lsjax.data.files import local_copy, one_line, read_json
from lsjax.data.gguf_files import gguf_parts, open_gguf
from lsjax.data.tokenizer import Tokenizer, TokenizerError
from lsjax.data.tokenizer_backends import (
    BYTE_PIECE,
    LLAMA3_SPLIT,
    QWEN2_SPLIT,
    TEKKEN_SPLIT,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    added_token,
    byte_level_bpe,
    matched_words,
)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # token types of GGUF and of SentencePiece
_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
_DIGITS = pre_tokenizers.Digits(individual_digits=True)
# Words of each tokenizer.ggml.pre, as in the tokenizer.json of its models.
_WORDS = {
    "default": _BYTE_LEVEL,
    "gpt-2": _BYTE_LEVEL,
    "smollm": pre_tokenizers.Sequence([_DIGITS, _BYTE_LEVEL]),  # SmolLM 1 and 2
    "llama-bpe": matched_words(LLAMA3_SPLIT),
    "smaug-bpe": matched_words(LLAMA3_SPLIT),  # SmolLM3, and Llama 3 without a begin token
    "dbrx": matched_words(LLAMA3_SPLIT),  # OLMo 2 and 3
    "qwen2": matched_words(QWEN2_SPLIT),
    "tekken": matched_words(TEKKEN_SPLIT),  # Mistral
}
_WHOLE_WORDS = ("llama-bpe", "smaug-bpe", "tekken")  # a word that is a token skips the merges
_ADD_BOS = ("llama-bpe", "tekken")  # if the file does not say


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a tokenizer.json, a tokenizer.model (SentencePiece), a *.gguf, or a directory with one
    of the first two. The directory may be a training run; a step after @ is ignored.

    If both exist, tokenizer.json wins, because only it has tokens that were added later. If sizes
    are equal, tokenizer.model wins: the json is then a conversion, inexact on runs of whitespace.
    But json wins if it puts no space after special tokens (Mistral v0.3); the model always does.
    Settings (bos, eos, add_bos_token, chat template) come from the files beside it.

    Raises TokenizerError for missing, empty, truncated or unsuitable files.
    """
    path = local_copy(split_step(path)[0])
    try:
        return _load(path)
    except TokenizerError as error:
        if str(path) in str(error):
            raise
        raise TokenizerError(f"{path}: {error}") from error
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the Rust library's panics do not subclass Exception
        raise TokenizerError(
            f"{path} holds no usable tokenizer ({one_line(error)}): download or export it again"
        ) from error


def _load(path: Path) -> Tokenizer:
    if path.suffix == ".gguf":
        return _load_gguf(path)
    if not path.is_dir():
        return _load_json(path) if path.suffix == ".json" else _load_model(path)
    json_file, model_file = path / "tokenizer.json", path / "tokenizer.model"
    if not json_file.exists() and not model_file.exists():
        raise TokenizerError(
            f"{path} has neither tokenizer.json nor tokenizer.model: name a directory that has "
            "one, a tokenizer file or a .gguf"
        )
    if not json_file.exists():
        return _load_model(model_file)
    from_json = _load_json(json_file)
    if model_file.exists() and not from_json.spaces_first_only:
        with suppress(TokenizerError):  # Llama 3's, or lacks added tokens that the settings name
            from_model = _load_model(model_file)
            return from_model if from_model.vocab_size == from_json.vocab_size else from_json
    return from_json


def _load_json(file: Path) -> HuggingFaceTokenizer:
    if "model" not in read_json(file, TokenizerError):
        raise TokenizerError(f"{file} is not a tokenizer (no key 'model'): use another file")
    backend = tokenizers.Tokenizer.from_file(str(file))
    return HuggingFaceTokenizer(backend, **_settings(file, backend.token_to_id))


def _load_model(file: Path) -> SentencePieceTokenizer:
    content = file.read_bytes()
    if not content:
        raise TokenizerError(f"{file} is empty: download or export it again")
    try:
        tokenizer = SentencePieceTokenizer(content)
    except TokenizerError as error:
        raise TokenizerError(
            f"{file} is {error}: download it again, or for Llama 3 use tokenizer.json"
        ) from error
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


def _settings(file: Path, id_of: Callable[[str], int | None]) -> dict[str, Any]:
    """Settings of HuggingFaceTokenizer from the small files beside a tokenizer."""
    names = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
    config, special, generation = (_beside(file, name) for name in names)

    def spelled(name: str) -> str | None:
        token = config.get(name) or special.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        return token if isinstance(token, str) else None

    def ids(*tokens: str | int | None) -> tuple[int, ...]:
        """Ids without duplicates."""
        known = [id_of(token) if isinstance(token, str) else token for token in tokens]
        for token, token_id in zip(tokens, known, strict=True):
            if token is not None and not isinstance(token_id, int):
                raise TokenizerError(f"its tokenizer_config.json names {token!r}, which it lacks")
        return tuple(dict.fromkeys(i for i in known if i is not None))

    ends = generation.get("eos_token_id")
    bos, add_bos = spelled("bos_token"), config.get("add_bos_token")
    bos_ids = ids(generation.get("bos_token_id") if bos is None else bos)
    jinja, template = file.parent / "chat_template.jinja", config.get("chat_template")
    if jinja.exists():
        template = jinja.read_text(encoding="utf-8")
    elif isinstance(template, list):  # several named templates
        template = {t["name"]: t["template"] for t in template}.get("default")
    return {
        "bos_id": next(iter(bos_ids), None),
        "eos_ids": ids(spelled("eos_token"), *(ends if isinstance(ends, list) else [ends])),
        "add_bos": add_bos if isinstance(add_bos, bool) else None,
        "chat_template": template if isinstance(template, str) else None,
    }


def _beside(file: Path, name: str) -> dict[str, Any]:
    other = file.parent / name
    return read_json(other, TokenizerError) if other.exists() else {}


def _load_gguf(file: Path) -> Tokenizer:
    """The tokenizer of a GGUF, from the keys tokenizer.* of its first part."""
    fields = {
        name.removeprefix("tokenizer.").removeprefix("ggml."): field.contents()
        for name, field in open_gguf(gguf_parts(file)[0], TokenizerError).fields.items()
        if name.startswith("tokenizer.")
    }
    kind, tokens = fields.get("model"), fields.get("tokens")
    if kind not in ("llama", "gpt2") or not tokens:
        raise TokenizerError(
            f"{file} has a tokenizer of kind {kind!r} with {len(tokens or ())} tokens; supported "
            "are gpt2 and llama: use a file with one of them"
        )
    types = fields.get("token_type", [NORMAL] * len(tokens))
    ends = [fields.get(f"{name}_token_id") for name in ("eos", "eot", "eom")]
    eos_ids = list(dict.fromkeys(i for i in ends if i is not None))
    bos_id = fields.get("bos_token_id")
    for i in (*eos_ids, bos_id):
        if i is not None and not 0 <= i < len(tokens):
            raise TokenizerError(f"{file} names token {i} of {len(tokens)}: download it again")
    # Older files lack the key; Llama 3's are recognised by a token.
    unnamed = "llama-bpe" if "<|begin_of_text|>" in tokens else "default"
    pre = fields.get("pre", unnamed)
    settings = {
        "eos_ids": eos_ids,
        "add_bos": bool(fields.get("add_bos_token", kind == "llama" or pre in _ADD_BOS)),
        "chat_template": fields.get("chat_template"),
    }
    if kind == "llama":
        model = _sentencepiece_model(tokens, fields, types, bos_id, eos_ids)
        return SentencePieceTokenizer(model, **settings)
    if pre not in _WORDS:
        raise TokenizerError(f"{file}: pre-tokenizer {pre!r} is not one of {', '.join(_WORDS)}")
    merges = [tuple(merge.split(" ", 1)) for merge in fields["merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = byte_level_bpe(vocab, merges, _WORDS[pre], whole_words=pre in _WHOLE_WORDS)
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    typed = list(zip(tokens, types, strict=True))
    backend.add_special_tokens([added_token(t) for t, kind in typed if kind in (UNKNOWN, CONTROL)])
    backend.add_tokens([added_token(t, special=False) for t, kind in typed if kind == USER_DEFINED])
    return HuggingFaceTokenizer(backend, bos_id=bos_id, **settings)


def _sentencepiece_model(
    tokens: list[str], fields: dict[str, Any], types: list[int], bos_id: int | None, eos_ids: list
) -> bytes:
    """A serialized SentencePiece BPE model of the same tokens."""
    # Imported here: it clashes with transformers' copy of another version.
    from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

    model = ModelProto()
    for token, score, kind in zip(tokens, fields["scores"], types, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.vocab_size = TrainerSpec.BPE, len(tokens)
    trainer.byte_fallback = any(BYTE_PIECE.fullmatch(token) for token in tokens)
    unk_id, eos_id = fields.get("unknown_token_id", 0), next(iter(eos_ids), None)
    for name, token_id in {"unk": unk_id, "bos": bos_id, "eos": eos_id, "pad": None}.items():
        setattr(trainer, f"{name}_id", -1 if token_id is None else token_id)
        if token_id is not None:  # the library looks the token up by name
            setattr(trainer, f"{name}_piece", tokens[token_id])
    normalizer.name, normalizer.escape_whitespaces = "identity", True
    normalizer.add_dummy_prefix = bool(fields.get("add_space_prefix", True))
    normalizer.remove_extra_whitespaces = False
    return model.SerializeToString()
