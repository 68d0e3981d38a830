"""Runs of exit blocks: what they save, how they resume, and the models that they decode with.

Long: trainings, and programs of decoding that no other test compiles.
"""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

import lsjax
from lsjax.checkpoints.exit_blocks import check_base
from lsjax.checkpoints.run import held_out_losses, read_metrics
from lsjax.checkpoints.steps import saved_steps
from lsjax.model.exit_blocks import without_exit_blocks
from lsjax.model.parameters import named_leaves
from tests.programs import program

SHAPE = lsjax.LlamaConfig.tiny(num_layers=3, hidden_size=32, intermediate_size=32, head_dim=8)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LSJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A base, another model of the same shape, text, and a finished run."""
    root = tmp_path_factory.mktemp("blocks")
    for seed, name in enumerate(("base", "other")):
        model = jax.jit(lambda seed=seed: lsjax.Llama(SHAPE, rngs=nnx.Rngs(seed)))()
        lsjax.save(model, root / name, tokenizer=tokenizer)
    numbers = np.random.default_rng(0).integers(0, 1000, (40, 8))
    (root / "text.txt").write_text("\n\n".join(" ".join(map(str, line)) for line in numbers))
    assert train(root, root / "run") == 0
    return root


def train(root, workdir, *flags, base="base"):
    given = ["--config", "configs/exit_blocks.py", "--workdir", str(workdir)]
    base = root / base
    given += ["--init-from", str(base), "--data.tokenizer", str(base)]
    given += ["--data.source", "text", "--data.paths", str(root / "text.txt")]
    given += ["--data.separator", "blank_line"]
    given += ["--data.text-template", "{text}"]
    given += ["--data.validation-fraction", "0.3", "--exit-blocks.exits", "1", "2"]
    given += [
        "--num-steps",
        "6",
        "--batch-size",
        "4",
        "--seq-len",
        "16",
        "--checkpoints.every",
        "2",
    ]
    given += ["--checkpoints.keep-last", "9", "--optimizer.warmup-steps", "1"]
    given += ["--evaluation.every", "3", "--evaluation.batches", "1"]
    return program("train")([*given, *flags])


def tokens(capsys, tmp_path, model, *flags):
    file = tmp_path / "out.jsonl"
    given = ["--model", str(model), "--prompt", "12", "--max-new-tokens", "24", "--json", str(file)]
    code = program("decode")([*given, *flags])
    assert code == 0, capsys.readouterr().err
    return json.loads(file.read_text())


def test_a_step_holds_the_blocks_alone(folder):
    (newest, *_) = saved_steps(folder / "run" / "checkpoints")
    saved = newest.meta["arrays"]["params"]
    assert {name.split(".")[1] for name in saved} == {"1", "2"}
    assert all(name.startswith("exit_blocks.") for name in saved)
    sizes = sum(np.prod(one["shape"]) for one in saved.values())
    assert sizes == 2 * SHAPE.layer_params


def test_the_base_is_read_bit_for_bit(folder):
    model, base = lsjax.load(folder / "run"), lsjax.load(folder / "base")
    assert sorted(model.exit_blocks) == ["1", "2"]
    own, before = named_leaves(without_exit_blocks(model)), named_leaves(base)
    assert own.keys() == before.keys()
    for name, leaf in before.items():
        np.testing.assert_array_equal(own[name], leaf)


def test_evaluations_are_of_the_blocks(folder):
    """The last exit's loss stays; the blocks' agreement is that of their drafts."""
    first, last = (row for row in read_metrics(folder / "run") if row["kind"] == "evaluation")
    assert first["last_exit_loss"] == last["last_exit_loss"]
    assert first["loss_E"][0] != last["loss_E"][0]
    assert (folder / "run" / "exits.png").exists()


@pytest.mark.parametrize("strategy", ["auto", "self_speculative"])
def test_a_run_decodes_by_itself(folder, capsys, tmp_path, strategy):
    plain = tokens(capsys, tmp_path, folder / "base", "--strategy", "autoregressive")
    flags = ["--exit-layer", "1", "--num-draft-tokens", "2"] if strategy != "auto" else []
    found = tokens(capsys, tmp_path, folder / "run", "--strategy", strategy, *flags)
    assert found["token_ids"] == plain["token_ids"]


def test_a_killed_run_goes_on(folder, capsys):
    """From step 2: the same arrays at the end, bit for bit."""
    cut = folder / "cut"
    shutil.copytree(folder / "run", cut)
    for step in saved_steps(cut / "checkpoints"):
        if step.number > 2:
            shutil.rmtree(step.directory)
    capsys.readouterr()
    assert train(folder, cut) == 0
    assert "resumes after step 2\n" in capsys.readouterr().out
    ends = [saved_steps(run / "checkpoints")[0].meta["arrays"] for run in (folder / "run", cut)]
    assert ends[0] == ends[1]


def test_another_base_is_refused(folder, capsys, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        train(folder, run, base="other")
    assert end.value.code == 2
    assert "is not the model that the exit blocks of" in capsys.readouterr().err
    assert lsjax.load(run).exit_blocks, "the run still knows its base"
    with pytest.raises(lsjax.ConfigError, match="is the run itself"):
        check_base(run, str(run), lsjax.load(folder / "base"), may_write=False)
    config = json.loads((run / "config.json").read_text())
    config["init_from"] = str(folder / "other")
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(lsjax.CheckpointError, match="is not the model that the exit blocks"):
        lsjax.load(run)


def test_the_base_may_move(folder, tmp_path, capsys):
    """A resumed run notes the new place. Without one, a line says what is missing."""
    root = tmp_path
    for name in ("base", "run", "text.txt"):
        copy = shutil.copytree if (folder / name).is_dir() else shutil.copy
        copy(folder / name, root / name)
    config = json.loads((root / "run" / "config.json").read_text())
    (root / "run" / "config.json").write_text(json.dumps(config | {"init_from": "gone"}))
    with pytest.raises(lsjax.CheckpointError, match="its exit blocks need the model in init_from"):
        lsjax.load(root / "run")
    assert train(root, root / "run", "--data.paths", str(folder / "text.txt")) == 0
    assert lsjax.load(root / "run").exit_blocks


def test_narrower_dtypes_know_their_base(folder):
    """Values are rounded, and compared in the same dtype."""
    for dtype in ("bfloat16", "float16"):
        assert sorted(lsjax.load(folder / "run", dtype=dtype).exit_blocks) == ["1", "2"]


def test_kept_states_train_the_same_blocks(folder, capsys, tmp_path, monkeypatch):
    """With few draft tokens, all are among the kept ones. A second run computes nothing, and a lost
    file is made again. Block 2 begins as the last layer, so its loss is rounding."""
    monkeypatch.setattr("lsjax.training.kept_states.FILE_BYTES", 1 << 14)
    monkeypatch.setenv("LSJAX_CACHE", str(tmp_path / "cache"))
    few = "--exit-blocks.draft-vocab", "20", "--dtype", "float32"
    kept = *few, "--exit-blocks.keep-states"
    runs = [tmp_path / name for name in ("plain", "kept", "again", "lost")]
    outputs = []
    for run, flags in zip(runs, (few, kept, kept, kept), strict=True):
        if run.name == "lost":
            first, second, *_ = sorted((tmp_path / "cache" / "states").glob("*/*.states"))
            first.unlink()
            second.write_bytes(second.read_bytes()[:-1])
        assert train(folder, run, *flags) == 0
        outputs.append(capsys.readouterr().out)
    said = ["computes states of" in output for output in outputs]
    assert said == [False, True, False, True]
    losses = [
        [row["exit_losses"][0] for row in read_metrics(run) if row["kind"] == "step"]
        for run in runs
    ]
    assert losses[1] == losses[2] == losses[3]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_blocks_hang_off_a_model_that_has_moved(folder, capsys, tmp_path):
    """--exit-blocks names them, and another model is refused."""
    moved = shutil.copytree(folder / "base", tmp_path / "moved")
    run = shutil.copytree(folder / "run", tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"init_from": "gone"}))
    expected = tokens(capsys, tmp_path, folder / "run", "--strategy", "auto")
    found = tokens(capsys, tmp_path, moved, "--exit-blocks", str(run), "--strategy", "auto")
    assert found["token_ids"] == expected["token_ids"]
    assert lsjax.load(moved, exit_blocks=f"{run}@2").exit_blocks
    for given, words in (
        (folder / "other", "is not the model that the exit blocks"),
        (folder / "base", "has no exit blocks"),
    ):
        blocks = run if given.name == "other" else folder / "base"
        with pytest.raises(lsjax.CheckpointError, match=words):
            lsjax.load(given, exit_blocks=blocks)


def test_a_base_may_have_blocks_of_its_own(folder, tmp_path):
    """These are not part of what the new ones hang off."""
    assert train(folder, tmp_path / "run", base="run") == 0
    found = lsjax.load(tmp_path / "run")
    plain = named_leaves(lsjax.load(folder / "base"))
    own = named_leaves(without_exit_blocks(found))
    assert own.keys() == plain.keys() and sorted(found.exit_blocks) == ["1", "2"]
    assert lsjax.load(folder / "run", exit_blocks=tmp_path / "run").exit_blocks


def test_a_base_of_int8(folder, tmp_path):
    """Blocks train on what the integers stand for, and hang off both forms of the file."""
    small = jax.jit(lsjax.with_int8)(lsjax.load(folder / "base"))
    lsjax.save(small, tmp_path / "small", tokenizer=lsjax.load_tokenizer(folder / "base"))
    assert train(folder, tmp_path / "run", base=str(tmp_path / "small")) == 0
    for weights in ("float", "int8"):
        given = dict(exit_blocks=tmp_path / "run", weights=weights)
        assert lsjax.load(tmp_path / "small", **given).exit_blocks
    with pytest.raises(lsjax.CheckpointError, match="is not the model that the exit blocks"):
        lsjax.load(folder / "base", exit_blocks=tmp_path / "run")


def test_blocks_without_counts(folder, tmp_path, capsys):
    """Their draft vocabulary is the default of every strategy. Without counts it is refused."""
    run = tmp_path / "few"
    assert train(folder, run, "--exit-blocks.draft-vocab", "20") == 0
    flags = "--strategy", "self_speculative", "--exit-layer", "1", "--num-draft-tokens", "2"
    assert tokens(capsys, tmp_path, run, *flags)["draft_vocab"] == 20
    assert tokens(capsys, tmp_path, run)["draft_vocab"] == 20
    (run / "token_counts.json").unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        program("decode")(["--model", str(run), "--prompt", "1"])
    assert end.value.code == 2 and "needs token counts" in capsys.readouterr().err


def test_the_best_step_is_that_of_the_blocks(folder):
    rows = [row for row in read_metrics(folder / "run") if row["kind"] == "evaluation"]
    losses = {row["step"]: 1 - sum(row["agreement_E"][:2]) / 2 for row in rows}
    assert held_out_losses(folder / "run") == pytest.approx(losses)


def test_blocks_are_exported(folder, tmp_path, capsys):
    """Bit for bit, under the names of layers, with a card. Another base is refused, and so is a
    damaged file. The model itself is saved without them."""
    out = tmp_path / "out"
    assert program("convert")([str(folder / "run"), str(out)]) == 0
    assert "exit blocks with 0.0 million parameters in float32" in capsys.readouterr().out
    run, found = lsjax.load(folder / "run"), lsjax.load(folder / "base", exit_blocks=out)
    for one in (found, lsjax.load(out)):
        own, expected = named_leaves(one), named_leaves(run)
        assert own.keys() == expected.keys()
        for name, leaf in expected.items():
            np.testing.assert_array_equal(own[name], leaf)
    names = {*safe_open(out / "model.safetensors", framework="numpy").keys()}
    assert "model.layers.1.self_attn.q_proj.weight" in names
    card = (out / "README.md").read_text()
    assert "exits 1, 2, with" in card and "| exit_blocks.exits | [1, 2] |" in card
    found = tokens(capsys, tmp_path, folder / "base", "--exit-blocks", str(out))
    plain = tokens(capsys, tmp_path, folder / "base", "--strategy", "autoregressive")
    assert found["token_ids"] == plain["token_ids"] and found["strategy"] == "auto"
    with pytest.raises(lsjax.CheckpointError, match="is not the model that the exit blocks"):
        lsjax.load(folder / "other", exit_blocks=out)
    with pytest.raises(lsjax.CheckpointError, match="the format has no exit blocks"):
        lsjax.save(run, tmp_path / "model")
    file = out / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(lsjax.CheckpointError, match="damaged or cut off"):
        lsjax.load(folder / "base", exit_blocks=out)


def test_a_run_from_blocks_begins_with_them(folder):
    """A run that starts from blocks trains these; one without exit blocks drops them."""
    model = lsjax.load(folder / "run")
    config = lsjax.StepConfig(num_steps=1, exit_blocks=lsjax.ExitBlocksConfig(exits=(1, 2)))
    state = lsjax.init_state(config, model)
    own, before = named_leaves(state.model.exit_blocks), named_leaves(model.exit_blocks)
    for name, leaf in before.items():
        np.testing.assert_array_equal(own[name], leaf)
    assert not lsjax.init_state(lsjax.StepConfig(num_steps=1), model).model.exit_blocks


def test_blocks_need_a_model():
    with pytest.raises(lsjax.ConfigError, match="exit_blocks.exits needs a trained model"):
        lsjax.TrainConfig(
            model=SHAPE,
            num_steps=1,
            batch_size=1,
            exit_blocks=lsjax.ExitBlocksConfig(exits=(1,)),
            seq_len=8,
        )
