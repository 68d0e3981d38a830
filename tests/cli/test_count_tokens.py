"""The program that counts tokens, and decoding with what it counted."""

import json

import pytest

from lsjax.cli import count_tokens
from lsjax.cli.count_tokens import read_pieces
from lsjax.config import ConfigError
from lsjax.decoding.draft_vocabulary import DraftVocabulary
from tests.programs import program

main = program("count-tokens")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """Not the user's own."""
    monkeypatch.setenv("LSJAX_CACHE", str(tmp_path / "cache"))


def test_counts_are_kept_and_used(model_directory, tmp_path, capsys, monkeypatch):
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"prompt": "aaab", "more": ["b", {"x": "c"}]}) + "\n")
    given = ["--model", str(model_directory)]
    drafts = [*given, "--prompt", "a", "--strategy", "self_speculative", "--max-new-tokens", "20"]
    assert main([*given, "--text", str(text)]) == 0
    assert "6 tokens, 3 distinct" in capsys.readouterr().out
    seen = []
    most_frequent = DraftVocabulary.most_frequent
    monkeypatch.setattr(
        DraftVocabulary,
        "most_frequent",
        lambda counts, *sizes: seen.append(counts) or most_frequent(counts, *sizes),
    )
    results = []
    for vocabulary in ([], ["--draft-vocab", "100"]):
        assert program("decode")([*drafts, *vocabulary, "--json", "-"]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0]["token_ids"] == results[1]["token_ids"]
    assert [result["draft_vocab"] for result in results] == [None, 100]
    assert seen == [{ord("a"): 3, ord("b"): 2, ord("c"): 1}]


def test_draft_vocabularies_without_counts(model_directory, refused):
    given = ["--model", model_directory, "--prompt", "a", "--strategy", "self_speculative"]
    words = "make them with lsjax count-tokens --model"
    assert words in refused(program("decode"), *given, "--draft-vocab", 100)


def test_other_strategies_have_none(model_directory, refused):
    given = ["--model", model_directory, "--prompt", "a", "--strategy", "autoregressive"]
    words = "--draft-vocab has no effect on autoregressive"
    assert words in refused(program("decode"), *given, "--draft-vocab", 100)


@pytest.mark.parametrize("lines", [2, 1 << 14])
def test_pieces_end_at_line_breaks(tmp_path, monkeypatch, lines):
    monkeypatch.setattr(count_tokens, "LINES", lines)
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo two\n\nend", newline="")
    pieces = list(read_pieces(file))
    assert "".join(pieces) == "one\ntwo two\n\nend"
    assert len(pieces) == (2 if lines == 2 else 1)
    assert all(piece.endswith("\n") for piece in pieces[:-1])


def test_strings_of_json_are_texts_of_their_own(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": "one", "b": ["two", {"c": 3}]}\n\n{"a": "x\\ud800"}\n')
    assert list(read_pieces(file)) == ["one", "two", "x?"]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.txt", b"a\nb\xff", "line 2 is not UTF-8"),
        ("a.jsonl", b'{"a": "b"}\n{"a"\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"a": "b"}\n"three"\n', "line 2 is not an object"),
    ],
)
def test_damaged_text(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        list(read_pieces(tmp_path / name))


def test_a_step_of_what_is_no_run_is_refused(model_directory, refused, tmp_path):
    given = ["--model", f"{model_directory}@5", "--text", tmp_path / "text.txt"]
    words = f"{model_directory} is not a training run, so it has no steps: leave out @5"
    assert words in refused(main, *given)
