"""The tokenizer that a GGUF carries (keys tokenizer.ggml.*), through the `gguf` package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

from lsjax.data.tokenizer import Tokenizer, TokenizerError
from lsjax.data.tokenizer_huggingface import (
    BYTE_PIECE,
    HuggingFaceTokenizer,
    added_token,
    byte_level_bpe,
    llama3_words,
)
from lsjax.data.tokenizer_sentencepiece import SentencePieceTokenizer

LLAMA3_BEGIN = "<|begin_of_text|>"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # token types of GGUF and of SentencePiece


def load_gguf(file: Path) -> Tokenizer:
    """The tokenizer that `file` carries. Raises TokenizerError, or what gguf does on garbage."""
    fields = _tokenizer_fields(file)
    kind, tokens = fields.get("ggml.model"), fields.get("ggml.tokens")
    if not kind or not tokens:
        raise TokenizerError(f"{file} carries no tokenizer: take one that does")
    if kind not in ("llama", "gpt2"):
        raise TokenizerError(f"{file} has a tokenizer of kind {kind!r}; known are gpt2 and llama")
    types = fields.get("ggml.token_type", [NORMAL] * len(tokens))
    ends = [fields.get(f"ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    eos_ids = list(dict.fromkeys(i for i in ends if i is not None))
    bos_id = fields.get("ggml.bos_token_id")
    for i in [*eos_ids, *([] if bos_id is None else [bos_id])]:
        if not 0 <= i < len(tokens):
            raise TokenizerError(f"{file} names token {i}, but has {len(tokens)}: a damaged file")
    chat_template = fields.get("chat_template")
    if kind == "llama":
        model = _sentencepiece_model(tokens, fields, types, bos_id, eos_ids)
        add_bos = fields.get("ggml.add_bos_token", True)
        return SentencePieceTokenizer(
            model, add_bos=add_bos, eos_ids=eos_ids, chat_template=chat_template
        )
    # Files from before the key was there: those of Llama 3 are told by its tokens.
    unnamed = "llama-bpe" if LLAMA3_BEGIN in tokens else "default"
    pre = fields.get("ggml.pre", unnamed)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = {
        "default": byte_level,
        "gpt-2": byte_level,
        "smollm": pre_tokenizers.Sequence([digits, byte_level]),
        "llama-bpe": llama3_words(),
    }
    if pre not in words:
        raise TokenizerError(f"{file} splits words by {pre!r}; known are {', '.join(words)}")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens) or len(types) != len(tokens):
        raise TokenizerError(f"{file} has tokens twice or without a type: a damaged file")
    merges = [tuple(merge.split(" ", 1)) for merge in fields["ggml.merges"]]
    backend = byte_level_bpe(vocab, merges, words[pre], whole_words=pre == "llama-bpe")
    typed = list(zip(tokens, types, strict=True))
    backend.add_special_tokens([added_token(t) for t, kind in typed if kind in (UNKNOWN, CONTROL)])
    backend.add_tokens([added_token(t, special=False) for t, kind in typed if kind == USER_DEFINED])
    add_bos = bool(fields.get("ggml.add_bos_token", pre == "llama-bpe"))
    return HuggingFaceTokenizer(
        backend, bos_id=bos_id, eos_ids=eos_ids, add_bos=add_bos, chat_template=chat_template
    )


def _tokenizer_fields(file: Path) -> dict[str, Any]:
    """Values of the keys tokenizer.*, named without that prefix."""
    if not file.is_file():
        raise TokenizerError(f"{file} does not exist: check the path")
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise TokenizerError(f"reading {file} needs gguf: pip install 'lsjax[gguf]'") from error

    class Reader(GGUFReader):
        def _get(self, offset: int, dtype: Any, count: Any = 1, *order: Any, **kwargs: Any) -> Any:
            # The library reads nothing behind the end: a false length would loop for years.
            values = super()._get(offset, dtype, count, *order, **kwargs)
            if len(values) < count:
                raise TokenizerError(f"{file} is truncated: download it again")
            return values

    prefix = "tokenizer."
    return {
        name.removeprefix(prefix): value.contents()
        for name, value in Reader(file).fields.items()
        if name.startswith(prefix)
    }


def _sentencepiece_model(
    tokens: list[str], fields: dict[str, Any], types: list[int], bos_id: int | None, eos_ids: list
) -> bytes:
    """A serialized SentencePiece model, a BPE, of the same tokens."""
    # Only here: a process can't import this and transformers' copy of another version.
    from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

    model = ModelProto()
    for token, score, kind in zip(tokens, fields["ggml.scores"], types, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.vocab_size = TrainerSpec.BPE, len(tokens)
    trainer.byte_fallback = any(BYTE_PIECE.fullmatch(token) for token in tokens)
    unk_id, eos_id = fields.get("ggml.unknown_token_id", 0), next(iter(eos_ids), None)
    for name, token_id in {"unk": unk_id, "bos": bos_id, "eos": eos_id, "pad": None}.items():
        setattr(trainer, f"{name}_id", -1 if token_id is None else token_id)
        if token_id is not None:  # the library looks it up by name
            setattr(trainer, f"{name}_piece", tokens[token_id])
    normalizer.name, normalizer.escape_whitespaces = "identity", True
    normalizer.add_dummy_prefix = bool(fields.get("ggml.add_space_prefix", True))
    normalizer.remove_extra_whitespaces = False
    return model.SerializeToString()
