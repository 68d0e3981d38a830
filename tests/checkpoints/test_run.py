"""A training run's directory as a model: loading, decoding, converting, and what is refused."""

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsjax
from lsjax.checkpoints.run import METRICS, begin_run, is_run, read_run_config
from lsjax.checkpoints.saving import Checkpoints
from lsjax.checkpoints.tensors import CheckpointError
from lsjax.cli import engines
from lsjax.cli.flags.shared import ModelFlags
from lsjax.config import ConfigError, LlamaConfig, TrainConfig
from lsjax.data.token_counts import COUNTS, find_counts
from lsjax.data.tokenizer_backends import ByteTokenizer
from lsjax.decoding.cost import best_exit
from lsjax.training.step import init_state
from tests.programs import program

CONFIG = TrainConfig(num_steps=9, batch_size=2, seq_len=8, model=LlamaConfig.tiny())


@pytest.fixture(scope="module")
def made(model, tokenizer, tmp_path_factory):
    """A run with steps 3, 6 and 9, the second of which is the best; and the model of each."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    begin_run(directory, CONFIG, tokenizer)
    models, losses = {}, {3: 2.0, 6: 1.0, 9: 1.5}
    config = dataclasses.replace(CONFIG.checkpoints, keep_last=3)
    with Checkpoints(directory / "checkpoints", config) as checkpoints:
        for step in losses:
            models[step] = jax.tree.map(lambda leaf, step=step: leaf + (9 - step), model)
            state = init_state(CONFIG, models[step])
            checkpoints.save(state, step=step, data={})
    rows = [
        {"kind": "evaluation", "step": step, "last_exit_loss": loss}
        for step, loss in (losses | {7: 0.5, 8: None}).items()  # 7 was not saved, 8 was infinite
    ]
    (directory / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory, models


@pytest.fixture
def run(made, tmp_path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(made[0], tmp_path / "run"))


def equal(one, other) -> bool:
    return jax.tree.structure(one) == jax.tree.structure(other) and all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


def test_a_run_is_the_model_of_its_newest_step(made, tokenizer):
    directory, models = made
    assert is_run(directory) and read_run_config(directory) == CONFIG
    assert equal(lsjax.load(directory), models[9])
    assert lsjax.load_tokenizer(directory).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("name, step", [("3", 3), ("6", 6), ("best", 6)])
def test_one_of_its_steps(made, name, step, tokenizer):
    directory, models = made
    path = f"{directory}@{name}"
    assert equal(lsjax.load(path), models[step])
    assert lsjax.load_tokenizer(path).fingerprint == tokenizer.fingerprint
    assert lsjax.read_generation_defaults(path) == lsjax.GenerationDefaults()


def test_in_another_dtype(made):
    loaded = lsjax.load(made[0], dtype=jnp.bfloat16)
    assert equal(loaded, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), made[1][9]))
    with pytest.raises(CheckpointError, match="has no step 999: choose from 3, 6, 9"):
        lsjax.load(f"{made[0]}@999")


def test_a_damaged_step_is_reported_and_the_one_before_is_loaded(run, made, caplog):
    shutil.rmtree(run / "checkpoints" / "9" / "params")
    with caplog.at_level(logging.WARNING):
        assert equal(lsjax.load(run), made[1][6])
    (record,) = [record for record in caplog.records if record.name.startswith("lsjax")]
    assert record.getMessage().startswith("step 9 is damaged and skipped: ")
    with pytest.raises(
        CheckpointError, match="none of the 1 saved steps can be read; .*/params: c"
    ):
        lsjax.load(f"{run}@9")
    (run / "checkpoints" / "6" / "meta" / "metadata").write_text("{}")
    assert equal(lsjax.load(f"{run}@best"), made[1][3])


def test_too_large_for_the_dtype(run, tokenizer, model):
    state = init_state(CONFIG, jax.tree.map(lambda leaf: leaf * 0 + 1e5, model))
    with Checkpoints(run / "checkpoints", CONFIG.checkpoints) as checkpoints:
        checkpoints.save(state, step=12, data={})
    assert lsjax.load(run, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    with pytest.raises(CheckpointError, match=r"12/params: \S+ has values .* large for float16"):
        lsjax.load(run, dtype=jnp.float16)


def test_decode_and_convert(made, run, tmp_path, capsys, monkeypatch):
    """Through a run and through what is exported of it: the same text."""
    monkeypatch.setattr(engines, "keep_compiled_programs", lambda: None)
    exported = tmp_path / "exported"
    assert program("convert")([str(run), str(exported)]) == 0
    assert equal(lsjax.load(exported), made[1][9])
    found = []
    for path in (run, exported):
        lines = tmp_path / "lines.jsonl"
        argv = ["--model", path, "--prompt", "ab", "--max-new-tokens", "8", "--json", lines]
        assert program("decode")(list(map(str, argv))) == 0
        found.append(json.loads(lines.read_text())["token_ids"])
    assert found[0] == found[1] and len(found[0]) == 8
    capsys.readouterr()


def test_what_an_exported_run_says_of_itself(made, run, tokenizer, tmp_path, capsys):
    """Exits and counts for decoding, a card for people, and files that all may read."""
    figures = [(3, [0.9, 0.0, 0.0, 1.0]), (6, [0.1, 0.9, 0.95, 1.0])]
    with (run / METRICS).open("a") as file:
        for step, agreement_E in figures:
            row = {"kind": "evaluation", "step": step, "tokens": 1234}
            row |= {"loss_E": [3.25, 2.5, 2.25, None], "agreement_E": agreement_E}
            file.write(json.dumps(row) + "\n")
    counts = {"tokenizer": tokenizer.fingerprint, "total": 3, "counts": {"97": 2, "98": 1}}
    (run / COUNTS).write_text(json.dumps(counts))
    change_config(run, init_from="/home/somebody/models/base", layer_dropout={"p_max": 0.25})
    recipe = {"optimizer": {"name": "lion", "sha256": "ab" * 9}}
    (run / "recipe.json").write_text(json.dumps(recipe))
    before, exits = os.umask(0o027), {}
    try:
        for name in ("run", "run@3"):
            exported = tmp_path / f"of-{name}"
            assert program("convert")([f"{tmp_path / name}", f"{exported}"]) == 0
            exits[name] = lsjax.read_generation_defaults(exported).exit_layer
    finally:
        os.umask(before)
    assert exits == {"run": 2, "run@3": 1}  # of the last evaluation up to the exported step
    exported = tmp_path / "of-run"
    assert find_counts(exported, tmp_path, tokenizer) == {97: 2, 98: 1}
    modes = {file.name: file.stat().st_mode & 0o777 for file in exported.iterdir()}
    assert set(modes.values()) == {0o640} and exported.stat().st_mode & 0o777 == 0o750
    card, best = (exported / "README.md").read_text(), best_exit(CONFIG.model, figures[1][1])
    for words in (
        "trained from the weights of base by lsjax\n",
        "tags: [layerskip, lsjax]",
        "Step 9 of 9, each of 2 rows of 8 tokens.",
        "| layer_dropout.p_max | 0.25 |",
        "| optimizer | lion (sha256 abababababab) |",
        "On 1,234 held-out tokens, at step 6.",
        "| 2 | 2.500 | 0.900 |",
        "| 4 | infinite | 1.000 |",
        f"generate(**inputs, assistant_early_exit=2, num_assistant_tokens={best[1]})",
        "For batches pass `assistant_early_exit=None`.",
    ):
        assert words in card
    assert "somebody" not in card
    opened = engines.open_model(ModelFlags(model=exported))
    assert 2 in engines.trained_exits(opened)
    for path in (run, exported):  # auto begins with what the evaluation found
        opened = engines.open_model(ModelFlags(model=path))
        assert engines.measured_agreement(opened, (2, 3)) == (0.9, 0.95)
    capsys.readouterr()


def test_the_card_of_a_run_whose_newest_step_is_damaged(run, tmp_path, capsys):
    """It names the step that was read."""
    shutil.rmtree(run / "checkpoints" / "9" / "params")
    assert program("convert")([str(run), str(tmp_path / "exported")]) == 0
    assert "Step 6 of 9, each of" in (tmp_path / "exported" / "README.md").read_text()
    capsys.readouterr()


def test_a_run_without_a_useful_exit_exports_none(run, tmp_path, capsys):
    """Whatever the model said that it began with."""
    row = {"kind": "evaluation", "step": 9, "tokens": 5, "loss_E": [2.0] * 4}
    (run / METRICS).write_text(json.dumps(row | {"agreement_E": [0, 0, 0, 1]}) + "\n")
    (run / "generation_config.json").write_text('{"assistant_early_exit": 2}')
    recipe = {"optimizer": {"name": "lion", "sha256": "ab" * 9}}  # which is no LayerSkip
    (run / "recipe.json").write_text(json.dumps(recipe))
    assert program("convert")([str(run), str(tmp_path / "exported")]) == 0
    found = lsjax.read_generation_defaults(tmp_path / "exported")
    assert found == lsjax.GenerationDefaults(agreement_E=(0.0, 0.0, 0.0, 1.0))
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "do_sample=False" in card and "trained from random weights by lsjax" in card
    assert "trained without layer dropout and early exits" in card and "batches" not in card
    capsys.readouterr()


def test_counts_of_tokens_in_a_run(run, tokenizer, tmp_path):
    counts = {"tokenizer": tokenizer.fingerprint, "total": 3, "counts": {"97": 2, "98": 1}}
    (run / COUNTS).write_text(json.dumps(counts))
    for path in (run, Path(f"{run}@best")):
        assert find_counts(path, tmp_path, tokenizer) == {97: 2, 98: 1}


def test_loading_imports_no_training_loop(made):
    program = (
        "import sys, lsjax\n"
        "lsjax.load(sys.argv[1])\n"
        "assert not {'grain', 'lsjax.training.run'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program, made[0]], check=True, cwd=Path.cwd())


def change_config(run: Path, **changes) -> None:
    file = run / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"version": 99},
            "config.json: version is 99, but this lsjax reads 3: convert the run with",
        ),
        ({"model": None}, "config.json: model: None must be an object, as a LlamaConfig is"),
        ({"model": {"num_layers": 3}}, "config.json: model: vocab_size is missing: LlamaConfig"),
    ],
)
def test_a_config_that_is_none(run, changes, message):
    change_config(run, **changes)
    with pytest.raises(ConfigError, match=message):
        lsjax.load(run)


def test_a_config_of_another_model(run):
    change_config(run, model=dataclasses.asdict(LlamaConfig.tiny(num_layers=3)))
    with pytest.raises(CheckpointError, match=r"is float32\[4, .*, but the config expects .*\[3"):
        lsjax.load(run)
    change_config(run, model=dataclasses.asdict(LlamaConfig.tiny(tie_embeddings=True)))
    with pytest.raises(CheckpointError, match="params: head is .* config expects no such array"):
        lsjax.load(run)


def test_without_steps(tmp_path, tokenizer):
    begin_run(tmp_path, CONFIG, tokenizer)
    with pytest.raises(CheckpointError, match="has no saved step yet"):
        lsjax.load(tmp_path)
    with pytest.raises(ConfigError, match="'last' is not a step of .*: write a number, or best"):
        lsjax.load(f"{tmp_path}@last")


def test_what_a_run_begins_with(tmp_path, tokenizer, model):
    for size, words in ((190, "table has 190"), (600, "vocabulary is 600")):
        config = dataclasses.replace(CONFIG, model=LlamaConfig.tiny(vocab_size=size))
        with pytest.raises(ValueError, match=f"has 258 tokens, but the model's {words}"):
            begin_run(tmp_path / "new", config, tokenizer)
    assert not (tmp_path / "new").exists()
    lsjax.save(model, tmp_path / "other", tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="other holds another model: choose a new one"):
        begin_run(tmp_path / "other", CONFIG, tokenizer)
    assert equal(lsjax.load(tmp_path / "other"), model)


def test_going_on_from_a_model_needs_its_tokenizer(run, tmp_path, tokenizer, monkeypatch):
    config = dataclasses.replace(CONFIG, init_from=f"{run}@6")
    begin_run(tmp_path / "same", config, tokenizer)
    assert read_run_config(tmp_path / "same") == config
    other = ByteTokenizer(add_bos=False)
    monkeypatch.setattr(other, "_pieces", {**other._pieces, 97: b"b"})
    with pytest.raises(ConfigError, match="run was begun with another tokenizer than data.token"):
        begin_run(run, CONFIG, other)
    assert lsjax.load_tokenizer(run).fingerprint == tokenizer.fingerprint
    (run / "tokenizer.json").write_text("{")  # cut off by a kill
    begin_run(run, CONFIG, tokenizer)
    assert lsjax.load_tokenizer(run).fingerprint == tokenizer.fingerprint
    with pytest.raises(ConfigError, match="data.tokenizer is not the one of .*run@6, whose table"):
        begin_run(tmp_path / "another", config, other)
