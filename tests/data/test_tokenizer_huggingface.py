"""Pipelines: special tokens on demand, begin tokens, what other readers find; plain bytes."""

import json

import pytest
import tokenizers

from lsjax.data.tokenizer import TokenizerError
from lsjax.data.tokenizer_backends import ByteTokenizer, HuggingFaceTokenizer
from lsjax.data.tokenizer_files import load_tokenizer


def test_special_tokens_are_read_only_if_allowed(bpe_directory):
    tokenizer = load_tokenizer(bpe_directory)
    assert tokenizer.encode("a<|end|>", add_bos=False)[-1] == 2
    plain = tokenizer.encode("a<|end|>", add_bos=False, allow_special=False)
    assert 2 not in plain and tokenizer.decode(plain) == "a<|end|>"
    assert tokenizer.encode("a<|end|>", add_bos=False)[-1] == 2


def test_text_is_neither_truncated_nor_padded(bpe_directory, corpus):
    tokenizer = load_tokenizer(bpe_directory)
    ids = tokenizer.encode(corpus[0])
    assert ids[0] == 0 and tokenizer.decode(ids) == corpus[0]


def test_bos_that_does_not_exist(bpe_directory):
    backend = tokenizers.Tokenizer.from_file(str(bpe_directory / "tokenizer.json"))
    tokenizer = HuggingFaceTokenizer(backend)
    assert tokenizer.encode("a") == tokenizer.encode("a", add_bos=False)
    with pytest.raises(TokenizerError, match="add_bos=False"):
        tokenizer.encode("a", add_bos=True)


def test_save_writes_what_other_readers_need(llama3_directory, tmp_path):
    tokenizer = load_tokenizer(llama3_directory)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5}')
    tokenizer.save(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert backend.encode("the world").ids == tokenizer.encode("the world")  # bos included
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {"temperature": 0.5, "eos_token_id": list(tokenizer.eos_ids)}


def test_bytes():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("é<s>") == [256, 0xC3, 0xA9, 256]
    assert tokenizer.encode("é<s>", allow_special=False)[3:] == list(b"<s>")
    assert tokenizer.vocab_size == 258 and tokenizer.eos_ids == (257,)
