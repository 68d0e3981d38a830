"""Tokens made ahead of training, on several hosts one after the other."""

import json
from pathlib import Path

import pytest

from lsjax.data import pieces as pieces_module
from lsjax.data.token_rows import INDEX
from tests.programs import program

main = program("tokenize")

ROOT = Path(__file__).parents[2]

CONFIG = """
from lsjax.config import DataConfig, LlamaConfig, TrainConfig

config = TrainConfig(
    model=LlamaConfig.tiny(),
    data=DataConfig(source="jsonl", paths=("many.jsonl",), tokenizer="bytes"),
    num_steps=2, batch_size=2, seq_len=32,
)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A configuration with data of several shards."""
    monkeypatch.setattr(pieces_module, "SMALLEST_PIECE", 300)
    monkeypatch.setattr(pieces_module, "MANY_PIECES", 1 << 40)
    monkeypatch.setenv("LSJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"{n} " + "word " * (n % 11)} for n in range(90)]
    (tmp_path / "many.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "config.py").write_text(CONFIG)
    return tmp_path


def test_the_last_part_joins_the_shards(folder, capsys):
    for part in ("2/3", "3/3", "1/3"):
        assert main(["--config", "config.py", "--shard", part, "--workers", "1"]) == 0
        out = capsys.readouterr().out
        assert ("shards are missing: run the other parts" in out) == (part != "1/3")
    assert "train: " in out and "validation: " in out and "rows of 32" in out
    (store,) = (folder / "cache" / "tokens").iterdir()
    before = {file.name: file.read_bytes() for file in store.iterdir()}
    assert INDEX in before
    assert main(["--config", "config.py"]) == 0
    assert before == {file.name: file.read_bytes() for file in store.iterdir()}


@pytest.mark.parametrize("part", ["0/3", "4/3", "x", "1"])
def test_impossible_parts_are_one_line(folder, capsys, part):
    with pytest.raises(SystemExit) as end:
        main(["--config", "config.py", "--shard", part])
    assert end.value.code == 2
    assert f"--shard {part} must be i/n with 1 <= i <= n" in capsys.readouterr().err
