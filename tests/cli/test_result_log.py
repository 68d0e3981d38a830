"""A file of results that outlives a kill."""

import re

import pytest

from lsjax.cli.result_log import ResultLog
from lsjax.config import ConfigError

SETTINGS = {"model": "m", "new_tokens": 4, "lengths": (1, 2)}


def write(file, *rows) -> list[dict]:
    """Adds rows; gives those that were there."""
    with ResultLog(file, SETTINGS) as log:
        for row in rows:
            log.write(row)
        return log.rows


def test_goes_on(tmp_path):
    file = tmp_path / "new" / "log.jsonl"
    assert write(file, {"a": 1}, {"a": "\u2028é"}) == []
    assert write(file, {"a": 3}) == [{"a": 1}, {"a": "\u2028é"}]
    assert write(file) == [{"a": 1}, {"a": "\u2028é"}, {"a": 3}]


@pytest.mark.parametrize("torn", range(1, 12))
def test_a_torn_line_is_dropped(tmp_path, torn):
    """Wherever the writing stopped, what follows is whole again."""
    file = tmp_path / "log.jsonl"
    write(file, {"a": 1}, {"long": 2})
    file.write_bytes(file.read_bytes()[:-torn])
    assert write(file, {"b": 3}) == [{"a": 1}]
    assert write(file) == [{"a": 1}, {"b": 3}]


def test_a_torn_header_is_no_header(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text('{"settin')
    assert write(file, {"a": 1}) == []
    assert write(file) == [{"a": 1}]


def test_other_settings_are_refused(tmp_path):
    file = tmp_path / "log.jsonl"
    write(file, {"a": 1})
    before = file.read_bytes()
    words = "log.jsonl was begun with new tokens 4, and this is 5: go on with the same, or name"
    with pytest.raises(ConfigError, match=words):
        ResultLog(file, SETTINGS | {"new_tokens": 5})
    with pytest.raises(ConfigError, match="begun with more None, and this is 1"):
        ResultLog(file, SETTINGS | {"more": 1})
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"settings": {}}\nx\n{}\n', "log.jsonl, line 2 is no result: remove the line"),
        ('{"settings": {}}\n3\n', "line 2 is no result"),
        ('{"a": 1}\n', "log.jsonl holds something else: name another --output"),
    ],
)
def test_other_files_are_refused(tmp_path, content, words):
    file = tmp_path / "log.jsonl"
    file.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(words)):
        ResultLog(file, {})
