"""A file of results goes on where it was, and never over something else."""

import json

import pytest

from lsjax.config import ConfigError
from lsjax.evaluation.results import append, read, resume

ASKED = {"task": "topv2", "questions": 2, "sampling": {"temperature": 0.5}}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "results.jsonl"


def test_begin_append_and_go_on(file):
    assert resume(file, ASKED) == []
    append(file, {"id": "a\n", "text": "é"})
    assert resume(file, ASKED) == [{"id": "a\n", "text": "é"}]
    append(file, {"id": "b"})
    assert read(file) == (ASKED, [{"id": "a\n", "text": "é"}, {"id": "b"}])


def test_every_torn_end_is_dropped(file):
    resume(file, ASKED)
    append(file, {"id": "a", "text": "ü"})
    whole = file.read_bytes()
    append(file, {"id": "b", "text": "ü"})
    longer = file.read_bytes()
    for length in range(len(longer) + 1):
        file.write_bytes(longer[:length])
        kept = [{"id": name, "text": "ü"} for name in "ab"]
        kept = kept[: (length >= len(whole)) + (length == len(longer))]
        assert resume(file, ASKED) == kept
        append(file, {"id": "c"})
        assert read(file) == (ASKED, [*kept, {"id": "c"}])


def test_answers_to_something_else_are_kept(file):
    resume(file, ASKED)
    append(file, {"id": "a"})
    before = file.read_bytes()
    other = {**ASKED, "questions": 3, "sampling": {"temperature": 0.7}}
    with pytest.raises(ConfigError) as error:
        resume(file, other)
    assert "questions was 2 and is now 3, sampling.temperature was 0.5 and is now 0.7" in str(
        error.value
    )
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "content", ["notes", "notes\n", '{"asked": 1, "x": 2', '{"id": 3}\n', "[]\n", "\n"]
)
def test_another_file_is_left_alone(file, content):
    file.write_text(content)
    with pytest.raises(ConfigError, match="line 1 is no line of results|holds no results"):
        resume(file, ASKED)
    assert file.read_text() == content


def test_a_bad_line_in_the_middle_is_named(file):
    resume(file, ASKED)
    with file.open("a") as stream:
        stream.write('{"id": \n' + json.dumps({"id": "b"}) + "\n")
    with pytest.raises(ConfigError, match="line 2 is no line of results"):
        resume(file, ASKED)
