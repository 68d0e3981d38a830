"""Vocabularies trained here: the same each time, exact on any text, and only where they can be."""

import json

import pytest

from lsjax.config import ConfigError, DataConfig
from lsjax.data.pieces import Document
from lsjax.data.tokenizer import TokenizerError
from lsjax.data.tokenizer_backends import ByteTokenizer
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.data.vocabulary import make_tokenizer, train_tokenizer

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog\tand",
    "tabs",
    "2024",
    "{",
]
DOCUMENTS = [
    Document(" ".join(WORDS[(n * k) % len(WORDS)] for k in range(1, 40)) + f"\n        line {n}")
    for n in range(60)
]


def saved(tokenizer, folder):
    tokenizer.save(folder)
    return (folder / "tokenizer.model").read_bytes()


def test_training_twice_gives_the_same_bytes_in_any_order(tmp_path):
    one = train_tokenizer(DOCUMENTS, 320)
    two = train_tokenizer(DOCUMENTS[::-1], 320)
    assert saved(one, tmp_path / "a") == saved(two, tmp_path / "b")
    assert one.vocab_size == 320 and (one.bos_id, one.eos_ids) == (1, (2,)) and one.add_bos


def test_any_text_comes_back_and_digits_stand_alone(texts):
    tokenizer = train_tokenizer(DOCUMENTS, 320)
    for text in [*texts, "  \n\n  x", "\r\n"]:
        assert tokenizer.decode(tokenizer.encode(text, allow_special=False)) == text
    digits = [tokenizer.token_bytes(i).strip() for i in tokenizer.encode("in 2024", add_bos=False)]
    assert digits[-4:] == [b"2", b"0", b"2", b"4"]


def test_a_run_directory_reads_it_back(tmp_path):
    tokenizer = train_tokenizer(DOCUMENTS, 320)
    tokenizer.save(tmp_path / "run")
    again = load_tokenizer(tmp_path / "run")
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.bos_id, again.eos_ids, again.add_bos) == (1, (2,), True)


def test_a_sample_is_of_bounded_size_and_does_not_depend_on_the_order(tmp_path, monkeypatch):
    whole = train_tokenizer(DOCUMENTS, 300)
    some = sum(len(document.text) for document in DOCUMENTS) // 2
    monkeypatch.setattr("lsjax.data.vocabulary.SAMPLE", some)
    one = train_tokenizer(DOCUMENTS, 300)
    two = train_tokenizer(DOCUMENTS[::-1], 300)
    assert saved(one, tmp_path / "a") == saved(two, tmp_path / "b")
    assert saved(one, tmp_path / "a") != saved(whole, tmp_path / "c")


@pytest.mark.parametrize(
    ("documents", "size", "message"),
    [
        ([Document("ab ab")], 512, r"vocabulary of 512 on 5 characters .* to a value <= 26\d"),
        (DOCUMENTS, 262, r"vocabulary of 262 on .*required_chars. 262 vs 2\d\d"),
        ([], 300, "there are no documents to train a vocabulary on"),
        ([Document("\n")], 300, "SentencePiece cannot train a vocabulary of 300 on 1 characters"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_said_in_one_line(documents, size, message):
    with pytest.raises(ConfigError, match=message) as error:
        train_tokenizer(documents, size)
    assert "\n" not in str(error.value)


def test_the_tokenizer_of_a_config(tmp_path, bpe_directory, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": d.text}) + "\n" for d in DOCUMENTS))

    def tokenizer(name, **rest):
        config = DataConfig(source="jsonl", paths=(str(rows),), tokenizer=name, **rest)
        return make_tokenizer(config, cache=tmp_path / "cache")

    assert tokenizer("bytes").fingerprint == ByteTokenizer().fingerprint
    given = load_tokenizer(bpe_directory)
    assert tokenizer(str(bpe_directory)).fingerprint == given.fingerprint
    with pytest.raises(TokenizerError, match="none"):
        tokenizer(str(tmp_path / "none"))
    # Documents that are held out, or beyond max_documents, have no say in the vocabulary.
    trained = tokenizer("sentencepiece", vocab_size=310, validation_fraction=0.3)
    training = [d for d in DOCUMENTS if d.key >= 0.3 * 2**64]
    by_hand = train_tokenizer(training, 310)
    assert trained.fingerprint == by_hand.fingerprint and len(training) < len(DOCUMENTS)
    few = tokenizer("sentencepiece", vocab_size=300, validation_fraction=0.0, max_documents=20)
    by_hand = train_tokenizer(DOCUMENTS[:20], 300)
    assert few.fingerprint == by_hand.fingerprint
    monkeypatch.delattr("lsjax.data.vocabulary.train_tokenizer")  # the cache has the vocabulary
    again = tokenizer("sentencepiece", vocab_size=310, validation_fraction=0.3)
    assert again.fingerprint == trained.fingerprint
