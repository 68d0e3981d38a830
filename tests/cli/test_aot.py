"""The program that compiles for TPUs: what it refuses, and a report where libtpu is there."""

import importlib.util
import json
from pathlib import Path

import jax
import pytest

from lsjax.aot import chips
from lsjax.cli.aot import main

CONFIGS = Path(__file__).parents[2] / "configs"
QUICKSTART = ("--config", CONFIGS / "quickstart.py")
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the tpu extra"
)


def test_missing_arguments(refused):
    assert "--config is missing" in refused(main)
    assert "--topology is missing: name a slice such as v5p:4x4x4" in refused(main, *QUICKSTART)


def test_unknown_chips(refused):
    words = refused(main, *QUICKSTART, "--topology", "v9:2x2")
    assert "'v9:2x2' is none of v5e, v5p, v6e" in words


def test_without_libtpu(refused, monkeypatch):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    words = refused(main, *QUICKSTART, "--topology", "v5e:2x2")
    assert "pip install 'lsjax[tpu]'" in words


@needs_libtpu
@pytest.mark.parametrize(
    "flags, words",
    [
        (("--topology", "v5e:3x5"), "'v5e:3x5' is no slice"),
        (("--topology", "v5e:2x2", "--mesh.tensor", "5"), "needs 5 devices, but there are 4"),
        (
            ("--topology", "v5e:2x2", "--mesh.data", "4", "--batch-size", "6"),
            "6 rows (batch_size / micro_batches) can't be shared out among 4 devices",
        ),
        (
            ("--topology", "v5e:2x2", "--decoding.prompt-tokens", "9999"),
            "beyond the model's context",
        ),
    ],
)
def test_what_does_not_fit(refused, flags, words):
    assert words in refused(main, *QUICKSTART, *flags)


@needs_libtpu
def test_a_report_of_a_small_model(tmp_path, capsys):
    """The quickstart's model, cut to two layers, on four chips: what is there, and that devices
    gather each layer's weights once forward and once backward."""
    file = tmp_path / "report.json"
    flags = ["--mesh.data", "2", "--mesh.fsdp", "2", "--model.num-layers", "2"]
    topology = ["--topology", "v5e:2x2", "--programs", "train", "--output", str(file)]
    # As in the program: Mosaic refuses exact products, which the tests ask for, of bfloat16.
    with jax.default_matmul_precision("default"):
        assert main([*map(str, QUICKSTART), *topology, *flags]) == 0
    assert "per device" in capsys.readouterr().out
    found = json.loads(file.read_text())
    (train,) = found["programs"]
    assert found["meshes"] == {"train": {"data": 2, "fsdp": 2, "tensor": 1}}
    assert train["too_large"] is None and train["unknown_loops"] == []
    assert 0 < train["memory"]["total"] < train["memory"]["hbm"]
    assert train["cycles"] > 0 and train["seconds"] > 0
    gathers = [one for one in train["collectives"] if one["kind"] == "all-gather"]
    assert any("fsdp" in one["axes"] and one["count"] == 2 for one in gathers)
