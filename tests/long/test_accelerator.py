"""`make accelerator` in its tiny form, on CPUs. Long: its stages train, decode and time."""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from lsjax.decoding.strategy import Autoregressive, EarlyExit

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "scripts" / "accelerator.py"
# What a machine with an accelerator may lack. Flax imports a few of them for itself, so they are
# hidden from lsjax and the scripts.
HIDING = """
import builtins
HIDDEN = set('''tyro rich orbax grain tokenizers sentencepiece safetensors tensorflow_datasets
jinja2 array_record importlib_resources gguf matplotlib tqdm'''.split())
plain = builtins.__import__

def hiding(name, globals=None, *rest, **more):
    importer = str((globals or {}).get("__name__"))
    if name.split(".")[0] in HIDDEN and importer.split(".")[0] in ("lsjax", "accelerator_stages"):
        raise ModuleNotFoundError(f"{importer} wants {name}, which is hidden")
    return plain(name, globals, *rest, **more)

builtins.__import__ = hiding
"""


def test_the_tiny_form_measures_and_writes_a_page(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HIDING)
    output = tmp_path / "results"

    def run(*words: str) -> str:
        command = [sys.executable, PROGRAM, "--output", output, "--tiny", *words]
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    said = run("--stage", "a", "b")
    assert "b 1b-off: skipped: it is for GPUs" in said
    # In one process, and two of its four parts, to save time.
    run("--stage", "c", "--part", "layerskip", "dropout-gather")
    run("--stage", "page")
    a, b, c = (json.loads((output / f"{stage}.json").read_text()) for stage in "abc")

    assert a.keys() == {"float32", "bfloat16"} and len(a["float32"]["rows"]) == 6
    for part in (*a.values(), *b.values(), *c.values()):
        assert part["platform"] == "cpu" and part["card"] and part["jax"] and "flags" in part
        assert part["rows"] and not part["errors"] and not part["left_out"]
    for row in a["float32"]["rows"]:
        assert row["texts"] == 6 and (row["widest margin"] or 0) <= 1e-4
        if "drafts" in row[""] and "identity tail" in row[""]:
            assert row["accepted"] == 1

    assert list(b) == ["1b"] and b["1b"]["settings"]["memory GB/s"] > 0.1
    for row in b["1b"]["rows"]:
        assert row["tokens/s"] > 0 and 0 < row["share of the bandwidth"] < 1
        assert row["ms a round"] > row["ms at the limit"] > 0
        if "drafts" in row[""]:
            assert row["accepted"] == 1 and row["ideal"] > 1
            assert math.isclose(row["share of the ideal"] * row["ideal"], row["speedup"])

    for part in c.values():
        (row,) = part["rows"]
        assert row["tokens/s"] > 0 and row["attention"] == "xla"
        assert row["utilisation"] is None  # CPUs have no peak in the table
        assert row["GB by the compiler"] > 0 and math.isfinite(row["loss"])

    # Results of a CPU are not the page of docs/.
    text = (output / "accelerators.md").read_text()
    assert "# Accelerators" in text and "| layerskip |" in text and a["float32"]["card"] in text
    assert text.count("This stage was not run.") == 2  # b8 and d


@dataclass(frozen=True)
class Shallow(Autoregressive):
    """Leaves out the last layer."""

    def round(self, model, state, arguments):
        return EarlyExit(model.config.num_layers - 1).round(model, state, arguments)


def test_a_wrong_token_fails_stage_a(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import accelerator
    from accelerator_stages import decoding

    monkeypatch.setattr(decoding, "strategies", lambda *_: [("shallow", Shallow(), 1)])
    asked = ["--stage", "a", "--part", "float32", "--tiny", "--output", str(tmp_path)]
    assert accelerator.main(asked) == 1
    assert "shallow: FAILED: 6 texts differ by a margin above" in capsys.readouterr().out
    part = json.loads((tmp_path / "a.json").read_text())["float32"]
    assert part["rows"][0]["widest margin"] > 1e-4
    assert part["rows"][1]["differ"] == 0  # the identity tail's last layer adds nothing


def test_a_part_that_breaks_is_one_line_and_the_next_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import accelerator
    from accelerator_stages import training

    def run_steps(part, results, tiny):
        if part == "plain":
            raise MemoryError("no room\nat all")
        results.measure(part, lambda: {"loss": 1.0})

    monkeypatch.setattr(training, "run_steps", run_steps)
    asked = ["--stage", "c", "--part", "plain", "layerskip", "--output", str(tmp_path)]
    assert accelerator.main(asked) == 1
    assert "c plain: plain: FAILED: MemoryError: no room\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "c.json").read_text())["layerskip"]["rows"] == [
        {"": "layerskip", "loss": 1.0}
    ]
    # Time that is over leaves measurements out.
    assert accelerator.main([*asked[:3], "layerskip", *asked[5:], "--minutes", "0"]) == 0
    assert json.loads((tmp_path / "c.json").read_text())["layerskip"]["left_out"] == ["layerskip"]


def test_a_process_that_is_too_slow_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import accelerator

    assert accelerator.main(["--stage", "d", "--minutes", "0", "--output", str(tmp_path)]) == 1
    assert "d quickstart: quickstart: FAILED: no result within 0 minutes" in capsys.readouterr().out
    assert json.loads((tmp_path / "d.json").read_text())["quickstart"]["errors"]


def test_no_results_and_no_such_part(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import accelerator

    asked = ["--stage", "page", "--output", str(tmp_path)]
    assert accelerator.main(asked) == 1
    assert "has no results: run the stages first" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        accelerator.main(["--stage", "c", "--part", "float32"])
    assert "stage c has no part float32: use plain, layerskip" in capsys.readouterr().err
