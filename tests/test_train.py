"""train.py from its command line: a tiny model on a few lines of text."""

import dataclasses
import json
import os
import re
import shutil
import signal
import sys
from contextlib import ExitStack
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lsjax
from lsjax.checkpoints.lock import LOCK
from lsjax.checkpoints.run import METRICS, held_out_losses, read_metrics
from lsjax.checkpoints.steps import saved_steps
from lsjax.cli import shown_run
from lsjax.cli.flags.config_file import read_config_file
from lsjax.evaluation.exits import evaluation_hook
from lsjax.training import run
from lsjax.training.prepare import with_model
from lsjax.training.run import Hook, Interrupted
from tests.marks import long
from tests.programs import program

CONFIG = """
from lsjax.config import *

config = TrainConfig(
    model=LlamaConfig.tiny(num_layers=3, hidden_size=32, intermediate_size=32, head_dim=8),
    data=DataConfig(
        source="text", paths=({text!r},), separator="blank_line", tokenizer="bytes",
        validation_fraction=0.3,
    ),
    num_steps=6,
    batch_size=4,
    seq_len=16,
    layer_dropout=LayerDropoutConfig(p_max=0.5),
    early_exit=EarlyExitConfig(curriculum="rotational", rotation=2),
    checkpoints=CheckpointConfig(every=2, keep_last=9),
    evaluation=EvaluationConfig(every=3, batches=1, sample_tokens=4, num_draft_tokens=2),
)
"""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LSJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def write_config(directory: Path) -> Path:
    """A configuration file, and the text that it names."""
    text = directory / "text.txt"
    numbers = np.random.default_rng(0).integers(0, 1000, (40, 8))
    text.write_text("\n\n".join(" ".join(map(str, line)) for line in numbers))
    file = directory / "tiny.py"
    file.write_text(CONFIG.format(text=str(text)))
    return file


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config"))


def launch(config, workdir, *flags):
    return program("train")(["--config", str(config), "--workdir", str(workdir), *flags])


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """The directory of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    assert launch(config, workdir) == 0
    return workdir


def last_arrays(workdir):
    """Fingerprints of all arrays of the last step: parameters and the optimizer's."""
    return saved_steps(workdir / "checkpoints")[0].meta["arrays"]


def rows_of(workdir):
    """The rows of metrics, without times."""
    rows = [row for row in read_metrics(workdir) if row["kind"] != "time"]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_a_run_shows_every_exit_and_leaves_pictures_and_samples(finished):
    rows = rows_of(finished)
    assert [row["step"] for row in rows if row["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    assert [row["step"] for row in evaluations] == [3, 6]
    assert len(evaluations[-1]["loss_E"]) == 3 and evaluations[-1]["agreement_E"][-1] == 1
    assert evaluations[-1]["loss_E"][-1] < evaluations[0]["loss_E"][-1]
    # Rotation 2 of 3 exits: exit 1 on even steps t, but its weight is 0; exit 2 on odd ones.
    on = [row["exits"] for row in rows if row["kind"] == "step"]
    assert on == [[3], [2, 3]] * 3
    assert [row["kind"] for row in rows].count("sample") == 2
    # Half of each row of the one held-out batch; the first begins with the start token.
    lines = (finished / "prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    assert [len(prompt) for prompt in prompts] == [7, 8, 8, 8]
    for name in ("exits.png", "training.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")


def test_the_best_step_is_that_of_the_lowest_held_out_loss(finished):
    logged = {
        row["step"]: row["loss_E"][-1] for row in rows_of(finished) if row["kind"] == "evaluation"
    }
    steps = saved_steps(finished / "checkpoints")
    assert [step.number for step in steps] == [6, 4, 3, 2]
    assert held_out_losses(finished) == logged and logged[6] < logged[3]
    best, newest = lsjax.load(f"{finished}@best"), lsjax.load(finished)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, best, newest))


def test_going_on_gives_the_run_that_nothing_disturbed_bit_for_bit(
    config, finished, tmp_path, capsys
):
    """Parameters, optimizer, masks (through the losses) and the next batches."""
    cut = tmp_path / "cut"
    shutil.copytree(finished, cut)
    for step in (3, 4, 6):
        shutil.rmtree(cut / "checkpoints" / str(step))
    assert saved_steps(cut / "checkpoints")[0].number == 2
    assert launch(config, cut) == 0
    assert "resumes after step 2\n" in capsys.readouterr().out
    assert last_arrays(cut) == last_arrays(finished)
    assert rows_of(cut) == rows_of(finished)


def test_a_resumed_run_makes_the_evaluation_that_a_kill_prevented(config, finished, tmp_path):
    """Step 3 was saved. Its sample was made, but its evaluation was not."""
    cut = tmp_path / "cut"
    shutil.copytree(finished, cut)
    for step in (4, 6):
        shutil.rmtree(cut / "checkpoints" / str(step))
    rows = [
        row
        for row in read_metrics(cut)
        if row["step"] <= 3 and (row["step"], row["kind"]) != (3, "evaluation")
    ]
    (cut / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert launch(config, cut) == 0

    def in_order(run):
        return sorted(rows_of(run), key=lambda row: (row["step"], row["kind"]))

    assert in_order(cut) == in_order(finished)


def test_data_and_tokenizer_may_move_but_not_change(config, finished, tmp_path, capsys):
    """Their contents decide, and what differs is said."""
    cut, moved = tmp_path / "cut", tmp_path / "moved"
    shutil.copytree(finished, cut)
    for step in (3, 4, 6):
        shutil.rmtree(cut / "checkpoints" / str(step))
    (text,) = config.parent.glob("*.txt")
    moved.mkdir()
    shutil.copy(text, moved / "elsewhere.txt")
    for file in finished.glob("tokenizer*"):
        shutil.copy(file, moved)
    flags = ["--data.tokenizer", str(moved), "--data.paths"]
    with pytest.raises(SystemExit, match="2"):
        (moved / "other.txt").write_text(text.read_text() + "\n\n1 2 3")
        launch(config, cut, *flags, str(moved / "other.txt"))
    words = "the training data differ from those that the run began with (fingerprint "
    assert words in " ".join(capsys.readouterr().err.split())
    assert launch(config, cut, *flags, str(moved / "elsewhere.txt")) == 0
    assert last_arrays(cut) == last_arrays(finished)


@pytest.mark.long
def test_validation_data_may_not_change(config, tmp_path, capsys):
    (text,) = config.parent.glob("*.txt")
    own = tmp_path / "own.txt"
    own.write_text("7 8 9\n\n10 11 12")
    flags = ["--data.validation-paths", str(own), "--num-steps", "3"]
    assert launch(config, tmp_path / "run", *flags) == 0
    own.write_text("7 8 9\n\n10 11 13")
    with pytest.raises(SystemExit, match="2"):
        launch(config, tmp_path / "run", *flags)
    words = "the validation data differ from those that the run began with (fingerprint "
    assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("step, number", [(6, None), *long((4, signal.SIGTERM))])
def test_a_last_step_that_can_not_be_saved_is_one_line(
    config, finished, tmp_path, capsys, monkeypatch, full_disk, step, number
):
    """From step 3 on no file grows beyond 20 kB, as on a full disk. A step before the last is not
    saved either, but the run continues. With room the same command does the rest."""
    limits, workdir = ExitStack(), tmp_path / "run"

    def full(run, console):
        def call(step, model):
            limits.enter_context(full_disk(20_000))
            if number is not None:
                signal.raise_signal(number)
            return {}

        return Hook("full", 3, call)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end, limits:
        patch.setattr(shown_run, "shown_evaluation", full)
        launch(config, workdir)
    said = capsys.readouterr()
    assert end.value.code == 2 and "done:" not in said.out and "is saved" not in said.out
    assert ("step 4 could not be saved" in said.out) == (number is None)
    assert re.fullmatch(
        rf"error: step {step} could not be saved: it needs [\d.]+ kB in {workdir}/checkpoints, "
        r"where [\d.]+ GB are free: make room there .* resumes after step 3 \(.*\)\n",
        said.err,
    )
    assert launch(config, workdir) == 0
    assert "resumes after step 3\n" in capsys.readouterr().out
    assert last_arrays(workdir) == last_arrays(finished)


def test_a_second_trainer_is_refused_and_changes_nothing(config, finished, tmp_path, capsys):
    """In the middle of a run, and for another configuration too."""
    given, workdir, codes = read_config_file(config), tmp_path / "run", []

    def second(run):
        def call(step, model):
            files = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
            for flags in ((), ("--seed", "1")):
                with pytest.raises(SystemExit) as end:
                    launch(config, workdir, *flags)
                codes.append(end.value.code)
            assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == files
            return {}

        return Hook("second", 3, call)

    state = lsjax.train(given, workdir, hooks=[evaluation_hook, second])
    lines = capsys.readouterr().err.splitlines()
    assert codes == [2] * 4 and len(lines) == 4
    refused = (
        rf"error: {workdir}: another trainer \(process {os.getpid()} on .*\) writes there: wait"
    )
    assert all(re.match(refused, line) for line in lines)
    assert state.step == 6 and last_arrays(workdir) == last_arrays(finished)
    assert not (workdir / LOCK).exists()


@pytest.mark.long
def test_one_seed_repeats_and_two_differ(config, finished, tmp_path):
    assert launch(config, tmp_path / "again") == 0
    assert launch(config, tmp_path / "other", "--seed", "1") == 0
    assert rows_of(tmp_path / "again") == rows_of(finished)
    assert last_arrays(tmp_path / "again") == last_arrays(finished)
    first, other = rows_of(finished)[0], rows_of(tmp_path / "other")[0]
    assert first["loss"] != other["loss"]


@pytest.mark.long
def test_a_run_is_a_model_for_decode(finished, tmp_path, monkeypatch):
    model, tokenizer = lsjax.load(finished), lsjax.load_tokenizer(finished)
    assert tokenizer.decode(tokenizer.encode("12 34")) == "12 34"
    arguments = ["--model", str(finished), "--prompt", "1", "--max-new-tokens", "8", "--json"]
    speculative = ["--strategy", "self_speculative", "--exit-layer", "1"]
    speculative += ["--num-draft-tokens", "2", "--draft-vocab", "64"]  # counts come with the run
    for name, flags in (("plain", []), ("drafted", speculative)):
        assert program("decode")([*arguments, str(tmp_path / name), *flags]) == 0
    texts = [
        json.loads((tmp_path / name).read_text())["token_ids"] for name in ("plain", "drafted")
    ]
    assert texts[0] == texts[1]
    monkeypatch.chdir(finished.parent)
    again = lsjax.load(finished.name)  # a path relative to the working directory
    assert jax.tree.all(jax.tree.map(jnp.array_equal, again, model))


@pytest.mark.long
def test_a_run_begins_with_the_weights_of_another(config, finished, tmp_path):
    model = lsjax.load(finished)
    flags = ["--init-from", str(finished), "--num-steps", "1", "--optimizer.learning-rate", "0"]
    for name, adapters in (("finetuned", []), ("adapted", ["--lora.rank", "2"])):
        workdir = tmp_path / name
        assert launch(config, workdir, *flags, *adapters) == 0
        leaves = jax.tree.leaves(model), jax.tree.leaves(lsjax.load(workdir))
        assert all((a == b).all() for a, b in zip(*leaves, strict=True))


@pytest.mark.long
def test_adapters_go_on_and_the_export_decodes_as_the_run(config, finished, tmp_path, capsys):
    """Bit for bit, beside weights that never change; through the programs."""
    flags = ["--init-from", str(finished), "--lora.rank", "2", "--num-steps", "4"]
    flags += ["--optimizer.learning-rate", "0.1"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert launch(config, whole, *flags) == 0
    shutil.copytree(whole, cut)
    for step in (3, 4):
        shutil.rmtree(cut / "checkpoints" / str(step))
    capsys.readouterr()
    assert launch(config, cut, *flags) == 0
    assert "resumes after step 2\n" in capsys.readouterr().out
    assert last_arrays(cut) == last_arrays(whole)
    assert rows_of(cut) == rows_of(whole)
    saved, base = last_arrays(whole)["params"], last_arrays(finished)["params"]
    assert saved.keys() - base.keys() == {name for name in saved if ".adapter." in name}
    assert {name: saved[name] for name in base} == base

    exported, texts = tmp_path / "exported", []
    assert program("convert")([str(whole), str(exported)]) == 0
    for model in (whole, exported, finished):
        arguments = ["--model", str(model), "--prompt", "1", "--max-new-tokens", "12"]
        assert program("decode")([*arguments, "--json", str(tmp_path / "text")]) == 0
        texts.append(json.loads((tmp_path / "text").read_text())["token_ids"])
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--data.paths", "missing.txt"], "missing.txt"),
        (
            ["--optimizer.learning-rate", "-1"],
            "optimizer.learning_rate -1.0 must be a finite number",
        ),
        (["--micro-batches", "3"], "micro_batches 3 does not divide the batch of 4 rows"),
        (
            ["--optimizer.learning-rat", "1"],
            "learning-rat is not a flag: did you mean --optimizer.learning-rate",
        ),
        (
            ["--data.tokenizer", "sentencepiece", "--data.vocab-size", "270"],
            r"contains '.*' \(token 2[56]\d\), but the model has only 258 tokens",
        ),
        (["--model.num-layers", "1"], "sample_tokens 4 needs an exit that drafts"),
        (["--evaluation.sample-prompt", "1" * 511], "sample_prompt has 512 tokens: use 1 to 511"),
        (["--model.vocab-size", "100"], "tokenizer has 258 tokens, but the model's table has 100"),
        (["--seq-len", "1024"], "seq_len 1024 is longer than the model's context of 512"),
        (["--mesh.data", "2"], "a mesh of data 2 needs 2 devices, but there are 1"),
        (
            ["--profile.steps", "1", "--profile.start", "7"],
            r"profile.start 7 is after the last step: use 1..6",
        ),
    ],
)
def test_bad_input_ends_with_2_before_anything_is_compiled(
    config, tmp_path, capsys, monkeypatch, flags, message
):
    monkeypatch.delattr(run, "abstract_state")
    with pytest.raises(SystemExit) as end:
        launch(config, tmp_path / "run", *flags)
    assert end.value.code == 2
    assert re.fullmatch(f"error: .*{message}.*", capsys.readouterr().err.strip())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("extra, package", [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_tracker_that_is_not_there(config, tmp_path, capsys, monkeypatch, extra, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delattr(run, "abstract_state")
    with pytest.raises(SystemExit) as end:
        launch(config, tmp_path / "run", f"--{extra}")
    assert end.value.code == 2
    words = f"error: --{extra} needs {package}: pip install 'lsjax[{extra}]', or turn it off\n"
    assert capsys.readouterr().err == words


def test_a_tracker_that_does_not_start(config, tmp_path, capsys, monkeypatch):
    def init(**_):
        raise wandb.Error("No API key configured.")

    wandb = ModuleType("wandb")
    wandb.__spec__ = ModuleSpec("wandb", None)
    wandb.Error, wandb.Settings, wandb.init = type("Error", (Exception,), {}), dict, init
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(SystemExit) as end:
        launch(config, tmp_path / "run", "--wandb")
    assert end.value.code == 2
    words = "error: wandb can't start (No API key configured.): run `wandb login`, set "
    assert capsys.readouterr().err.startswith(words)


@pytest.mark.long
def test_traces_of_a_run_and_of_decoding(config, finished, tmp_path):
    """Their steps and named scopes; a run that resumes within its trace writes the rest. Neither
    the trace nor the scopes change a result."""
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    for step in (4, 5, 6):
        shutil.rmtree(workdir / "checkpoints" / str(step), ignore_errors=True)
    flags = ["--profile.start", "2", "--profile.steps", "3"]
    assert launch(config, workdir, *flags) == 0
    (file,) = (workdir / "profile").glob("plugins/profile/step_4_process_0/*.xplane.pb")
    numbers, modules, scopes = traced(file)
    assert numbers == {4}, "steps 2 to 4 were wanted, and 3 is done"
    assert "jit_train_step" in modules
    assert {"embedding", "layers", "exits", "head", "optimizer"} <= scopes
    assert last_arrays(workdir) == last_arrays(finished)
    assert launch(config, workdir, *flags) == 0  # nothing is left to do

    flags = ["--model", str(finished), "--prompt", "1", "--max-new-tokens", "8"]
    flags += ["--strategy", "self_speculative", "--exit-layer", "1", "--num-draft-tokens", "2"]
    assert program("decode")([*flags, "--profile", str(tmp_path / "trace")]) == 0
    (file,) = (tmp_path / "trace").glob("plugins/profile/*/*.xplane.pb")
    assert {"embedding", "layers", "head", "draft", "verify"} <= traced(file)[2]


def traced(file):
    """The steps of a trace, the programs that ran, and the parts of the operations' names."""
    numbers, modules = set(), set()
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for event in (event for line in plane.lines for event in line.events):
            stats = dict(event.stats)
            modules.add(stats.get("hlo_module"))
            if event.name == "train":
                numbers.add(stats["step_num"])
    names = re.findall(rb"jit\(\w+\)/[\w/().-]+", file.read_bytes())
    return numbers, modules, set(re.findall(r"\w+", b" ".join(names).decode()))


def test_a_run_can_not_become_another(config, finished, capsys):
    with pytest.raises(SystemExit) as end:
        launch(config, finished, "--num-steps", "7")
    assert end.value.code == 2
    assert "num_steps 6, now it is 7" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, message",
    [
        ("config = 1", "`config` is missing or of another type"),
        ("x = 1\nconfig = y", ":2: NameError"),
        ("def f(:", ":1: SyntaxError"),
        ("from lsjax.config import *\nDataConfig(max_documents=0)", "max_documents 0 must be"),
    ],
)
def test_a_configuration_file_says_what_is_wrong_with_it(tmp_path, content, message):
    file = tmp_path / "config.py"
    file.write_text(content)
    with pytest.raises(lsjax.ConfigError, match=message):
        read_config_file(file)


def test_a_configuration_file_with_a_value_of_another_type(config, tmp_path):
    file = tmp_path / "config.py"
    change = "import dataclasses\nconfig = dataclasses.replace(config, num_steps=5e4)"
    file.write_text(f"{config.read_text()}\n{change}")
    with pytest.raises(lsjax.ConfigError, match="num_steps 50000.0 must be a whole number"):
        read_config_file(file)


@pytest.mark.long
def test_a_run_without_a_saved_step_begins_with_the_model_that_is_given(
    config, finished, tmp_path, capsys
):
    """Not with the shape of the one that it was given before it was killed."""
    workdir = tmp_path / "run"
    assert launch(config, workdir, "--num-steps", "1", "--init-from", str(finished)) == 0
    shutil.rmtree(workdir / "checkpoints")
    other = tmp_path / "other"
    assert launch(config, other, "--num-steps", "1", "--model.num-layers", "2") == 0
    with pytest.raises(SystemExit) as end:
        launch(config, workdir, "--num-steps", "1", "--init-from", str(other))
    assert end.value.code == 2
    assert "model.num_layers is 3, but that of" in capsys.readouterr().err


def test_a_run_begins_with_a_model_that_was_drawn_in_another_way(config):
    """How new weights are drawn says nothing of those that are there."""
    given = read_config_file(config)
    drawn = dataclasses.replace(given.model, init_std=0.7, scaled_init=True, max_context=99)
    assert with_model(given, drawn).model == drawn
    with pytest.raises(lsjax.ConfigError, match="model.hidden_size is 32, but that of .* is 64"):
        with_model(given, dataclasses.replace(given.model, hidden_size=64))


def test_nothing_to_do_for_a_run_that_is_done(config, finished, capsys):
    assert launch(config, finished) == 0
    assert "all 6 steps are done" in capsys.readouterr().out


def test_a_run_from_python_is_that_of_the_command(config, finished, tmp_path, capsys):
    """Stopped and resumed; without the samples, which are the command's."""
    given, workdir = read_config_file(config), tmp_path / "run"

    def stopping(run):
        def call(step, model):
            if step == 3:
                signal.raise_signal(signal.SIGTERM)
            return {}

        return Hook("stop", 3, call)

    with pytest.raises(Interrupted, match="stopped after step 4, which is saved"):
        lsjax.train(given, workdir, hooks=[evaluation_hook, stopping])
    state = lsjax.train(given, workdir)
    assert state.step == 6 and last_arrays(workdir) == last_arrays(finished)
    shown = ("stop", "sample")
    own, others = (
        [row for row in rows_of(run) if row["kind"] not in shown] for run in (workdir, finished)
    )
    assert own == others
    printed = capsys.readouterr().out
    assert "resumes after step 4\n" in printed and "step 6/6  loss " in printed
    assert "held-out tokens" in printed and "drafts of exit 2 were accepted" in printed
    assert (workdir / "exits.png").exists() and (workdir / "training.png").exists()
    assert repr(state).startswith("TrainState(step 6, skipped 0, 0.0M parameters)")
    assert lsjax.train(given, workdir).step == 6
    assert "all 6 steps are done: nothing to do" in capsys.readouterr().out
    with pytest.raises(lsjax.ConfigError, match="num_steps 6, now it is 7"):
        lsjax.train(dataclasses.replace(given, num_steps=7), workdir)


def by_ten(logits, labels, final_logits):
    return 10 * lsjax.cross_entropy(logits, labels)


def by_nine(logits, labels, final_logits):
    return 9 * lsjax.cross_entropy(logits, labels)


@pytest.mark.long
def test_quiet_training_with_functions_of_ones_own(config, tmp_path, capfd):
    """Nothing is printed but the warning of another function."""
    given, workdir = read_config_file(config), tmp_path / "run"
    options = dict(optimizer=optax.sgd(1e-2), exit_loss=by_ten)
    with pytest.raises(Interrupted):
        lsjax.train(given, workdir, **options, hooks=[stopping_at(4)], quiet=True)
    assert lsjax.train(given, workdir, **options, quiet=True).step == 6
    assert "".join(capfd.readouterr()) == ""
    found = json.loads((workdir / "recipe.json").read_text())
    names = {key: one["name"] for key, one in found.items()}
    assert names == {"exit_loss": "by_ten", "optimizer": "chain(identity, scale)"}
    other = options | dict(exit_loss=by_nine)
    lsjax.train(given, workdir, **other, hooks=[])
    (line,) = [line for line in capfd.readouterr().out.splitlines() if "other functions" in line]
    assert line.endswith("than before: exit_loss from by_ten to by_nine")
    with pytest.raises(
        lsjax.CheckpointError, match=r"opt_state\.1\..*belongs to another model, optimizer or run"
    ):
        lsjax.train(given, workdir, exit_loss=by_nine, quiet=True)


def stopping_at(step):
    """A hook that stops the run as SIGTERM does."""

    def make(run):
        def call(done, model):
            if done == step - 1:
                signal.raise_signal(signal.SIGTERM)
            return {}

        return Hook("stop", step - 1, call)

    return make
