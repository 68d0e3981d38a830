"""What every tokenizer promises, whatever its kind."""

import pytest
import tokenizers
from tokenizers import pre_tokenizers

from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.data.tokenizer_huggingface import ByteTokenizer, HuggingFaceTokenizer
from lsjax.data.tokenizers import TokenizerError


def test_save_and_load(any_tokenizer, texts, tmp_path):
    any_tokenizer.chat_template = "{{ messages }}é"
    any_tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    for text in texts:
        for options in {}, {"allow_special": False, "add_bos": False}:
            assert again.encode(text, **options) == any_tokenizer.encode(text, **options)
    for name in ("vocab_size", "bos_id", "eos_ids", "add_bos", "chat_template", "fingerprint"):
        assert getattr(again, name) == getattr(any_tokenizer, name), name


def test_ids_without_a_token_add_nothing(any_tokenizer):
    assert any_tokenizer.decode([any_tokenizer.vocab_size, 10**9, -1]) == ""


def test_text_that_is_no_unicode(any_tokenizer):
    with pytest.raises(TokenizerError, match="surrogate"):
        any_tokenizer.encode("a\ud800")


def test_fingerprints(sentencepiece_model, bpe_directory, tiktoken_file):
    files = (sentencepiece_model, bpe_directory, tiktoken_file)
    prints = [t.fingerprint for t in (*map(load_tokenizer, files), ByteTokenizer())]
    assert len(set(prints)) == len(prints) and all(len(p) == 64 for p in prints)
    # one and the same vocabulary, but another rule for digits
    backend = tokenizers.Tokenizer.from_file(str(bpe_directory / "tokenizer.json"))
    assert HuggingFaceTokenizer(backend).fingerprint == prints[1]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    assert HuggingFaceTokenizer(backend).fingerprint != prints[1]
