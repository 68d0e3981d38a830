"""The benchmark: figures that hold whatever the clock says, exactness, and a run that resumes."""

import json

import numpy as np
import pytest

from lsjax.cli import benchmark
from lsjax.decoding.engine import Engine
from lsjax.evaluation import comparison, speeds
from lsjax.evaluation.comparison import Difference
from lsjax.io.lines import Lines
from tests.marks import long
from tests.programs import program

main = program("benchmark")


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("LSJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "250")


def run(directory, *options) -> int:
    given = ["--model", directory, "--new-tokens", 16, "--repeats", 1, *options]
    return main([str(option) for option in given])


def read(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def cells(model_directory, tmp_path):
    """Runs the program in a new directory; the lines of its table."""

    def cells(*options, code=0) -> list[dict]:
        output = tmp_path / f"output{len(list(tmp_path.iterdir()))}"
        assert run(model_directory, "--output", output, *options) == code
        return read(output / "cells.jsonl")

    return cells


@pytest.mark.long
def test_with_an_identity_tail_every_draft_is_accepted(cells, capsys):
    grid = ("--exit-layers", 2, "--num-draft-tokens", 2, 4)
    found = cells("--identity-tail", 1, "--draft-vocab", 64, *grid)
    names = [(r["exit_layer"], r["num_draft_tokens"], r["draft_vocab"]) for r in found]
    assert names == [(None, None, None)] + [(2, d, v) for v in (None, 64) for d in (2, 4)]
    base, *others = found
    assert base["speedup"] == 1 and base["tokens_per_round"] == 1
    for row in others:
        # 64 tokens hold all that the model says, which were counted.
        assert row["acceptance_rate"] == 1
        # 15 tokens after the first: rounds of d + 1.
        assert row["tokens_per_round"] == 15 / -(-15 // (row["num_draft_tokens"] + 1))
        assert row["share_of_ideal"] == row["speedup"] / row["ideal"]
        assert (row["equal"], row["differ"], row["widest_margin"]) == (3, 0, None)
    # Two to read prompts of two sizes, one without drafts, and one for each other line.
    assert all(row["compile_seconds"] > 0 for row in others)
    printed = capsys.readouterr().out
    assert "7 programs" in printed and "E exit, d draft tokens" in printed
    assert "Self-speculation gives the same tokens as autoregressive decoding." in printed


@pytest.mark.long
def test_of_a_trained_model_drafts_are_rejected_too(cells):
    """With the draft length that the model's directory says."""
    options = ("--exit-layers", 3)
    base, row = cells(*options)
    assert row["num_draft_tokens"] == 4 and 0 < row["acceptance_rate"] < 1
    _, full, sure = cells(*options, "--draft-confidence", 0, 0.15)
    assert (full["draft_confidence"], sure["draft_confidence"]) == (None, 0.15)
    assert sure["acceptance_rate"] > full["acceptance_rate"] == row["acceptance_rate"]
    assert sure["ideal"] > row["ideal"]


@pytest.mark.long
def test_sampled_drafts_are_accepted_as_often_as_the_distributions_agree(cells, capsys):
    options = ("--identity-tail", 2, "--exit-layers", 2, "--num-draft-tokens", 3)
    found = cells(*options, "--temperature", 1.5)
    assert found[1]["acceptance_rate"] == 1, "exit and model are one distribution"
    assert found[1]["equal"] is None and "gives the same tokens" not in capsys.readouterr().out
    options = ("--exit-layers", 1, "--num-draft-tokens", 3, "--temperature", 1.5)
    assert 0 < cells(*options)[1]["acceptance_rate"] < 1


def test_autoregressive_alone(cells):
    assert len(cells()) == 1


@pytest.mark.long
def test_early_exit_may_differ(cells):
    """It is no fault, and it has no ideal."""
    base, early = cells("--strategies", "early_exit", "--exit-layers", 1)
    assert (early["strategy"], early["differ"], early["ideal"]) == ("early_exit", 0, None)


def test_nothing_is_written_unless_asked(model_directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(model_directory, "--exit-layers", 3, "--num-draft-tokens", 4) == 0
    assert not list(tmp_path.iterdir())


def test_rows_of_a_file(model_directory, tmp_path, capsys):
    """Rows in Spec-Bench's form, or of a task's files by a template; bad rows are left out."""
    prompts, rows = tmp_path / "prompts.jsonl", tmp_path / "rows.tsv"
    prompts.write_text("".join(json.dumps({"turns": [c * 5, "x"]}) + "\n" for c in "abcde"))
    given = ("--exit-layers", 3, "--num-draft-tokens", 4)
    assert run(model_directory, "--prompt-file", prompts, "--limit", 3, *given) == 0
    assert "float32, 3 prompts of 5 to 5 tokens, 16 new tokens" in capsys.readouterr().out
    rows.write_text("id\tquery\n1\tab\n2\tcd\n3\tef\n4\t\n5\tgh\n6\tij\n7\tkl\n")
    taken = ("--prompt-template", "{query}?", "--limit", 3, "--bad-rows", "skip")
    assert run(model_directory, "--prompt-file", rows, *taken, *given) == 0
    assert "float32, 3 prompts of 3 to 3 tokens, 16 new tokens" in capsys.readouterr().out


def test_a_task_with_categories(cells, tmp_path, capsys):
    """Spec-Bench: a line for all prompts, and one for each category."""
    rows = [
        {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
        {"question_id": 82, "category": "stem", "turns": ["Why?", "Really?"]},
        {"question_id": 90, "category": "math_reasoning", "turns": ["?"], "reference": ["#### 3"]},
    ]
    file = tmp_path / "question.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    grid = ("--exit-layers", 1, "--num-draft-tokens", 2)
    found = cells("--task", "spec_bench", "--data", file, *grid)
    names = ["all", "math_reasoning", "mt_bench"]
    assert [row["group"] for row in found] == names * 2
    assert [row["equal"] for row in found] == [3, 1, 2] * 2
    assert "mt_bench" not in capsys.readouterr().out
    cells("--task", "spec_bench", "--data", file, "--groups", "--offset", 1, *grid)
    assert "mt_bench" in capsys.readouterr().out


@pytest.mark.parametrize(
    "dtype, margin, code, words",
    [
        ("float32", 1e-5, 0, "Self-speculation gives the same tokens"),  # rounding explains it
        ("float32", 1e-3, 1, "2 texts differ by a margin above 1e-04"),
        ("float32", np.inf, 1, "2 texts differ by a margin above"),
        ("float32", np.nan, 1, "2 texts differ by a margin above"),
        *long(("bfloat16", 1.0, 0, "1.0e+00")),  # shown, and no failure
    ],
)
def test_differences(cells, monkeypatch, capsys, dtype, margin, code, words):
    """The third exit's text of one of two prompts differs, in each of two repeats."""

    def first_difference(model, prompt, expected, found):
        nonlocal calls
        calls += 1
        return difference if calls % 4 == 2 else None

    calls, difference = 0, Difference(0, 65, None, margin=margin)
    monkeypatch.setattr(comparison, "first_difference", first_difference)
    monkeypatch.setattr(benchmark, "PROMPTS", ("ab", "cd"))
    options = ("--exit-layers", 3, "--num-draft-tokens", 4, "--dtype", dtype, "--repeats", 2)
    _, row = cells(*options, code=code)
    assert (row["equal"], row["differ"]) == (1, 1)
    out = capsys.readouterr().out
    assert row["widest_margin"] == (margin if np.isfinite(margin) else None)
    assert words in out and ("gives the same tokens" in out) == (code == 0 and dtype == "float32")


def test_a_busy_machine_is_named(cells, monkeypatch, capsys):
    monkeypatch.setattr(speeds, "MOST_DISAGREEMENT", 0.9)  # so that no time is trusted
    base, row = cells("--prompt", "ab", "--exit-layers", 3, "--num-draft-tokens", 4)
    assert not base["trusted"] and not row["trusted"]
    out = capsys.readouterr().out
    assert f" {row['speedup']:.2f}? " in out
    assert "This machine was probably busy (times that must be equal differ by up to " in out


@pytest.mark.long
def test_a_killed_run_resumes(model_directory, tmp_path, monkeypatch, capsys):
    """Killed in the second prompt's second cell, with half a line behind it."""
    output, prompts = tmp_path / "output", tmp_path / "prompts.jsonl"
    rows = [{"prompt": "Hello, "}, {"text": 1}, {"prompt": "<b>"}, {"prompt": "x" * 600}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    grid = ("--exit-layers", 1, 3, "--num-draft-tokens", 2)
    options = ("--output", output, *grid, "--prompt-file", prompts, "--bad-rows", "skip")
    written, write = [], Lines.write

    def killed(self, line):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(line)
        write(self, line)

    with monkeypatch.context() as patch:
        patch.setattr(Lines, "write", killed)
        with pytest.raises(SystemExit) as stop:
            run(model_directory, *options)
    assert stop.value.code == 130
    errors = capsys.readouterr().err
    assert "prompts.jsonl, line 2 has no field 'prompt', it has text" in errors
    assert "prompts.jsonl, line 4: a prompt of 600 tokens and 16 new ones do not fit" in errors
    with (output / "answers.jsonl").open("a") as file:
        file.write('{"strategy": "auto')
    assert not (output / "cells.jsonl").exists()

    assert run(model_directory, *options) == 0
    printed = capsys.readouterr()
    assert "5 of 6 answers are already stored" in printed.err
    answers = read(output / "answers.jsonl")[1:]
    # The last cell has autoregressive decoding beside it once more.
    order = [(1, None), (1, 1), (1, 3), (3, None), (3, 1), (3, None), (3, 3)]
    assert [(row["id"], row["exit_layer"]) for row in answers] == [
        *((f"prompts.jsonl:{n}", exit_layer) for n, exit_layer in order),
    ]
    assert answers[-1]["base_seconds"] == answers[-2]["decode_seconds"]
    found = read(output / "cells.jsonl")
    assert [(row["exit_layer"], row["num_draft_tokens"]) for row in found] == [
        *((None, None), (1, 2), (3, 2)),
    ]
    assert "2 prompts of 3 to 7 tokens, 16 new tokens, 1 repeat" in printed.out
    assert (output / "benchmark.png").read_bytes().startswith(b"\x89PNG")

    # With everything there nothing is decoded; a larger grid resumes too.
    before = (output / "answers.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.delattr(Engine, "generate")
        assert run(model_directory, *options) == 0
    assert (output / "answers.jsonl").read_bytes() == before
    capsys.readouterr()
    assert run(model_directory, *options, "--exit-layers", 1, 2) == 0
    assert "4 of 6 answers are already stored" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        run(model_directory, *options, "--new-tokens", 13)
    assert stop.value.code == 2
    assert "new_tokens was 16 and is now 13" in capsys.readouterr().err


@pytest.mark.long
def test_every_size_of_the_cache_is_warmed_up(model_directory, tmp_path, monkeypatch):
    """Before anything is timed: programs that have run before are faster."""
    prompts, order = tmp_path / "prompts.jsonl", []
    prompts.write_text("".join(json.dumps({"prompt": n * "x"}) + "\n" for n in (5, 400, 7)))
    generate = Engine.generate

    def noted(self, asked, **rest):
        order.append((self.strategy.name, len(asked[0].prompt)))
        return generate(self, asked, **rest)

    monkeypatch.setattr(Engine, "generate", noted)
    grid = ("--exit-layers", 1, "--num-draft-tokens", 2)
    assert run(model_directory, *grid, "--prompt-file", prompts) == 0
    assert sorted(order[:4]) == [
        *[("autoregressive", length) for length in (7, 400)],
        *[("self_speculative", length) for length in (7, 400)],
    ]
    assert len(order) == 4 + 6


@pytest.mark.parametrize(
    "options, words",
    [
        (("--model", "/nowhere"), "/nowhere: does not exist"),
        (("--new-tokens", 1), "--new-tokens 1 must be a whole number of at least 2"),
        (("--new-tokens", 600), "600 new ones do not fit the length of 512"),
        (("--repeats", 0), "--repeats 0 must be a whole number of at least 1"),
        (("--limit", 0), "--limit 0 must be a whole number of at least 1"),
        (("--temperature", -1), "temperature -1.0 must be a finite number from 0"),
        (("--prompt", ""), "--prompt has an empty prompt"),
        (("--prompt-file", "/nowhere.jsonl"), "no file matches /nowhere.jsonl"),
        (("--prompt-template", "{a}"), "prompt 1 of 3"),
        (("--batch-size", 2), "--batch-size must be 1 here"),
        (("--draft-vocab", 9), "--draft-vocab has no effect on autoregressive"),
        (("--draft-confidence", 0.5), "--draft-confidence has no effect on autoregressive"),
        (
            ("--exit-layers", 1, "--identity-tail", 1, "--draft-vocab", 10**12),
            "a draft vocabulary of 1000000000000 does not make the head of 258 smaller",
        ),
        (("--identity-tail", 4), "--identity-tail 4 is out of range: use a layer in 1..3"),
        (("--exit-layers", 4), "exit layer 4 is out of range: use --exit-layer 1..3"),
        (
            ("--exit-layers", 1, "--num-draft-tokens", -1),
            "num_draft_tokens -1 is out of range: use 0..512",
        ),
        (("--exit-layers", 1, "--draft-vocab", 9), "needs token counts"),
        (
            ("--exit-layers", 1, "--identity-tail", 1, "--draft-vocab", 258),
            "a draft vocabulary of 258 does not make the head of 258 smaller",
        ),
        (("--new-tokens", 500), "prompt 1 of 3: a prompt of 56 tokens and 500 new ones do not"),
        (("--prompt-file", "bad.jsonl"), "bad.jsonl, line 2 is not JSON"),
        (("--prompt-file", "long.jsonl"), "long.jsonl, line 1: a prompt of 600 tokens and 64 new"),
        (("--prompt-file", "bad.jsonl", "--prompt", "x"), "--prompt and --prompt-file are given"),
        (("--task", "pairs", "--prompt", "x"), "--prompt and --task are given"),
        (("--task", "pairs"), "pairs has no TensorFlow data set: name files with --data"),
        (("--data", "bad.jsonl"), "--data needs --task"),
        (("--num-shots", 2), "2 shots need rows that are not evaluated"),
        (("--chat",), "this model has no chat template"),
        (("--system", "x"), "--system needs --chat"),
        (("--output", "bad.jsonl/x"), "bad.jsonl"),
        (
            ("--rows", 8, "--strategies", "auto"),
            "--rows needs --exit-layers and --num-draft-tokens",
        ),
        (("--rows", 0), "--rows"),
    ],
)
def test_bad_input(model_directory, refused, monkeypatch, tmp_path, options, words):
    """Before the model is loaded."""
    monkeypatch.delattr("lsjax.cli.engines.load_engine")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"prom\n')
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "x" * 600}))
    assert words in refused(main, "--model", model_directory, *options)


def test_the_prompts_are_not_overwritten(model_directory, refused, monkeypatch, tmp_path):
    monkeypatch.delattr("lsjax.cli.engines.load_engine")
    file = tmp_path / "answers.jsonl"
    file.write_text('{"prompt": "a"}')
    given = ("--model", model_directory, "--prompt-file", file, "--output", tmp_path)
    assert "answers.jsonl would overwrite the prompts" in refused(main, *given)
    assert file.read_text() == '{"prompt": "a"}'


@pytest.mark.long
def test_many_rows(model_directory, tmp_path, capsys):
    """A line for each number of rows and draft length, with the figures of the file."""
    grid = ("--exit-layers", 1, "--num-draft-tokens", 2, 1)
    assert run(model_directory, "--rows", 1, 3, *grid, "--output", tmp_path) == 0
    found = read(tmp_path / "rows.jsonl")
    assert [(one["rows"], one["num_draft_tokens"]) for one in found] == [(1, 2), (1, 1)] + [
        (3, 2),
        (3, 1),
    ]
    assert all(0 < one["token_seconds"] and 0 < one["round_seconds"] for one in found)
    lines = capsys.readouterr().out.splitlines()
    for one, line in zip(found, lines[-4:], strict=True):
        tokens = one["round_seconds"] / one["token_seconds"]
        assert line.split()[:3] == [str(one["rows"]), "1", str(one["num_draft_tokens"])]
        assert line.split()[5] == f"{tokens:.2f}"
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
