"""docs/tutorial.md, block by block. Long: it trains a model of eight layers for five steps."""

import re
from pathlib import Path

import matplotlib

import lsjax

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"


def test_the_tutorial(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LSJAX_CACHE", str(tmp_path / "cache"))
    matplotlib.use("Agg")
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
    for long, short in (("num_steps=400", "num_steps=5"), ("every=200", "every=5")):
        assert long in code
        code = code.replace(long, short)
    names: dict = {}
    exec(code, names)
    assert isinstance(names["model"], lsjax.Llama) and names["agreement"].shape == (8,)
    assert float(names["agreement"][-1]) == 1
    assert names["done"].drafted > 0
    assert (tmp_path / "runs" / "tutorial" / "agreement.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "exit 8 agrees with the last one at 100%" in printed and "tokens a round" in printed
