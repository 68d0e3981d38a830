"""Rows of jsonl and tsv files, templates, and bad lines by file and number."""

import json

import numpy as np
import pytest

from lsjax.config import ConfigError, DataConfig
from lsjax.data.pieces import Document
from lsjax.data.sources import document_source, fill

TOP = dict(prompt_template="{en_query}", response_template=" {en_parse}")


def documents(file, source, **templates):
    config = DataConfig(source=source, paths=(str(file),), **templates)
    return list(document_source(config).documents())


def test_jsonl_of_texts_and_of_prompts_with_responses(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"text": "a\nb", "n": 3}, {"text": " ", "n": 4}, {"text": "né", "n": 0.5}]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert documents(file, "jsonl") == [Document("a\nb"), Document("né")]
    pairs = documents(file, "jsonl", prompt_template="{{{n}}}: ", response_template="{text}")
    assert pairs == [Document("a\nb", "{3}: "), Document("né", "{0.5}: ")]


def test_tsv_takes_quotes_as_they_are(tmp_path):
    file = tmp_path / "top.tsv"
    file.write_text('en_query\ten_parse\r\nplay "x\t[IN:PLAY "x ]\r\n\r\nstop\t[IN:STOP ]\r\n')
    assert documents(file, "tsv", **TOP) == [
        Document(' [IN:PLAY "x ]', 'play "x'),
        Document(" [IN:STOP ]", "stop"),
    ]


@pytest.mark.parametrize(
    ("source", "content", "message"),
    [
        ("jsonl", '{"text": "a"}\n\n{"text": \n', "line 3 is not JSON (Expecting value)"),
        ("jsonl", "[1]\n", "line 1 is not an object"),
        (
            "jsonl",
            '{"text": "a"}\n{"body": "b", "id": 1}\n',
            "line 2 has no field 'text', it has body, id",
        ),
        ("jsonl", '{"text": null}\n', "line 1: text is None, but must be a text or a number"),
        ("jsonl", '{"text": true}\n', "line 1: text is True, but must be"),
        ("jsonl", '{"text": "\\ud83d"}\n', "line 1 contains '\\ud83d', a lone surrogate"),
        ("jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "line 2 is not UTF-8"),
        ("tsv", "text\tn\na\t1\nb\n", "line 3 has 1 columns, but the header has 2"),
        ("tsv", "body\tn\na\t1\n", "line 2 has no field 'text', it has body, n"),
    ],
)
def test_a_bad_line_is_named(tmp_path, source, content, message):
    file = tmp_path / f"rows.{source}"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as error:
        documents(file, source)
    assert f"{file}, {message}" in str(error.value) and "\n" not in str(error.value)


def test_an_empty_prompt_is_refused_and_an_empty_response_left_out(tmp_path):
    file = tmp_path / "top.tsv"
    file.write_text("en_query\ten_parse\na\t \nb\tc\n")
    assert documents(file, "tsv", **TOP) == [Document(" c", "b")]
    file.write_text("en_query\ten_parse\na\tb\n\tc\n")
    with pytest.raises(ConfigError, match="line 3 has an empty prompt"):
        documents(file, "tsv", **TOP)


def test_fields_may_be_bytes_numbers_and_of_any_name():
    row = {"a b": "né".encode(), "x.y": np.int32(7), "z": np.float32(0.5)}
    assert fill("{a b}|{x.y}|{z}|{{}}", row, "row") == "né|7|0.5|{}"
