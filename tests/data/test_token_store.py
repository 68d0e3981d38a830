"""Tokens on disk: what they are, and when they are made again."""

import json

import numpy as np
import pytest
import sentencepiece

from lsjax.config import ConfigError, DataConfig
from lsjax.data import token_store as module
from lsjax.data.sources import Document
from lsjax.data.token_store import encode_document, token_store
from lsjax.data.tokenizer_backends import ByteTokenizer
from lsjax.data.tokenizer_files import load_tokenizer

PAIRS = dict(prompt_template="Q: {q}\nA:", response_template=" {a}")
ROWS = [{"q": f"{n}?", "a": "é" * (n % 4 + 1)} for n in range(12)]


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)))
    return file


def config(file, **rest):
    return DataConfig(source="jsonl", paths=(str(file),), **(PAIRS | rest))


def made(monkeypatch, config, tokenizer, cache):
    """The store, and how many documents were encoded for it."""
    count = []

    def counting(*arguments):
        count.append(0)
        return encode_document(*arguments)

    monkeypatch.setattr(module, "encode_document", counting)
    return token_store(config, tokenizer, cache=cache), len(count)


def test_documents_lie_one_after_the_other_with_their_prompts(rows, tmp_path):
    store = token_store(config(rows), ByteTokenizer(), cache=tmp_path)
    assert store.tokens.dtype == np.uint16 and len(store.keys_N) == len(ROWS)
    for n, row in enumerate(ROWS):
        tokens = store.tokens[store.starts_N1[n] : store.starts_N1[n + 1]].tolist()
        prompt = [256, *f"Q: {row['q']}\nA:".encode()]
        assert tokens == [*prompt, *f" {row['a']}".encode(), 257]
        assert store.prompts_N[n] == len(prompt)
        assert store.keys_N[n] == Document("", f"Q: {row['q']}\nA:").key
    assert store.lengths_N.sum() == len(store.tokens) == store.starts_N1[-1]


def test_prompts_are_encoded_as_in_decoding_and_the_text_is_whole(any_tokenizer, texts):
    settings = config("unread.jsonl", append_end=False)
    for prompt in ("Question:", "Question:\n", "été "):
        for text in (text for text in texts if text):
            ids, length = encode_document(Document(text, prompt), settings, any_tokenizer)
            assert ids[:length] == any_tokenizer.encode(prompt)
            assert any_tokenizer.decode(ids) == prompt + text


def test_a_response_has_no_space_of_its_own_whatever_the_normalizer_drops(tmp_path, texts):
    """SentencePiece's default rule drops control characters, and with them the first mark."""
    (tmp_path / "corpus.txt").write_text("\n".join(texts), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "m"), model_type="bpe",
        vocab_size=420, byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = load_tokenizer(tmp_path / "m.model")
    assert tokenizer.encode("\x01", add_bos=False) == []
    ids, length = encode_document(Document("[IN x]", "say:\n"), config("unread.jsonl"), tokenizer)
    assert tokenizer.token_bytes(ids[length])[:1] == b"["


def test_a_large_vocabulary_takes_four_bytes(rows, tmp_path, any_tokenizer):
    small = token_store(config(rows), any_tokenizer, cache=tmp_path)
    any_tokenizer.vocab_size = (1 << 16) + 1
    large = token_store(config(rows), any_tokenizer, cache=tmp_path / "other")
    assert (small.tokens.dtype, large.tokens.dtype) == (np.uint16, np.uint32)
    assert small.tokens.tolist() == large.tokens.tolist()


def test_ends_and_special_tokens_are_as_the_config_says(bpe_directory):
    tokenizer = load_tokenizer(bpe_directory)
    text = Document("a <|end|>")
    plain = DataConfig(source="jsonl", paths=("x",))
    ids, _ = encode_document(text, plain, tokenizer)
    assert ids[-1] == tokenizer.eos_ids[0] and 2 not in ids[:-1]
    open_ended = DataConfig(source="jsonl", paths=("x",), append_end=False, allow_special=True)
    ids, _ = encode_document(text, open_ended, tokenizer)
    assert ids[-1] == 2, "<|end|> is a token of its own"


def test_tokens_are_made_once_for_all_that_does_not_change_them(rows, tmp_path, monkeypatch):
    tokenizer = ByteTokenizer()
    store, number = made(monkeypatch, config(rows), tokenizer, tmp_path)
    assert number == len(ROWS)
    same = [{}, {"train_on_prompt": True}, {"validation_fraction": 0.5}, {"packing": False}]
    for changes in same:
        again, number = made(monkeypatch, config(rows, **changes), tokenizer, tmp_path)
        assert number == 0 and again.fingerprint == store.fingerprint
        assert np.array_equal(again.tokens, store.tokens)
    other = [
        {"append_end": False},
        {"allow_special": True},
        {"response_template": " {a}."},
        {"max_documents": 5},
    ]
    for changes in other:
        settings = config(rows, **changes)
        assert made(monkeypatch, settings, tokenizer, tmp_path)[1] == changes.get(
            "max_documents", 12
        )
    assert made(monkeypatch, config(rows), ByteTokenizer(add_bos=False), tmp_path)[1] == len(ROWS)
    moved = rows.rename(tmp_path / "moved.jsonl")
    assert made(monkeypatch, config(moved), tokenizer, tmp_path)[1] == 0
    moved.write_text(moved.read_text().replace("11?", "12?"))
    changed, number = made(monkeypatch, config(moved), tokenizer, tmp_path)
    assert number == len(ROWS) and changed.fingerprint != store.fingerprint


def test_an_interrupted_store_is_made_again(rows, tmp_path, monkeypatch):
    real = ByteTokenizer()
    calls = iter(range(100))

    def dies(*arguments):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return encode_document(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "encode_document", dies)
        token_store(config(rows), real, cache=tmp_path / "cache")
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []
    assert len(token_store(config(rows), real, cache=tmp_path / "cache").keys_N) == len(ROWS)


def test_a_store_that_lost_a_file_is_made_again(rows, tmp_path):
    store = token_store(config(rows), ByteTokenizer(), cache=tmp_path)
    expected = store.tokens.tolist()
    (folder,) = (tmp_path / "tokens").iterdir()
    for name, damage in (("tokens", b""), ("documents", b""), ("documents", None)):
        file = next(folder.glob(f"{name}.*"))
        file.unlink() if damage is None else file.write_bytes(damage)
        again = token_store(config(rows), ByteTokenizer(), cache=tmp_path)
        assert again.fingerprint == store.fingerprint
        assert again.tokens.tolist() == expected


def test_a_store_that_another_process_finishes_meanwhile_stays(rows, tmp_path, monkeypatch):
    load, first = module._load, iter([True])

    def finished_just_after(directory, dtype):
        if next(first, False):
            other = token_store(config(rows), ByteTokenizer(), cache=tmp_path)
            (directory / "mark").touch()
            assert other is not None
            return None
        return load(directory, dtype)

    monkeypatch.setattr(module, "_load", finished_just_after)
    store = token_store(config(rows), ByteTokenizer(), cache=tmp_path)
    (folder,) = (tmp_path / "tokens").iterdir()
    assert (folder / "mark").exists() and len(store.keys_N) == len(ROWS)


def test_nothing_to_learn_from_is_one_clear_line(tmp_path):
    file = tmp_path / "empty.txt"
    file.write_text("\n \n")
    empty = DataConfig(source="text", paths=(str(file),))
    with pytest.raises(ConfigError, match="empty.txt holds no text: every document is empty"):
        token_store(empty, ByteTokenizer(), cache=tmp_path)
    endless = ByteTokenizer()
    endless.eos_ids = ()
    with pytest.raises(ConfigError, match="has no end token .*: set append_end to False"):
        token_store(empty, endless, cache=tmp_path)


def test_an_end_token_without_a_row_is_refused(rows, tmp_path):
    """It is not part of the text, which `encode` checks."""
    tokenizer = ByteTokenizer()
    fitted = tokenizer.fitted(tokenizer.eos_ids[0])
    with pytest.raises(ConfigError, match=r"no end token among the 257 rows of the model's table"):
        token_store(config(rows), fitted, cache=tmp_path)
    assert len(token_store(config(rows, append_end=False), fitted, cache=tmp_path).keys_N) > 0
