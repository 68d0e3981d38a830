"""Prompts from files."""

import re

import pytest

from lsjax.cli.prompts import read_prompts
from lsjax.config import ConfigError


@pytest.mark.parametrize(
    "name, content, prompts",
    [
        ("p.txt", "one\ntwo\n", ["one\ntwo"]),  # the editor's last line break is not meant
        ("p.txt", "one\n\n", ["one\n"]),
        ("p.txt", "  a", ["  a"]),
        ("p.txt", "\ufeffa", ["a"]),  # the mark that Windows puts first
        ("p.jsonl", '{"prompt": "é\\n"}\n\n  \n{"id": 1, "prompt": "b"}', ["é\n", "b"]),
        ("p.jsonl", '\ufeff{"prompt": "a"}\r\n{"prompt": "b"}\r\n', ["a", "b"]),
        ("p.jsonl", '{"prompt": "a\u2028b\x85c"}\n{"prompt": "d"}\n', ["a\u2028b\x85c", "d"]),
        ("p.jsonl", '{"prompt": "\\ud83d\\ude42 \\u0000"}', ["🙂 \0"]),
        ("p.jsonl", '{"turns": ["a", "b"]}\n', ["a"]),
    ],
)
def test_reads(tmp_path, name, content, prompts):
    (tmp_path / name).write_bytes(content.encode())
    assert read_prompts(None, tmp_path / name) == prompts


def test_a_prompt_is_taken_as_it_is():
    assert read_prompts("a\n", None) == ["a\n"]


ONE = b'{"prompt": "a"}\n'


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("p.txt", b"", "p.txt is an empty prompt: it needs at least one character"),
        ("p.txt", b"\n", "p.txt is an empty prompt"),
        ("p.txt", b"a\nb\xff", "p.txt, line 2 is not UTF-8 text: save it as UTF-8"),
        ("p.md", b"a", "p.md: prompts come from .txt or .jsonl, not .md"),
        ("p", b"a", "p: prompts come from .txt or .jsonl, not that"),
        ("p.jsonl", b"", "p.jsonl has no prompts in it: it needs at least one"),
        ("p.jsonl", b"\n \n", "p.jsonl has no prompts in it"),
        ("p.jsonl", ONE + b'{"prompt": "b"', "line 2 is not JSON (Expecting ',' delimiter): write"),
        ("p.jsonl", ONE + b"\nhello\n", "line 3 is not JSON (Expecting value)"),
        ("p.jsonl", ONE + b'{"prompt": "a\0b"}', "line 2 is not JSON (Invalid control character"),
        ("p.jsonl", ONE + b'{"prompt": "\xc3"}', "line 2 is not UTF-8"),
        ("p.jsonl", ONE + b'{"n": ' + b"1" * 5000 + b"}", "line 2 is not JSON (Exceeds the limit"),
        ("p.jsonl", ONE + b"[" * 200_000, "line 2 is not JSON"),
        ("p.jsonl", ONE + b'{"text": "b"}', 'line 2 is no object with a text under "prompt"'),
        ("p.jsonl", ONE + b'{"prompt": 3}', "line 2 is no object with"),
        ("p.jsonl", ONE + b'{"prompt": null}', "line 2 is no object with"),
        ("p.jsonl", ONE + b'"b"', "line 2 is no object with"),
        ("p.jsonl", ONE + b'{"prompt": ""}', "line 2 is an empty prompt"),
        ("p.jsonl", ONE + b'{"prompt": "\\ud800"}', r"line 2 holds '\ud800', half a character"),
        ("p.jsonl", b'{"turns": []}', "line 1 is no object with"),
    ],
)
def test_refuses_with_file_and_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(words)) as error:
        read_prompts(None, tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("prompt, both", [(None, ""), ("a", " and not both")])
def test_one_source_of_prompts(tmp_path, prompt, both):
    with pytest.raises(ConfigError, match=f"give one of --prompt and --prompt-file{both}$"):
        read_prompts(prompt, tmp_path / "p.txt" if prompt else None)


def test_refuses_an_empty_prompt():
    with pytest.raises(ConfigError, match="--prompt is an empty prompt"):
        read_prompts("", None)
