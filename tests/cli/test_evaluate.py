"""The program that answers tasks: every strategy, going on after a kill, bad rows."""

import json

import pytest

from lsjax.cli import evaluate
from lsjax.cli.evaluate import main
from lsjax.evaluation.results import read

ROWS = ["en_query\ten_parse\tdomain"] + [
    f"{text}\t[IN:GET_{domain.upper()} {text} ]\t{domain}"
    for text, domain in [
        ("will it rain", "weather"),
        ("set alarm", "alarm"),
        ("is it cold", "weather"),
        ("wake me", "alarm"),
        ("any snow", "weather"),
    ]
]
EVERY = (
    *("--strategies", "autoregressive", "early_exit", "self_speculative"),
    *("--exit-layers", 2, 3, "--num-draft-tokens", 3),
)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch):
    monkeypatch.setattr(evaluate, "keep_compiled_programs", lambda: None)


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("topv2") / "test.tsv"
    file.write_text("\n".join(ROWS) + "\n")
    return file


@pytest.fixture
def run(model_directory, rows, tmp_path):
    """Runs the program on the rows; the answers of the file that it writes."""

    def evaluate(*options, output="out.jsonl"):
        argv = ["--model", model_directory, "--task", "topv2", "--max-new-tokens", 12]
        argv += ["--output", tmp_path / output]
        argv += [] if "--data" in options else ["--data", rows]
        assert main([str(word) for word in (*argv, *options)]) == 0
        return read(tmp_path / output)[1]

    return evaluate


def untimed(answers):
    """What must be the same again, in one order."""
    timed = ("seconds", "prefill_seconds")
    rows = [{k: v for k, v in answer.items() if k not in timed} for answer in answers]
    return sorted(rows, key=lambda row: (row["strategy"], row["id"], row["sample"]))


def test_every_strategy_answers_every_row(run, rows, tmp_path, capsys):
    (tmp_path / "train.tsv").write_text("\n".join([*ROWS[:2], "set alarm\tx\talarm"]))
    answers = run(*EVERY, "--without-seen", tmp_path / "train.tsv", "--limit", 4, "--offset", 1)
    names = {
        "autoregressive",
        *(f"early exit, exit {e}" for e in (2, 3)),
        *(f"self speculative, exit {e}, 3 drafts" for e in (2, 3)),
    }
    by_strategy = {name: [a for a in answers if a["strategy"] == name] for name in names}
    assert len(answers) == 5 * 4
    for own in by_strategy.values():
        assert [a["id"] for a in own] == [f"test.tsv:{n}" for n in (3, 4, 5, 6)]
        assert [a["group"] for a in own] == ["alarm", "weather", "alarm", "weather"]
        assert [a["seen"] for a in own] == [True, False, False, False]
        assert own[0]["reference"] == "[IN:GET_ALARM set alarm ]"
    texts = {name: [a["text"] for a in own] for name, own in by_strategy.items()}
    for exit_layer in (2, 3):
        assert texts[f"self speculative, exit {exit_layer}, 3 drafts"] == texts["autoregressive"]
        assert texts[f"early exit, exit {exit_layer}"] != texts["autoregressive"]

    summary = json.loads((tmp_path / "out.summary.json").read_text())
    assert summary["asked"]["prompt_template"] == "{en_query}\n"
    figures = {(row["strategy"], row["group"]): row for row in summary["figures"]}
    assert len(figures) == 5 * 4  # all, not seen, two domains
    assert figures["autoregressive", "not seen in training"]["examples"] == 3
    own = by_strategy["self speculative, exit 3, 3 drafts"]
    row = figures["self speculative, exit 3, 3 drafts", "all"]
    assert row["acceptance_rate"] == sum(a["accepted"] for a in own) / sum(
        a["drafted"] for a in own
    )
    later = sum(a["num_new_tokens"] - 1 for a in own)
    assert row["tokens_per_second"] == pytest.approx(later / sum(a["seconds"] for a in own))
    printed = capsys.readouterr().out
    assert "self speculative, exit 3, 3 drafts" in printed and "exact_match" in printed
    assert "weather" not in printed


def test_a_killed_run_goes_on(run, rows, tmp_path, monkeypatch):
    whole = run(*EVERY, "--batch-size", 2, output="whole.jsonl")
    add, count = evaluate.append, 0

    def killed(file, answer):
        nonlocal count
        count += 1
        if count == 8:
            with file.open("a") as stream:
                stream.write('{"strategy": "autoreg')
            raise KeyboardInterrupt
        add(file, answer)

    monkeypatch.setattr(evaluate, "append", killed)
    with pytest.raises(SystemExit) as exit_:
        run(*EVERY, "--batch-size", 2)
    assert exit_.value.code == 130
    before = (tmp_path / "out.jsonl").read_text().splitlines()
    assert len(before) == 1 + 7 + 1
    monkeypatch.setattr(evaluate, "append", add)
    answers = run(*EVERY, "--batch-size", 2)
    assert (tmp_path / "out.jsonl").read_text().splitlines()[:8] == before[:8]
    assert untimed(answers) == untimed(whole)
    again = (tmp_path / "out.jsonl").read_bytes()
    run(*EVERY, "--batch-size", 2)  # nothing is left to do
    assert (tmp_path / "out.jsonl").read_bytes() == again


def test_other_questions_are_not_mixed_in(run, rows, tmp_path, refused, model_directory, capsys):
    run("--limit", 1)
    capsys.readouterr()
    words = ("--model", model_directory, "--task", "topv2", "--max-new-tokens", 12)
    words += ("--output", tmp_path / "out.jsonl", "--data", rows)
    assert "questions was 1 and is now 2" in refused(main, *words, "--limit", 2)


def test_bad_rows(run, rows, tmp_path, refused, model_directory, capsys):
    bad = tmp_path / "bad.tsv"
    lines = ROWS[:2] + ["no tabs", *ROWS[2:3], "\t[IN:X ]\talarm", "x" * 600 + "\ty\talarm"]
    bad.write_text("\n".join([*lines, *ROWS[3:5]]) + "\n")
    words = ("--model", model_directory, "--task", "topv2", "--output", tmp_path / "out.jsonl")
    assert f"{bad}, line 3 has 1 columns" in refused(main, *words, "--data", bad)
    answers = run("--data", bad, "--bad-rows", "skip", "--limit", 3)
    assert [answer["id"] for answer in answers] == [f"bad.tsv:{n}" for n in (2, 4, 7)]
    summary = json.loads((tmp_path / "out.summary.json").read_text())
    problems = "\n".join(summary["bad_rows"])
    assert len(summary["bad_rows"]) == 3
    assert "line 5 has an empty prompt" in problems
    assert "line 6: a prompt of 601 tokens and 12 new ones do not fit" in problems
    assert f"skipped: {bad}, line 3 has 1 columns" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--limit", 0), "--limit 0 is below 1"),
        (("--offset", 9), "no examples behind the first 9"),
        (("--num-samples", 2), "--num-samples means nothing to greedy decoding"),
        (("--num-shots", 1), "1 shots need rows that are not asked"),
        (("--data", "/nowhere.tsv"), "no file matches /nowhere.tsv"),
        (("--strategies", "early_exit"), "early_exit needs --exit-layers"),
        (("--num-draft-tokens", 2), "--num-draft-tokens needs --strategies self_speculative"),
        (("--prompt-template", "{query}"), "line 2 has no field 'query'"),
        (("--output", "/nowhere/out.jsonl"), "/nowhere/out.jsonl can't be written"),
        (("--output", "out.json"), "--output out.json is no .jsonl"),
        (("--system", "x"), "--system needs --chat"),
    ],
)
def test_bad_input(model_directory, rows, tmp_path, refused, monkeypatch, options, words):
    """Before the model is loaded."""
    monkeypatch.delattr(evaluate, "load_shown")
    given = ["--model", model_directory, "--task", "topv2"]
    given += [] if "--data" in options else ["--data", rows]
    given += [] if "--output" in options else ["--output", tmp_path / "out.jsonl"]
    assert words in refused(main, *given, *options)
