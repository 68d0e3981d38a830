"""Counts of tokens: made, kept, found, refused."""

import json
from collections import Counter

import pytest

from lsjax.config import ConfigError
from lsjax.data.token_counts import (
    COUNTS,
    WRITTEN,
    add_written,
    cached_counts,
    count_tokens,
    find_counts,
    read_counts,
    write_counts,
)
from lsjax.data.tokenizer_backends import ByteTokenizer

TOKENIZER = ByteTokenizer()


def test_counts_every_token_but_special_ones():
    (special,) = {TOKENIZER.special_spelling[TOKENIZER.eos_ids[0]]}
    counts = count_tokens(TOKENIZER, ["aab", "b" + special])
    assert counts.total() == 4 + len(special) and TOKENIZER.eos_ids[0] not in counts
    assert counts[ord("b")] == 2


def test_the_models_own_file_comes_first(tmp_path):
    model, cache = tmp_path / "model", tmp_path / "cache"
    model.mkdir()
    command = rf"lsjax count-tokens --model {model} --text FILE"
    with pytest.raises(ConfigError, match=command):
        find_counts(model, cache, TOKENIZER)
    write_counts(cached_counts(cache, TOKENIZER), TOKENIZER, Counter({1: 2}))
    assert find_counts(model, cache, TOKENIZER) == {1: 2}
    write_counts(model / COUNTS, TOKENIZER, Counter({3: 4, 5: 6}))
    assert find_counts(model, cache, TOKENIZER) == {3: 4, 5: 6}
    assert [file.name for file in model.iterdir()] == [COUNTS]


def test_decoded_tokens_count_when_there_are_enough(tmp_path):
    model, cache = tmp_path / "model", tmp_path / "cache"
    add_written(cache, TOKENIZER, [])
    assert not cache.exists()
    add_written(cache, TOKENIZER, [7] * 6_000)
    with pytest.raises(ConfigError):
        find_counts(model, cache, TOKENIZER)
    add_written(cache, TOKENIZER, [7] * 3_000 + [8] * 1_000)
    assert find_counts(model, cache, TOKENIZER) == {7: 9_000, 8: 1_000}
    cached_counts(cache, TOKENIZER, WRITTEN).write_bytes(b"")  # damaged: counting begins again
    add_written(cache, TOKENIZER, [9] * 10_000)
    assert find_counts(model, cache, TOKENIZER) == {9: 10_000}
    write_counts(cached_counts(cache, TOKENIZER), TOKENIZER, Counter({1: 2}))
    assert find_counts(model, cache, TOKENIZER) == {1: 2}


@pytest.mark.parametrize(
    "content, words",
    [
        ("[1", "has no token counts"),
        ("[1]", "has no token counts"),
        ('{"tokenizer": "x", "counts": {"1": Infinity}}', "has no token counts"),
        ('{"tokenizer": "x", "counts": 3}', "has no token counts"),
        ('{"tokenizer": "x", "counts": {"1": 2}}', "was counted with another tokenizer"),
        ({"counts": {"999": 2}}, "has empty or invalid counts"),
        ({"counts": {"1": -2}}, "has empty or invalid counts"),
        ({"counts": {}}, "has empty or invalid counts"),
    ],
)
def test_damaged_files_are_named(tmp_path, content, words):
    file = tmp_path / COUNTS
    if isinstance(content, dict):
        content = json.dumps(content | {"tokenizer": TOKENIZER.fingerprint})
    file.write_text(content)
    with pytest.raises(ConfigError, match=f"{COUNTS} {words}"):
        read_counts(file, TOKENIZER)


def test_an_empty_text_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no tokens"):
        write_counts(tmp_path / COUNTS, TOKENIZER, Counter())
    assert not list(tmp_path.iterdir())
