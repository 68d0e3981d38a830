"""The program that runs lm-evaluation-harness; what it says of bad input needs no lm_eval."""

import json
import sys
from pathlib import Path

import pytest

import lsjax.evaluation
from tests.programs import program

main = program("lm-eval")

TASKS = Path(__file__).parents[1] / "evaluation" / "tasks"
EARLY = ("--strategy", "early_exit")


@pytest.fixture
def no_lm_eval(monkeypatch):
    """As where the extra is not installed."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lsjax.evaluation.lm_eval", raising=False)
    monkeypatch.delattr(lsjax.evaluation, "lm_eval", raising=False)


@pytest.mark.parametrize(
    "options, words",
    [
        ((), "not installed: pip install 'lsjax[eval]'"),
        (("--tasks",), "--tasks is empty"),
        (("--limit", 0), "--limit 0.0 must be a finite number above 0"),
        (("--limit", -3), "--limit -3.0 must be a finite number above 0"),
        (("--system", "x"), "--system needs --chat"),
        (("--chat",), "this model has no chat template"),
        (("--gen-kwargs", "temperature"), "--gen-kwargs temperature must look like"),
        (("--task-path", "/nowhere"), "--task-path /nowhere is not a directory"),
        (("--model", "/nowhere"), "/nowhere: does not exist"),
        (("--exit-layers", 2), "--exit-layer has no effect on autoregressive decoding"),
        (EARLY, "early_exit needs --exit-layer"),
        ((*EARLY, "--exit-layers", 2, 5), "exit layer 5 is out of range: use --exit-layer 1..4"),
        (
            ("--strategy", "self_speculative", "--exit-layers", 4),
            "exit layer 4 is out of range: use --exit-layer 1..3",
        ),
        (("--num-draft-tokens", 4), "--num-draft-tokens has no effect on autoregressive: add"),
        (("--draft-vocab", 4), "--draft-vocab has no effect on autoregressive: add"),
        (("--batch-size", 0), "batch size 0 is below 1"),
        (("--max-length", 513), "max length 513 is out of range: use --max-length 2..512"),
        (("--mesh.data", 5), "devices"),
        (("--output", "/dev/null/out"), "/dev/null/out"),
    ],
)
def test_bad_input(model_directory, refused, no_lm_eval, monkeypatch, options, words):
    """Before the model is loaded."""
    monkeypatch.delattr("lsjax.cli.engines.load_engine")
    given = ("--model", model_directory) if "--model" not in options else ()
    tasks = ("--tasks", "tiny_choice") if "--tasks" not in options else ()
    assert words in refused(main, *given, *tasks, *options)


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # lm_eval starts git
def test_tasks_run_with_every_strategy(model_directory, tmp_path, monkeypatch, capsys):
    """Three kinds of tasks; lm_eval's tables and files."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("lm_eval")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(TASKS)
    output = tmp_path / "results"
    options = {"--tasks": ["tiny_*"], "--task-path": [TASKS], "--limit": [2], "--batch-size": [2]}
    options |= {"--strategy": ["self_speculative", "early_exit"], "--exit-layers": [2]}
    options |= {"--num-draft-tokens": [2], "--output": [output]}
    given = [str(part) for name, values in options.items() for part in (name, *values)]
    assert main(["--model", str(model_directory), *given]) == 0
    printed = capsys.readouterr().out
    assert ":smile:, float32, self speculative, exit 2, 2 drafts\n" in printed
    assert ":smile:, float32, early exit, exit 2\n" in printed
    assert printed.count("|tiny_choice") == 2
    found = [json.loads(file.read_text()) for file in output.glob("*/results_*.json")]
    assert {(one["config"]["strategy"], one["config"]["exit_layer"]) for one in found} == {
        *(("self_speculative", 2), ("early_exit", 2)),
    }
    assert all("acc,none" in one["results"]["tiny_choice"] for one in found)
    assert len(list(output.glob("*/samples_tiny_*.jsonl"))) == 2 * 3
