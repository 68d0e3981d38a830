"""The stream of rows: every host count, batch size and restart sees the same one."""

import json
from itertools import chain, islice

import numpy as np
import pytest

from lsjax.config import ConfigError, DataConfig
from lsjax.data.pipeline import OnePass, Pipeline, packed_rows
from lsjax.data.sources import python_source
from lsjax.data.tokenizer_backends import ByteTokenizer
from lsjax.data.vocabulary import make_tokenizer

TEXTS = [f"{n}: " + "naïve words, " * (n % 7) + "end" for n in range(60)]
SEQ_LEN = 16


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def config(cache):
    file = cache / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return DataConfig(source="jsonl", paths=(str(file),), validation_fraction=0.2)


@pytest.fixture(scope="module")
def make(config, cache):
    def make(batch_size=4, *, seed=0, config=config, seq_len=SEQ_LEN, split="train", **hosts):
        rows = packed_rows(config, ByteTokenizer(), seq_len=seq_len, split=split, cache=cache)
        return Pipeline(rows, batch_size=batch_size, seed=seed, **hosts)

    return make


@pytest.fixture(scope="module")
def passes(config, cache):
    def passes(batch_size=4, *, config=config, split="train", seq_len=SEQ_LEN, **rest):
        rows = packed_rows(config, ByteTokenizer(), seq_len=seq_len, split=split, cache=cache)
        return OnePass(rows, batch_size=batch_size, **rest)

    return passes


def take(pipeline, batches):
    return joined([pipeline.next() for _ in range(batches)])


def joined(batches):
    """The rows of batches, all four arrays side by side: [rows, 4, T]."""
    return np.concatenate([np.stack(list(batch.values()), 1) for batch in batches])


def documents_in(tokenizer, tokens, segments):
    """Texts of rows in which every document is whole, or goes on in the next row."""
    stream = tokens[segments > 0].tolist()
    text = tokenizer.decode(stream, skip_special=False)
    return [piece.removeprefix("<s>") for piece in text.split("</s>")[:-1]]


def test_an_epoch_is_every_row_once_and_the_next_one_in_another_order(make):
    pipeline = make(1)
    rows = len(pipeline.rows)
    every = sorted(pipeline.rows.read(np.arange(rows))["tokens_BT"].tolist())
    epochs = [take(pipeline, rows)[:, 0].tolist() for _ in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [every] * 3
    assert epochs[0] != epochs[1] != epochs[2]


def test_one_seed_repeats_and_two_differ(make):
    one, same, other = (take(make(seed=seed), 5) for seed in (3, 3, 4))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def blocks(batch_size, num_hosts):
    """The numbers of each host's rows."""
    return np.split(np.arange(batch_size), num_hosts)


@pytest.mark.parametrize("own", [range(8), range(4, 8), [0, 1, 4, 5], [7]])
def test_hosts_share_out_one_stream(make, own):
    own_B = np.array(own)
    batches = 2 * len(make().rows) // 8 + 3  # into the third epoch
    whole = take(make(8), batches).reshape(batches, 8, 4, SEQ_LEN)
    pipeline = make(8, own_B=own_B)
    found = take(pipeline, batches).reshape(batches, len(own), 4, SEQ_LEN)
    assert np.array_equal(found, whole[:, own_B])
    assert pipeline.state()["rows_taken"] == 8 * batches


def test_the_stream_does_not_depend_on_the_batch_size(make):
    assert np.array_equal(take(make(4), 30), take(make(12), 10))


def test_going_on_gives_the_very_next_row_at_any_position(make):
    whole = take(make(), 90)
    epoch = len(make().rows)
    assert epoch % 4 and 2 * epoch < 4 * 85, "ends of epochs fall within batches"
    for taken in (0, 1, 7, epoch // 4, epoch // 4 + 1, 2 * epoch // 4 + 1, 85):
        before = make()
        for _ in range(taken):
            before.next()
        state = json.loads(json.dumps(before.state()))
        assert state["rows_taken"] == 4 * taken
        for batch_size, num_hosts in ((4, 1), (2, 1), (4, 2), (8, 4)):
            rows = []
            for own_B in blocks(batch_size, num_hosts):
                after = make(batch_size, own_B=own_B)
                after.next()  # a pipeline in use can go back as well
                after.restore(state)
                rows.append(take(after, 2).reshape(2, -1, 4, SEQ_LEN))
            rows = np.concatenate(rows, 1).reshape(-1, 4, SEQ_LEN)
            assert np.array_equal(rows, whole[4 * taken :][: 2 * batch_size])
            assert after.state()["rows_taken"] == 4 * taken + 2 * batch_size
        assert np.array_equal(take(before, 2), whole[4 * taken :][:8]), "taking the state moved it"


def test_restoring_reads_no_row_that_was_taken(make, monkeypatch):
    pipeline = make()
    state = pipeline.state() | {"rows_taken": 4 * 10**9}
    read, real = [], type(pipeline.rows).read
    monkeypatch.setattr(
        type(pipeline.rows), "read", lambda self, rows: read.append(len(rows)) or real(self, rows)
    )
    pipeline.restore(state)
    pipeline.next()
    assert sum(read) <= 4 * 16, "only the next batches, some of them ahead of time"


def test_a_state_of_other_data_is_refused(make, config):
    state = make().state()
    cases = {
        "seed 0, now 1": make(seed=1),
        "seq_len 16, now 8; rows": make(seq_len=8),
        "fingerprint": make(config=DataConfig(**(vars(config) | {"train_on_prompt": True}))),
        "rows": make(config=DataConfig(**(vars(config) | {"max_documents": 30}))),
    }
    for message, pipeline in cases.items():
        with pytest.raises(ConfigError, match=f"run began with .*{message}.* begin a new run"):
            pipeline.restore(state)
        assert pipeline.state()["rows_taken"] == 0


def test_one_pass_is_every_row_once_padded_for_every_host(passes, make):
    rows = make().rows
    every = rows.read(np.arange(len(rows)))
    assert len(rows) % 16
    for num_hosts in (1, 2, 4):
        parts = [passes(16, own_B=own_B) for own_B in blocks(16, num_hosts)]
        assert {len(part) for part in parts} == {-(-len(rows) // 16)}
        batches = [np.concatenate([joined([b]) for b in bs]) for bs in zip(*parts, strict=True)]
        whole = np.concatenate(batches)
        assert np.array_equal(whole[: len(rows)], joined([every]))
        tokens, labels, segments, positions = whole[len(rows) :].transpose(1, 0, 2)
        assert len(tokens) == -len(rows) % 16
        assert not (tokens.any() or segments.any() or positions.any()) and (labels == -1).all()
    again = passes(16)
    assert np.array_equal(joined(again), joined(again)), "a pass can be made again"
    few = joined(passes(4, max_batches=2))
    assert np.array_equal(few, joined(passes(4, max_batches=2, own_B=np.array([3])).whole()))
    at = [k * len(rows) // 8 for k in range(8)]
    assert np.array_equal(few, joined(again)[at]), "from one end of the rows to the other"


def test_rows_decode_to_the_documents_of_their_split(make, passes):
    held = {split: joined(passes(split=split)) for split in ("train", "validation")}
    texts = {
        split: documents_in(ByteTokenizer(), rows[:, 0], rows[:, 2]) for split, rows in held.items()
    }
    assert sorted(texts["train"] + texts["validation"]) == sorted(TEXTS)
    assert 0 < len(texts["validation"]) < 30
    assert not set(texts["train"]) & set(texts["validation"])
    first = texts["validation"][:3]
    assert first != sorted(first, key=TEXTS.index), "not in the order of the file"


def test_a_validation_set_of_its_own_is_left_without_what_is_in_training(passes, cache):
    train, validation = cache / "a.tsv", cache / "b.tsv"
    train.write_text("q\ta\n" + "".join(f"question {n}\tanswer {n}\n" for n in range(8)))
    validation.write_text("q\ta\n" + "".join(f"question {n}\tother {n}\n" for n in range(6, 12)))
    config = DataConfig(
        source="tsv",
        paths=(str(train),),
        validation_paths=(str(validation),),
        prompt_template="{q}?",
        response_template=" {a}",
    )
    held = {s: passes(config=config, split=s, seq_len=64) for s in ("train", "validation")}
    texts = {
        s: documents_in(ByteTokenizer(), *joined(p)[:, [0, 2]].swapaxes(0, 1))
        for s, p in held.items()
    }
    assert sorted(texts["train"]) == [f"question {n}? answer {n}" for n in range(8)]
    assert sorted(texts["validation"]) == sorted(f"question {n}? other {n}" for n in range(8, 12))
    words = held["validation"].rows.describe()
    assert words.endswith("2 left out, as they are also in the training data")
    assert held["train"].rows.describe().endswith("% full")
    rows = joined(held["validation"])
    responses = [row[1][row[1] >= 0].tolist() for row in rows if row[2].any()]
    learned = (
        ByteTokenizer()
        .decode(chain.from_iterable(responses), skip_special=False)
        .split("</s>")[:-1]
    )
    assert sorted(learned) == sorted(f" other {n}" for n in range(8, 12)), "prompts are no labels"
    validation.write_text(train.read_text())
    with pytest.raises(ConfigError, match="none of 8 documents is for validation: all are in"):
        passes(config=config, split="validation")


def test_a_split_without_documents_is_one_clear_line(passes, config):
    none_held = DataConfig(**(vars(config) | {"validation_fraction": 0.0}))
    with pytest.raises(ConfigError, match="none of 60 documents is for validation: .* too small"):
        passes(config=none_held, split="validation")
    all_held = DataConfig(**(vars(config) | {"validation_fraction": 0.999999}))
    with pytest.raises(ConfigError, match="none of 60 documents is for train: .* too large"):
        passes(config=all_held)


def test_the_default_source_trains_a_vocabulary_and_comes_back_as_text(tmp_path):
    config = DataConfig(max_documents=12, vocab_size=400, validation_fraction=0.2)
    tokenizer = make_tokenizer(config, cache=tmp_path)
    texts, num_tokens = [], 0
    for split in ("train", "validation"):
        rows = packed_rows(config, tokenizer, seq_len=64, split=split, cache=tmp_path)
        assert rows.describe().endswith("% full")
        num_tokens += rows.num_tokens
        rows = joined(OnePass(rows, batch_size=8))
        texts += documents_in(tokenizer, rows[:, 0], rows[:, 2])
    expected = [document.text for document in islice(python_source().documents(), 12)]
    assert sorted(texts) == sorted(expected)
    assert num_tokens > 1000
