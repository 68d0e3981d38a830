"""Rows of tokens on disk: what they are, when they are made again, and by whom."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2

from lsjax.config import ConfigError, DataConfig
from lsjax.data import pieces as pieces_module, shards
from lsjax.data.packing import from_records, pack, record_type
from lsjax.data.pieces import Document
from lsjax.data.pipeline import packed_rows
from lsjax.data.shards import encode_documents
from lsjax.data.sources import document_source
from lsjax.data.token_rows import INDEX, Share
from lsjax.data.tokenizer_backends import ByteTokenizer
from lsjax.data.tokenizer_files import load_tokenizer

PAIRS = dict(prompt_template="Q: {q}\nA:", response_template=" {a}")
ROWS = [{"q": f"{n}?", "a": "é" * (n % 4 + 1)} for n in range(12)]


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)))
    return file


@pytest.fixture
def many(tmp_path, monkeypatch):
    """A file that is divided into pieces of about 300 bytes."""
    monkeypatch.setattr(pieces_module, "SMALLEST_PIECE", 300)
    monkeypatch.setattr(pieces_module, "MANY_PIECES", 1 << 40)
    file = tmp_path / "many.jsonl"
    texts = [{"text": f"{n} " + "word " * (n % 11)} for n in range(90)]
    file.write_text("\n".join(map(json.dumps, texts)))
    return DataConfig(source="jsonl", paths=(str(file),), validation_fraction=0.2)


class OtherIds(ByteTokenizer):
    """As many tokens as the other one, with the ids of bytes in reverse order."""

    def _encode_batch(self, texts, allow_special):
        encoded = super()._encode_batch(texts, allow_special)
        return [[255 - token if token < 256 else token for token in ids] for ids in encoded]


def config(file, **rest):
    return DataConfig(source="jsonl", paths=(str(file),), **(PAIRS | rest))


def encode_document(document, config, tokenizer):
    ((ids, count),) = encode_documents([document], config, tokenizer)
    return ids.tolist(), count


def make(config, cache, tokenizer=None, split="train", seq_len=32, **rest):
    options = dict(split=split, seq_len=seq_len, cache=cache) | rest
    return packed_rows(config, tokenizer or ByteTokenizer(), **options)


def counted(monkeypatch, config, tokenizer, cache):
    """The training rows, and how many documents were encoded for them."""
    count = []

    def counting(documents, *rest):
        count.extend(documents)
        return encode_documents(documents, *rest)

    monkeypatch.setattr(shards, "encode_documents", counting)
    return make(config, cache, tokenizer), len(count)


def everything(rows):
    return np.stack([*rows.read(np.arange(len(rows))).values()])


def test_rows_are_the_packed_documents_of_their_piece(many, tmp_path):
    source, tokenizer = document_source(many), ByteTokenizer()
    place = {"train": 0, "validation": 0}
    found = {split: make(many, tmp_path, split=split) for split in place}
    assert len(source.pieces()) > 8
    for piece in source.pieces():
        documents = list(source.in_piece(piece))
        encoded = encode_documents(documents, many, tokenizer)
        tokens = np.concatenate([np.array(ids, np.uint16) for ids, _ in encoded])
        starts_N1 = np.cumsum([0, *(len(ids) for ids, _ in encoded)])
        prompts_N = np.zeros(len(encoded), np.int32)
        keys_N = np.array([document.key for document in documents], np.uint64)
        held_N = keys_N < int(0.2 * 2**64)
        for split, chosen_N in (("train", ~held_N), ("validation", held_N)):
            chosen_M = sorted(np.flatnonzero(chosen_N), key=keys_N.__getitem__)
            chosen_M = np.array(chosen_M, np.int64)
            records, _ = pack(tokens, starts_N1, prompts_N, chosen_M, 32, many)
            records = np.frombuffer(records, record_type(32, np.dtype(np.uint16)))
            batch = found[split].read(place[split] + np.arange(len(records)))
            packed = from_records(records)
            for name, array in packed.items():
                np.testing.assert_array_equal(batch[name], array)
            place[split] += len(records)
    assert {split: len(rows) for split, rows in found.items()} == place
    assert found["train"].num_documents + found["validation"].num_documents == 90


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
    small = make(config(rows), tmp_path, any_tokenizer)
    any_tokenizer.vocab_size = (1 << 16) + 1
    large = make(config(rows), tmp_path / "other", any_tokenizer)
    assert (small.dtype, large.dtype) == (np.uint16, np.uint32)
    np.testing.assert_array_equal(everything(small), everything(large))


def test_ends_and_special_tokens_are_as_the_config_says(bpe_directory):
    tokenizer = load_tokenizer(bpe_directory)
    text = Document("a <|end|>")
    plain = DataConfig(source="jsonl", paths=("x",))
    ids, _ = encode_document(text, plain, tokenizer)
    assert ids[-1] == tokenizer.eos_ids[0] and 2 not in ids[:-1]
    open_ended = DataConfig(source="jsonl", paths=("x",), append_end=False, allow_special=True)
    ids, _ = encode_document(text, open_ended, tokenizer)
    assert ids[-1] == 2, "<|end|> is a token of its own"


def test_a_long_text_is_encoded_in_parts(monkeypatch, any_tokenizer):
    """The parts are lines; no token is lost or added between them."""
    text = "".join(f"line {n} of a text\n" for n in range(40))
    plain = DataConfig(source="jsonl", paths=("x",), append_end=False)
    whole, _ = encode_document(Document(text), plain, any_tokenizer)
    monkeypatch.setattr(shards, "BATCH", 100)
    ids, _ = encode_document(Document(text), plain, any_tokenizer)
    assert any_tokenizer.decode(ids) == any_tokenizer.decode(whole) == text
    ended = DataConfig(source="jsonl", paths=("x",))
    ids, _ = encode_document(Document("x" * 950), ended, ByteTokenizer(add_bos=False))
    assert ids == [120] * 950 + [257]


def test_batches_are_small_and_a_long_document_is_alone(tmp_path, monkeypatch):
    file = tmp_path / "texts.jsonl"
    texts = [{"text": "x" * length} for length in (40, 50, 30, 150, 1, 99, 1)]
    file.write_text("\n".join(map(json.dumps, texts)))
    plain = DataConfig(source="jsonl", paths=(str(file),))
    expected = everything(make(plain, tmp_path / "one"))
    batches, real = [], encode_documents

    def noting(documents, *rest):
        batches.append([len(document.text) for document in documents])
        return real(documents, *rest)

    monkeypatch.setattr(shards, "encode_documents", noting)
    monkeypatch.setattr(shards, "BATCH", 100)
    found = everything(make(plain, tmp_path / "several"))
    assert batches == [[40, 50], [30], [150], [1, 99], [1]]
    np.testing.assert_array_equal(found, expected)


def test_rows_are_made_once_for_all_that_does_not_change_them(rows, tmp_path, monkeypatch):
    tokenizer = ByteTokenizer()
    found, number = counted(monkeypatch, config(rows), tokenizer, tmp_path)
    assert number == len(ROWS)
    again, number = counted(monkeypatch, config(rows), tokenizer, tmp_path)
    assert number == 0 and again.fingerprint == found.fingerprint
    np.testing.assert_array_equal(everything(again), everything(found))
    other = [
        {"append_end": False},
        {"allow_special": True},
        {"train_on_prompt": True},
        {"response_template": " {a}."},
        {"max_documents": 5},
    ]
    prints = {found.fingerprint}
    for changes in other:
        settings = config(rows, **changes)
        changed, number = counted(monkeypatch, settings, tokenizer, tmp_path)
        assert number == changes.get("max_documents", 12)
        prints.add(changed.fingerprint)
    assert len(prints) == 1 + len(other)
    for other in (ByteTokenizer(add_bos=False), OtherIds()):
        assert counted(monkeypatch, config(rows), other, tmp_path)[1] == len(ROWS)


def test_moved_files_are_read_and_changed_ones_tokenized_again(rows, tmp_path, monkeypatch):
    found, _ = counted(monkeypatch, config(rows), ByteTokenizer(), tmp_path)
    moved = rows.rename(tmp_path / "moved.jsonl")
    again, number = counted(monkeypatch, config(moved), ByteTokenizer(), tmp_path)
    assert number == 0 and again.fingerprint == found.fingerprint
    os.utime(moved, ns=(1, 1))
    assert counted(monkeypatch, config(moved), ByteTokenizer(), tmp_path)[1] == 0
    moved.write_text(moved.read_text().replace("11?", "12?"))  # of the same size
    changed, number = counted(monkeypatch, config(moved), ByteTokenizer(), tmp_path)
    assert number == len(ROWS) and changed.fingerprint != found.fingerprint


def test_a_later_start_reads_nothing_of_the_corpus(many, tmp_path, monkeypatch):
    make(many, tmp_path)
    (file,) = document_source(many).files
    opened = []
    real = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, *rest, **more: opened.append(self) or real(self, *rest, **more)
    )
    rows = packed_rows(many, ByteTokenizer(), seq_len=32, split="train", cache=tmp_path)
    rows.read(np.arange(len(rows)))
    assert file not in opened
    os.utime(file, ns=(1, 1))
    make(many, tmp_path)
    assert file in opened


def test_an_interrupted_store_goes_on_with_what_is_missing(many, tmp_path, monkeypatch):
    expected = everything(make(many, tmp_path / "whole"))
    real, made = shards.make_shard, []

    def dies(job, number, piece):
        if len(made) >= 4:  # a thread may add one between
            raise OSError
        real(job, number, piece)
        made.append(number)

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(shards, "make_shard", dies)
        make(many, tmp_path / "cache")
    (folder,) = (tmp_path / "cache" / "tokens").iterdir()
    assert not (folder / INDEX).exists()
    before = {*made}
    assert 4 <= len(before) < len(document_source(many).pieces())
    monkeypatch.setattr(shards, "make_shard", lambda *a: made.append(a[1]) or real(*a))
    found = make(many, tmp_path / "cache")
    assert sorted(made) == list(range(len(found.rows_S)))
    np.testing.assert_array_equal(everything(found), expected)


def test_hosts_and_processes_make_the_same_files(many, tmp_path, monkeypatch):
    """Two hosts one after the other, as if each waited for the other; then two processes, with many
    parts and with two."""
    whole = make(many, tmp_path / "whole")
    for index in (1, 0):
        (tmp_path / "shared").mkdir(exist_ok=True)
        made = make(many, tmp_path / "shared", share=Share(index, 2))
    parallel = make(many, tmp_path / "parallel", workers=2)
    monkeypatch.setattr(shards, "THREADS", len(whole.rows_S) - 1)
    two = make(many, tmp_path / "two", workers=2)
    for other in (made, parallel, two):
        assert other.fingerprint == whole.fingerprint
        for file in sorted(whole.directory.iterdir()):
            assert (other.directory / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_validation_set_of_its_own_depends_on_the_training_rows(rows, tmp_path):
    held = tmp_path / "held.jsonl"
    held.write_text("\n".join(json.dumps(row) for row in ({"q": "new", "a": "x"}, ROWS[3])))
    settings = config(rows, validation_paths=(str(held),))
    found = make(settings, tmp_path, split="validation")
    assert (found.num_documents, found.num_shared, found.num_all) == (1, 1, 2)
    rows.write_text(json.dumps(ROWS[0]))
    again = make(settings, tmp_path, split="validation")
    assert (again.num_documents, again.num_shared) == (2, 0)
    assert again.fingerprint != found.fingerprint


def array_record(file, rows, field="inputs"):
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for row in rows:
        example = tf_example_pb2.Example()
        example.features.feature[field].int64_list.value.extend(row)
        writer.write(example.SerializeToString())
    writer.close()


def test_records_of_token_ids_are_documents(tmp_path):
    """As MaxText reads them: used as they are, without an end token."""
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, 258, draw.integers(2, 40)).tolist() for _ in range(30)]
    array_record(tmp_path / "a.array_record", rows[:20])
    array_record(tmp_path / "b.array_record", rows[20:])
    settings = dict(source="array_record", paths=(f"{tmp_path}/*.array_record",))
    config = DataConfig(**settings, validation_fraction=0.3)
    found = {split: make(config, tmp_path, split=split) for split in shards.SPLITS}
    documents = []
    for split in found.values():
        tokens, labels, segments, _ = everything(split)
        stream, own = tokens[segments > 0].tolist(), labels[segments > 0].tolist()
        ends = [at + 1 for at, label in enumerate(own) if label == -1]
        documents += [stream[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    assert sorted(documents) == sorted(rows)
    assert found["validation"].num_documents > 0
    for changes, message in (
        (dict(ids_field="targets"), "record 0 has no integers under 'targets', it has inputs"),
        (dict(paths=(f"{tmp_path}/bad",)), "bad: not ArrayRecord files"),
    ):
        (tmp_path / "bad").write_text("x" * 100_000)
        with pytest.raises(ConfigError, match=message):
            make(DataConfig(**settings | changes), tmp_path / "other")
    array_record(tmp_path / "c.array_record", [[1, 300]])
    with pytest.raises(ConfigError, match="token 300 of a record is not below 258"):
        make(DataConfig(**settings), tmp_path)


def test_nothing_to_learn_from_is_one_clear_line(tmp_path):
    file = tmp_path / "empty.txt"
    file.write_text("\n \n")
    empty = DataConfig(source="text", paths=(str(file),))
    with pytest.raises(ConfigError, match="empty.txt holds no text: every document is empty"):
        make(empty, tmp_path)
    endless = ByteTokenizer()
    endless.eos_ids = ()
    with pytest.raises(ConfigError, match="has no end token .*: set append_end to False"):
        make(empty, tmp_path, endless)


def test_lines_keep_their_numbers_in_later_pieces(many, tmp_path):
    (file,) = document_source(many).files
    file.write_text(file.read_text() + "\n[]")
    with pytest.raises(ConfigError, match=re.escape("many.jsonl, line 91 is not an object")):
        make(many, tmp_path)


def test_rows_too_short_for_any_document_are_refused(rows, tmp_path):
    options = dict(split="train", cache=tmp_path)
    with pytest.raises(ConfigError, match="seq_len 1 must be at least 2"):
        packed_rows(config(rows), ByteTokenizer(), seq_len=1, **options)
    short = config(rows, too_long="drop", validation_fraction=0.0)
    with pytest.raises(ConfigError, match=r"no document fits a row of 4 tokens \(12 dropped\)"):
        packed_rows(short, ByteTokenizer(), seq_len=4, **options)


def test_an_end_token_without_a_row_is_refused(rows, tmp_path):
    """It is not part of the text, which `encode` checks."""
    tokenizer = ByteTokenizer()
    fitted = tokenizer.fitted(tokenizer.eos_ids[0])
    with pytest.raises(ConfigError, match=r"no end token among the 257 rows of the model's table"):
        make(config(rows), tmp_path, fitted)
    assert len(make(config(rows, append_end=False), tmp_path, fitted)) > 0


def test_empty_files_make_no_rows_and_are_logged_once(tmp_path, caplog):
    """A validation set likewise; ArrayRecord files too."""
    for name in ("0.txt", "2.txt", "v0", "0.array_record"):
        (tmp_path / name).touch()
    (tmp_path / "1.txt").write_text("one document")
    (tmp_path / "v1").write_text("another document")
    paths, held_out = (f"{tmp_path}/?.txt",), (f"{tmp_path}/v?",)
    config = DataConfig(source="text", paths=paths, validation_paths=held_out)
    for _ in range(2):
        assert [make(config, tmp_path, split=split).num_all for split in shards.SPLITS] == [1, 1]
    assert [message.rpartition(": ")[2] for message in caplog.messages] == [
        "2 of 3 files are empty and skipped",
        "1 of 2 files are empty and skipped",
    ]
    array_record(tmp_path / "1.array_record", [[1, 2, 3]])
    settings = dict(source="array_record", validation_fraction=0.0)
    config = DataConfig(**settings, paths=(f"{tmp_path}/*.array_record",))
    assert make(config, tmp_path).num_documents == 1
