"""What every tokenizer promises, whatever its kind."""

import pytest
import tokenizers
from tokenizers import pre_tokenizers

from lsjax.data.tokenizer import MOST_EXTRA, TokenizerError
from lsjax.data.tokenizer_backends import ByteTokenizer, HuggingFaceTokenizer
from lsjax.data.tokenizer_files import load_tokenizer


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


def test_tokens_without_a_row_are_refused_in_a_text(any_tokenizer, texts):
    """For a table with one row less, and with more."""
    size, ids = any_tokenizer.vocab_size, {i for t in texts for i in any_tokenizer.encode(t)}
    last = max(ids)
    smaller = any_tokenizer.fitted(last) if last >= size - MOST_EXTRA else None
    for text in texts:
        found = any_tokenizer.encode(text)
        assert any_tokenizer.fitted(size + 9).encode(text) == found
        if smaller is not None and last in found:
            with pytest.raises(TokenizerError, match=rf"\(token {last}\).* only {last} tokens"):
                smaller.encode(text)
        elif smaller is not None:
            assert smaller.encode(text) == found
    assert any_tokenizer.fitted(size - 1).fingerprint == any_tokenizer.fingerprint
    with pytest.raises(TokenizerError, match=f"has {size} tokens, but the model's table has 9"):
        any_tokenizer.fitted(9)


def test_an_added_token_without_a_row(bpe_directory, tmp_path):
    """As a special token, and as the start of a text."""
    backend = tokenizers.Tokenizer.from_file(str(bpe_directory / "tokenizer.json"))
    rows = backend.get_vocab_size()
    backend.add_special_tokens(["<pad>"])
    tokenizer = HuggingFaceTokenizer(backend).fitted(rows)
    assert tokenizer.vocab_size == rows
    assert tokenizer.encode("a<pad>", allow_special=False) and tokenizer.encode("a pad")
    with pytest.raises(TokenizerError, match=rf"contains '<pad>' \(token {rows}\)"):
        tokenizer.encode("a<pad>")
    tokenizer.bos_id = rows
    with pytest.raises(TokenizerError, match="contains '<pad>'"):
        tokenizer.encode("a", add_bos=True)


def test_fingerprints(sentencepiece_model, bpe_directory, llama3_directory):
    files = (sentencepiece_model, bpe_directory, llama3_directory)
    prints = [t.fingerprint for t in (*map(load_tokenizer, files), ByteTokenizer())]
    assert len(set(prints)) == len(prints) and all(len(p) == 64 for p in prints)
    # one and the same vocabulary, but another rule for digits
    backend = tokenizers.Tokenizer.from_file(str(bpe_directory / "tokenizer.json"))
    assert HuggingFaceTokenizer(backend).fingerprint == prints[1]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    assert HuggingFaceTokenizer(backend).fingerprint != prints[1]
