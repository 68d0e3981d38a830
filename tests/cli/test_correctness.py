"""The program that compares self-speculation with autoregressive decoding."""

import json

import numpy as np
import pytest

from lsjax.cli import correctness
from lsjax.cli.correctness import main
from lsjax.evaluation.exactness import Difference


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def compare(directory, *options: str) -> int:
    given = ["--model", str(directory), "--max-new-tokens", "16", *options]
    return main([*given, "--num-draft-tokens", "4", "--exit-layers", "3"])


def test_a_row_for_every_exit_and_length(model_directory, tmp_path, capsys):
    """Of five prompts every second is taken, two side by side."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"turns": [c * 5, "x"]}) + "\n" for c in "abcde"))
    options = ["--prompt-file", str(prompts), "--every", "2", "--batch-size", "2"]
    given = ["--model", str(model_directory), "--max-new-tokens", "16", *options]
    assert main([*given, "--exit-layers", "1", "3", "--num-draft-tokens", "4"]) == 0
    printed = capsys.readouterr()
    rows = [line.split()[:4] for line in printed.out.splitlines()[2:4]]
    assert rows == [["1", "4", "3", "0"], ["3", "4", "3", "0"]]
    assert "Self-speculation gives the tokens of autoregressive decoding." in printed.out
    assert "float32, 3 prompts, 16 new tokens" in printed.out


@pytest.mark.parametrize(
    "dtype, margin, code, words",
    [
        ("float32", 1e-5, 0, "Self-speculation gives the tokens"),  # rounding explains it
        ("float32", 1e-3, 1, "1 differences are wider than 1e-04"),
        ("float32", np.inf, 1, "1 differences are wider"),
        ("float32", np.nan, 1, "1 differences are wider"),
        ("bfloat16", 1.0, 0, "1.0e+00"),  # shown, and no failure
    ],
)
def test_differences(model_directory, monkeypatch, capsys, dtype, margin, code, words):
    difference = Difference(0, 65, None, margin=margin, roundings=2 * margin)
    monkeypatch.setattr(correctness, "first_difference", lambda *_: difference)
    assert compare(model_directory, "--dtype", dtype) == code
    out = capsys.readouterr().out
    where = "prompt 1, exit 3, 4 drafts: new token 1, 'A' became the end"
    assert f"{where}, margin {margin:.1e}, {2 * margin:.2g} roundings of {dtype}" in out
    assert words in out and ("gives the tokens" in out) == (code == 0 and dtype == "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_and_rows_of_a_task(model_directory, tmp_path, capsys, dtype):
    """Of six rows the second, the fourth (which is bad) and the last, of which no more is taken."""
    rows = tmp_path / "rows.tsv"
    rows.write_text("id\tquery\n1\tab\n2\tcd\n3\tef\n4\t\n5\tgh\n6\tij\n7\tkl\n")
    taken = ["--prompt-template", "{query}?", "--every", "2", "--limit", "3", "--bad-rows", "skip"]
    file = tmp_path / "cells.jsonl"
    options = ["--prompt-file", str(rows), *taken, "--dtype", dtype, "--json", str(file)]
    assert compare(model_directory, *options) == 0
    (cell,) = map(json.loads, file.read_text().splitlines())
    assert (cell["exit_layer"], cell["num_draft_tokens"]) == (3, 4)
    assert cell["differences"].keys() <= {"1", "2", "3"}
    printed = capsys.readouterr()
    assert f"{dtype}, 3 prompts, 16 new tokens" in printed.out


@pytest.mark.parametrize(
    "changes, words",
    [
        (["--model", "/nowhere"], "/nowhere: does not exist"),
        (["--every", "0"], "--every 0 is below 1: choose 1 or more"),
        (["--exit-layers"], "--exit-layers is empty: name exits to draft from"),
        (["--num-draft-tokens"], "--num-draft-tokens is empty: name draft lengths"),
        (["--exit-layers", "3", "4"], "exit layer 4 is not in 1..3"),
        (["--num-draft-tokens", "-1"], "num_draft_tokens -1 is below 0"),
        (["--batch-size", "0"], "batch size 0 is below 1"),
        (["--max-new-tokens", "0"], "max_new_tokens 0 is below 1"),
        (["--max-new-tokens", "600"], "600 new ones do not fit the length of 512"),
        (["--prompt-file", "/nowhere.jsonl"], "'/nowhere.jsonl'"),
        (["--limit", "0"], "--limit 0 is below 1"),
        (["--prompt-template", "{a}"], "--prompt-template needs --prompt-file"),
        (["--json", "/nowhere/x"], "/nowhere/x can't be written"),
    ],
)
def test_bad_input(model_directory, refused, monkeypatch, changes, words):
    """Before the model is loaded."""
    monkeypatch.delattr(correctness, "load")
    given = {"--model": [model_directory], "--exit-layers": [3], "--num-draft-tokens": [4]}
    name, *values = changes
    given[name] = values
    assert words in refused(main, *(part for name, v in given.items() for part in (name, *v)))


def test_the_prompts_are_not_overwritten(model_directory, refused, monkeypatch, tmp_path):
    monkeypatch.delattr(correctness, "load")
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}')
    cell = ("--model", model_directory, "--exit-layers", 3, "--num-draft-tokens", 4)
    words = refused(main, *cell, "--prompt-file", file, "--json", file)
    assert "prompts.jsonl would overwrite the prompts" in words
    assert file.read_text() == '{"prompt": "a"}'
