"""Loading a tokenizer from tokenizer.json, tokenizer.model (SentencePiece) or GGUF."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from lsjax.config import AnyPath, split_step
from lsjax.data.tokenizer import Tokenizer, TokenizerError
from lsjax.data.tokenizer_backends import BYTE_PIECE, HuggingFaceTokenizer, SentencePieceTokenizer
from lsjax.io.files import local_copy, one_line, read_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # token types of GGUF and of SentencePiece
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def matched_words(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Splits a text into the matches of `pattern`, spelled as bytes."""
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, byte_level])


_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
_LLAMA3 = matched_words(LLAMA3_SPLIT)
# Words of each tokenizer.ggml.pre, as in the tokenizer.json of its models.
_WORDS = {
    "default": _BYTE_LEVEL,
    "gpt-2": _BYTE_LEVEL,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), _BYTE_LEVEL]),  # 1 and 2
    "llama-bpe": _LLAMA3,
    "smaug-bpe": _LLAMA3,  # SmolLM3, and Llama 3 without a begin token
    "dbrx": _LLAMA3,  # OLMo 2 and 3
    "qwen2": matched_words(LLAMA3_SPLIT.replace("{1,3}", "")),  # each digit is a word
    "tekken": matched_words(_TEKKEN_SPLIT),  # Mistral
}
_WHOLE_WORDS = ("llama-bpe", "smaug-bpe", "tekken")  # a word that is a token skips the merges
_ADD_BOS = ("llama-bpe", "tekken")  # if the file does not say


def load_tokenizer(path: str | AnyPath) -> Tokenizer:
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
            f"{path} holds no usable tokenizer ({one_line(error)}): download or export it again "
            "(Llama 3 needs tokenizer.json)"
        ) from error


def _load(path: AnyPath) -> Tokenizer:
    if not path.is_dir():
        return {".gguf": _load_gguf, ".json": _load_json}.get(path.suffix, _load_model)(path)
    json_file, model_file = path / "tokenizer.json", path / "tokenizer.model"
    if not json_file.exists() and not model_file.exists():
        raise TokenizerError(f"{path} has neither tokenizer.json nor tokenizer.model: add one")
    if not json_file.exists():
        return _load_model(model_file)
    from_json = _load_json(json_file)
    if model_file.exists() and not from_json.spaces_first_only:
        # RuntimeError: Llama 3's. TokenizerError: it lacks added tokens that the settings name.
        with suppress(RuntimeError, TokenizerError):
            from_model = _load_model(model_file)
            return from_model if from_model.vocab_size == from_json.vocab_size else from_json
    return from_json


def _load_json(file: AnyPath) -> HuggingFaceTokenizer:
    tokenizer = HuggingFaceTokenizer(tokenizers.Tokenizer.from_file(str(file)))
    _apply_settings(tokenizer, file)
    return tokenizer


def _load_model(file: AnyPath) -> SentencePieceTokenizer:
    tokenizer = SentencePieceTokenizer(file.read_bytes())
    added = _apply_settings(tokenizer, file).get("added_tokens_decoder") or ()
    if (largest := max(map(int, added), default=-1)) >= tokenizer.vocab_size:
        raise TokenizerError(f"it lacks token {largest} of its settings: add tokenizer.json")
    return tokenizer


def _apply_settings(tokenizer: Tokenizer, file: AnyPath) -> dict[str, Any]:
    """Sets bos, eos, add_bos and template by the files beside; returns tokenizer_config.json."""
    names = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
    files = [file.with_name(name) for name in names]
    found = (read_json(one, TokenizerError) if one.exists() else {} for one in files)
    config, special, generation = found

    def ids(name: str) -> tuple[int, ...]:
        """Ids of bos or eos: the one that is spelled, then those of generation_config.json."""
        token, found = config.get(name) or special.get(name), _token_ids(generation, name, files[2])
        spelled = token.get("content") if isinstance(token, dict) else token
        if spelled:
            first = tokenizer.token_id(spelled)
            if first is None:
                raise TokenizerError(f"its settings name {spelled!r}, which it lacks: add it")
            found = [first, *found]
        return tuple(dict.fromkeys(found))

    bos_ids, add_bos = ids("bos_token"), config.get("add_bos_token")
    if tokenizer.bos_id is None:
        tokenizer.bos_id = next(iter(bos_ids), None)
    if add_bos is None:
        add_bos = not isinstance(tokenizer, HuggingFaceTokenizer) or tokenizer.adds_bos
    tokenizer.add_bos = bool(add_bos) and tokenizer.bos_id is not None
    tokenizer.eos_ids = ids("eos_token") or tokenizer.eos_ids
    jinja, template = file.with_name("chat_template.jinja"), config.get("chat_template")
    if jinja.exists():
        template = jinja.read_text(encoding="utf-8")
    elif isinstance(template, list):  # several named templates
        template = {t["name"]: t["template"] for t in template}.get("default")
    tokenizer.chat_template = template if isinstance(template, str) else None
    return config


def _token_ids(generation: dict[str, Any], name: str, file: AnyPath) -> list[int]:
    """Ids of bos_token or eos_token in generation_config.json: none, one or a list."""
    given = generation.get(f"{name}_id")
    found = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(i) is int for i in found):
        raise TokenizerError(
            f"{file}: {name}_id {given!r} must be the number of a token, or a list of them: "
            "correct it"
        )
    return found


def _load_gguf(file: AnyPath) -> Tokenizer:
    """The tokenizer of a GGUF, from the keys tokenizer.* of its first part."""
    fields = {
        name.removeprefix("tokenizer.").removeprefix("ggml."): field.contents()
        for name, field in open_gguf(gguf_parts(file)[0], TokenizerError).fields.items()
        if name.startswith("tokenizer.")
    }
    kind, tokens = fields.get("model"), fields.get("tokens")
    if kind not in ("llama", "gpt2") or not tokens:
        raise TokenizerError(f"its tokenizer, {kind!r}, is not a gpt2 or llama: use another file")
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
    if kind == "llama":
        tokenizer = SentencePieceTokenizer(_sentencepiece_model(fields, types, bos_id, eos_ids))
    else:
        tokenizer = HuggingFaceTokenizer(_byte_level_bpe(fields, types, pre))
    add_bos = fields.get("add_bos_token", kind == "llama" or pre in _ADD_BOS)
    tokenizer.bos_id, tokenizer.add_bos = bos_id, bool(add_bos) and bos_id is not None
    tokenizer.eos_ids, tokenizer.chat_template = tuple(eos_ids), fields.get("chat_template")
    return tokenizer


def _byte_level_bpe(fields: dict[str, Any], types: list[int], pre: str) -> tokenizers.Tokenizer:
    if pre not in _WORDS:
        raise TokenizerError(f"its pre-tokenizer {pre!r} is not one of {', '.join(_WORDS)}")
    tokens = fields["tokens"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in fields["merges"]]
    model = models.BPE(vocab, merges, ignore_merges=pre in _WHOLE_WORDS)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = _WORDS[pre], decoders.ByteLevel()
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    typed = list(zip(tokens, types, strict=True))
    backend.add_special_tokens([token for token, kind in typed if kind in (UNKNOWN, CONTROL)])
    own = [token for token, kind in typed if kind == USER_DEFINED]
    backend.add_tokens([AddedToken(token, normalized=False) for token in own])
    return backend


def _sentencepiece_model(
    fields: dict[str, Any], types: list[int], bos_id: int | None, eos_ids: list[int]
) -> bytes:
    """A serialized SentencePiece BPE model of the same tokens."""
    # Imported here: it clashes with transformers' copy of another version.
    from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

    model, tokens = ModelProto(), fields["tokens"]
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


def gguf_parts(file: AnyPath) -> list[AnyPath]:
    """All files of a split GGUF, named NAME-00001-of-00003.gguf; the file itself if not split."""
    part = re.fullmatch(r"(.+-)\d{5}(-of-(?!0{5})(\d{5})\.gguf)", file.name)
    if part is None:
        return [file]
    name, of, count = part.groups()
    return [file.with_name(f"{name}{number:05d}{of}") for number in range(1, int(count) + 1)]


def open_gguf(file: AnyPath, error_type: type[ValueError]) -> Any:
    """The gguf package's reader for a file.

    Raises `error_type` without the package, or unless the file is a complete little-endian GGUF of
    version 2 or 3.
    """
    try:
        import gguf
    except ImportError as error:
        raise error_type(
            f"{file}: reading GGUF files needs the gguf package: pip install 'lsjax[gguf]'"
        ) from error

    class Reader(gguf.GGUFReader):
        """Raises at slices past the file's end: gguf shortens them, and loops on huge counts."""

        def _get(self, offset, dtype, count=1, override_order=None):
            values = super()._get(offset, dtype, count, override_order)
            if len(values) != count:
                raise ValueError(f"{count} values at {offset} exceed its {len(self.data)} bytes")
            return values

    try:
        reader = Reader(file)
    except OSError:
        raise
    except Exception as error:
        raise error_type(
            f"{file}: not a complete GGUF file ({type(error).__name__}: {one_line(error)}): "
            "damaged or cut off, download it again"
        ) from error
    if reader.byte_order == "S":
        raise error_type(f"{file}: is a big-endian GGUF: use a little-endian one")
    return reader
