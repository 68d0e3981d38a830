"""docs/tutorial.md as a notebook. Long: a kernel trains a model of eight layers for five steps."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tutorial.ipynb"
# Of Jupyter's own.
pytestmark = pytest.mark.filterwarnings("default")


def test_the_tutorial(tmp_path, monkeypatch):
    """Each cell runs. Training shows its progress, exits and pictures in the notebook."""
    monkeypatch.setenv("LSJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    text = NOTEBOOK.read_text()
    for long, short in (("num_steps=400", "num_steps=5"), ("every=200", "every=5")):
        assert long in text
        text = text.replace(long, short)
    notebook = nbformat.reads(text, as_version=4)
    checks = (
        "assert isinstance(model, lsjax.Llama) and agreement.shape == (8,)",
        "assert float(agreement[-1]) == 1 and done.drafted > 0",
    )
    notebook.cells.append(nbformat.v4.new_code_cell("\n".join(checks)))
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    assert (tmp_path / "runs" / "tutorial" / "agreement.png").stat().st_size > 1000
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    shown = [output.get("data", {}) for output in outputs]
    assert sum("image/png" in data for data in shown) >= 2  # of exits and training
    assert "step 5/5" in nbformat.writes(notebook)  # of the progress bar, which is a widget
    printed = re.sub(r"<[^>]*>", "", "".join(str(output) for output in outputs))
    assert "held-out tokens" in printed
    assert "exit 8 agrees with the last one at 100%" in printed and "tokens a round" in printed
