"""The program that runs lm-evaluation-harness; what it says of bad input needs no lm_eval."""

import json
import sys
from pathlib import Path

import pytest

import lsjax.evaluation
from lsjax.cli import harness
from lsjax.cli.harness import figures, main, show
from lsjax.decoding.self_speculative import SelfSpeculative

TASKS = Path(__file__).parents[1] / "evaluation" / "tasks"
EARLY = ("--strategy", "early_exit")


@pytest.fixture
def no_lm_eval(monkeypatch):
    """As where the extra is not installed."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lsjax.evaluation.harness", raising=False)
    monkeypatch.delattr(lsjax.evaluation, "harness", raising=False)


@pytest.mark.parametrize(
    "options, words",
    [
        ((), "not installed: pip install 'lsjax[eval]'"),
        (("--tasks",), "--tasks names no task"),
        (("--limit", 0), "--limit 0.0 is not above 0"),
        (("--limit", -3), "--limit -3.0 is not above 0"),
        (("--system", "x"), "--system needs --chat"),
        (("--chat",), "this model has no chat template"),
        (("--gen-kwargs", "temperature"), "--gen-kwargs temperature is not like"),
        (("--task-path", "/nowhere"), "--task-path /nowhere is no directory"),
        (("--model", "/nowhere"), "/nowhere: does not exist"),
        (("--exit-layers", 2), "--exit-layer means nothing to autoregressive decoding"),
        (EARLY, "early_exit needs --exit-layer"),
        ((*EARLY, "--exit-layers", 2, 5), "exit layer 5 is not in 1..4"),
        (("--strategy", "self_speculative", "--exit-layers", 4), "exit layer 4 is not in 1..3"),
        (("--strategy",), "--strategies is empty: name one or more"),
        (("--num-draft-tokens", 4), "--num-draft-tokens means nothing to autoregressive: add"),
        (("--draft-vocab", 4), "--draft-vocab means nothing to autoregressive: add"),
        (("--batch-size", 0), "batch size 0 is below 1"),
        (("--max-length", 513), "max length 513 is not in 2..512"),
        (("--mesh.data", 5), "devices"),
        (("--json", "/nowhere/out.jsonl"), "/nowhere/out.jsonl can't be written"),
        (("--samples", "/nowhere/out.jsonl"), "/nowhere/out.jsonl can't be written"),
    ],
)
def test_bad_input(model_directory, refused, no_lm_eval, monkeypatch, options, words):
    """Before the model is loaded."""
    monkeypatch.delattr(harness, "load_engine")
    given = ("--model", model_directory) if "--model" not in options else ()
    tasks = ("--tasks", "tiny_choice") if "--tasks" not in options else ()
    assert words in refused(main, *given, *tasks, *options)


RESULTS = {
    "results": {
        "group": {"alias": "group", "acc,none": 0.5, "acc_stderr,none": "N/A"},
        "task": {
            "alias": "task",
            "sample_len": 2,
            "exact_match,strict": 0.25,
            "exact_match_stderr,strict": 0.125,
            "perplexity,none": 12345.678,
            "perplexity_stderr,none": "N/A",
        },
    },
    "n-samples": {"task": {"original": 9, "effective": 2}},
}
SAMPLES = {
    "task": [
        {
            "answered_by": [
                {
                    "strategy": "self_speculative",
                    "exit_layer": 2,
                    "drafted": 8,
                    "accepted": accepted,
                }
            ]
        }
        for accepted in (1, 5)
    ]
}


def test_rows_of_the_table():
    strategy = SelfSpeculative(2, 4)
    said = "self speculative, exit 2, 4 drafts"
    who = "self speculative, exit 2"
    assert list(figures(strategy, RESULTS, SAMPLES)) == [
        ["group", "acc", said, "-", "-", "0.5", "-", "-"],
        ["task", "exact_match, strict", said, who, "2", "0.25", "0.12", "0.375"],
        ["task", "perplexity", said, who, "2", "1.235e+04", "-", "0.375"],
    ]


def test_the_strategies_of_a_metric_stand_together(capsys):
    rows = [
        [task, "acc", strategy, "-", "1", "0", "0", "-"]
        for strategy in ("autoregressive", "early exit")
        for task in ("one", "two")
    ]
    show("title", rows)
    lines = [line.split()[:3] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[0] for line in lines] == ["one", "early", "two", "early"]


def test_tasks_run_with_every_strategy(model_directory, tmp_path, monkeypatch, capsys):
    """Three kinds of tasks; the table, the results and the samples say who answered."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("lm_eval")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(TASKS)
    files = {name: tmp_path / f"{name}.jsonl" for name in ("json", "samples")}
    options = {"--tasks": ["tiny_*"], "--task-path": [TASKS], "--limit": [2], "--batch-size": [2]}
    options |= {"--strategy": ["self_speculative", "early_exit"], "--exit-layers": [2]}
    options |= {"--num-draft-tokens": [2]} | {f"--{name}": [f] for name, f in files.items()}
    given = [str(part) for name, values in options.items() for part in (name, *values)]
    assert main(["--model", str(model_directory), *given]) == 0
    printed = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert lines[0].endswith(":smile:, float32")
    assert any(
        line.startswith("tiny_choice acc self speculative, exit 2, 2 drafts one pass of 4 layers 2")
        for line in lines
    )
    assert any(line.startswith("early exit, exit 2 early exit, exit 2 2 ") for line in lines)

    results, samples = (
        [json.loads(line) for line in file.read_text().splitlines()] for file in files.values()
    )
    who = [("self_speculative", 2), ("early_exit", 2)]
    assert [(one["strategy"], one["exit_layer"]) for one in results] == who
    assert all("acc,none" in one["results"]["tiny_choice"] for one in results)
    assert not any("samples" in one for one in results)
    assert [(one["strategy"], one["exit_layer"]) for one in samples] == [
        pair for pair in who for _ in range(3 * 2)
    ]
    for one in samples:
        kinds = {answer["strategy"] for answer in one["answered_by"]}
        decoded = one["task"] == "tiny_generation"
        assert kinds == {one["strategy"] if decoded else "forward_pass"}
