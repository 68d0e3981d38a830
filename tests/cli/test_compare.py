"""The program that compares two files of results."""

import json

import pytest

from lsjax.cli.compare import main
from lsjax.evaluation.results import append, resume


@pytest.fixture
def results(tmp_path):
    """Writes a file of results: the scores of each strategy's examples, and seconds of each."""

    def write(name, strategies):
        file = tmp_path / name
        resume(file, {"task": "topv2"})
        for strategy, (scores, seconds) in strategies.items():
            for number, value in enumerate(scores):
                append(
                    file,
                    {
                        **{"strategy": strategy, "id": f"row:{number}", "sample": 0},
                        **{"seen": number == 0, "reference": "r", "rounds": 5, "drafted": 0},
                        **{"accepted": 0, "prefill_seconds": 1.0, "num_new_tokens": 11},
                        **{"seconds": seconds, "scores": scored(value)},
                    },
                )
        return file

    return write


def scored(value):
    """The scores of one text."""
    return value if isinstance(value, dict) else {"exact_match": value}


@pytest.mark.parametrize(
    "scores, names",
    [
        # HumanEval, whose `passed` is shown as pass@k.
        ([{"passed": 1.0, "rouge2": 0.5}, {"passed": 0.0, "rouge2": 0.5}], ["pass@1", "rouge2"]),
        # Spec-Bench, whose kinds of question have scores of their own, or none.
        ([{}, {"accuracy": 1.0}, {"rouge2": 0.5}], ["accuracy", "rouge2"]),
    ],
)
def test_scores_that_not_every_answer_has_in_this_form(results, tmp_path, scores, names):
    file = results("a.jsonl", {name: (scores, 1.0) for name in ("autoregressive", "early exit")})
    assert main([str(file), str(file), "--json", str(tmp_path / "out.json")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.json").read_text().splitlines()]
    assert [(row["score"], row["difference"]) for row in rows] == [(name, 0.0) for name in names]


def test_every_strategy_against_the_baseline(results, tmp_path, capsys):
    first = results("plain.jsonl", {"autoregressive": ([1, 1, 1, 0], 1.0)})
    second = results(
        "layerskip.jsonl",
        {"autoregressive": ([1, 1, 0, 0], 1.0), "early exit, exit 8": ([0, 0, 0, 0], 0.25)},
    )
    assert main([str(first), str(second), "--json", str(tmp_path / "out.json")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.json").read_text().splitlines()]
    assert [(row["strategy"], row["difference"], row["speedup"]) for row in rows] == [
        ("autoregressive", -0.25, 1.0),
        ("early exit, exit 8", -0.75, 4.0),
    ]
    # -1 with a chance of 1/4 in each of four draws: no more than three of them, 99.6% of the time.
    assert (rows[0]["low"], rows[0]["high"]) == (-0.75, 0)
    printed = capsys.readouterr().out
    assert "-0.2500" in printed and "-0.7500 to +0.0000" in printed

    assert main([str(second), str(second), "--unseen", "--json", str(tmp_path / "out.json")]) == 0
    (row,) = [json.loads(line) for line in (tmp_path / "out.json").read_text().splitlines()]
    assert (row["strategy"], row["examples"]) == ("early exit, exit 8", 3)


def test_bad_input(results, tmp_path, refused):
    file = results("a.jsonl", {"autoregressive": ([1], 1.0)})
    (tmp_path / "b.jsonl").write_text("notes\n")
    assert "b.jsonl, line 1 is no line of results" in refused(main, file, tmp_path / "b.jsonl")
    resume(tmp_path / "sweep.jsonl", {"model": "a sweep's"})
    assert "sweep.jsonl holds no answers to a task" in refused(main, tmp_path / "sweep.jsonl", file)
    none = results("none.jsonl", {"x": ([{}], 1.0)})
    assert "x and autoregressive have no score in common" in refused(main, file, none)
    words = "is no strategy of " + str(file) + ": choose one of autoregressive"
    assert words in refused(main, file, file, "--baseline", "early exit, exit 3")
    assert "no example has the score rouge2" in refused(
        main, file, results("c.jsonl", {"x": ([1], 1.0)}), "--scores", "rouge2"
    )
