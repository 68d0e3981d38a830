"""`lsjax report`: what the flags mean, and whole reports of tiny models."""

import json
import re
from dataclasses import replace

import pytest
from rich.console import Console

import lsjax
from lsjax.checkpoints.run import METRICS
from lsjax.cli.flags.report import PROGRAM, templates_of
from lsjax.cli.main import main
from lsjax.cli.report_compare import as_reports
from lsjax.cli.report_making import (
    TRIAL_STEPS,
    as_flag,
    asked,
    make_report,
    timed,
    timed_steps,
)
from lsjax.config import ConfigError, DataConfig
from lsjax.reporting.machine import commit
from lsjax.reporting.recipes import chosen
from lsjax.reporting.record import read_report

TEXT = "\n\n".join(f"Number {n} is a number, and {n + 1} follows it." for n in range(400))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LSJAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def parsed(*flags):
    return PROGRAM.parsed([str(flag) for flag in flags])


def test_the_source_follows_from_the_files(model_directory, text):
    """Few texts are divided at blank lines. The tokenizer is the model's."""
    given = ["--model", model_directory, "--output", "x", "--data.paths"]
    data = parsed(*given, text).flags.fields.data
    assert (data.source, data.separator) == ("text", "blank_line")
    assert data.tokenizer == str(model_directory)
    assert parsed(*given, "rows.jsonl.gz").flags.fields.data.source == "jsonl"
    assert parsed(*given, "rows.csv").flags.fields.data.source == "tsv"
    many = parsed(*given, *[text] * 40).flags.fields.data
    assert many.separator == "file"
    task = parsed(*given, "rows.jsonl", "--task", "gsm8k").flags.fields.data
    assert task.prompt_template == "Question: {question}\nAnswer:"
    same = parsed(*given, "rows.jsonl", "--task", "gsm8k", "--data.source", "jsonl").flags.fields
    assert same.data == task
    assert parsed(*given[:4], "--task", "gsm8k").flags.fields.data.tfds_name == "gsm8k"
    own = parsed(*given, text, "--data.separator", "|", "--early-exit.exits", 1, 2).flags.fields
    assert own.data.separator == "|" and own.early_exit.exits == (1, 2)


def test_a_configuration_file_is_the_recipe(text, model_directory):
    found = parsed("--config", "quickstart", "--output", "x", "--num-steps", 7)
    assert found.flags.fields.num_steps == 7 and found.base.num_steps == 800
    assert found.base.data.source == "python_source"
    changed = parsed("--config", "quickstart", "--output", "x", "--data.paths", text)
    other = replace(found.base, model=lsjax.LlamaConfig.tiny())
    file = text.with_name("own.py")
    file.write_text(f"from lsjax import *\nconfig = {other!r}")
    finetuned = parsed("--config", file, "--model", model_directory, "--output", "x").flags.fields
    assert finetuned.model == other.model and finetuned.init_from == str(model_directory)
    assert chosen(finetuned)["init_from"] == str(model_directory)
    assert changed.base.data.source == "text" and changed.base.data.vocab_size == 512


def test_a_task_reads_the_rows_of_the_configuration(tmp_path):
    """Only if they have the task's templates. Another task has its own data set."""
    rows = DataConfig(source="tsv", paths=("rows.tsv",), **templates_of("topv2"))
    base = parsed("--config", "quickstart", "--output", "x").base
    file = tmp_path / "own.py"
    file.write_text(f"from lsjax import *\nconfig = {replace(base, data=rows)!r}")
    given = ["--config", file, "--output", "x", "--task"]
    assert parsed(*given, "topv2").base.data == rows
    assert parsed(*given, "gsm8k").base.data.source == "tfds"


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "--model is missing: name a model to train further"),
        (
            ["--no-training", "--config", "quickstart"],
            "--no-training needs --model: name the model",
        ),
        (["--model", "MODEL", "--task", "human_eval"], "--task human_eval is for lsjax evaluate"),
        (["--model", "MODEL", "--task", "pairs"], "pairs has no data set: name files with"),
        (["--model", "MODEL"], "there are no data: name files with --data.paths"),
        (["--model", "nowhere"], "nowhere: does not exist"),
        (["--model", "MODEL", "--data.paths", "a.txt", "--minute", "3"], "did you mean --minutes"),
        (["--model", "MODEL", "--data.paths", "a.txt", "--minutes", "0"], "--minutes 0.0 must be"),
        (
            ["--model", "MODEL", "--data.paths", "a.txt", "--minutes", "0.000001"],
            "--minutes 1e-06 must be a finite number of at least 1 .*: the first steps and tokens",
        ),
    ],
)
def test_bad_flags_are_refused(flags, message, model_directory):
    flags = [str(model_directory) if flag == "MODEL" else flag for flag in flags]
    with pytest.raises((ConfigError, lsjax.CheckpointError), match=message):
        parsed(*flags)


@pytest.mark.long
def test_a_model_as_it_is(model_directory, text, tmp_path, capsys):
    """Nothing is trained. The same command reads what is there, and other flags are refused."""
    output = tmp_path / "report"
    flags = ["report", "--no-training", "--model", str(model_directory), "--data.paths", str(text)]
    flags += ["--exit-layers", "2", "--num-draft-tokens", "3", "--prompts", "2", "--seq-len", "48"]
    flags += ["--new-tokens", "8", "--output", str(output)]
    assert main(flags) == 0
    said = capsys.readouterr().out
    made = read_report(output)
    assert made.answer in " ".join(said.split()) and f"page: {output / 'report.html'}" in said
    assert [one.kind for one in made.models] == ["given"] and made.recipe == {}
    names = [(one["strategy"], one["exit_layer"], one["id"]) for one in made.models[0].answers]
    assert names == [
        *(("autoregressive", None, "0"), ("autoregressive", None, "1")),
        *(("auto", None, "0"), ("auto", None, "1")),
        *(("self_speculative", 2, "0"), ("self_speculative", 2, "1")),
    ]
    assert all(
        one["num_new_tokens"] == 8 and one["seed"] is not None for one in made.models[0].answers
    )
    page = (output / "report.html").read_text()
    (output / "report.html").unlink()
    assert main(flags) == 0
    assert (output / "report.html").read_text() == page
    with pytest.raises(SystemExit, match="2"):
        main([*flags, "--new-tokens", "9"])
    assert "was begun with new_tokens 8, now it is 9" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--exit-layers", "9"], "exit layer 9 is out of range: use --exit-layer 1..3"),
        (["--new-tokens", "512"], "no held-out prompt leaves room for 512 new tokens"),
        (["--num-draft-tokens", "9999"], "num_draft_tokens 9999 is out of range"),
    ],
)
def test_what_would_fail_later_fails_before_the_work(
    flags, message, model_directory, text, tmp_path, monkeypatch
):
    """Nothing is written that would refuse the corrected flags."""
    output = tmp_path / "report"
    given = ["--model", model_directory, "--data.paths", text, "--seq-len", 48, "--output", output]
    found = parsed(*given, *flags)
    wanted = asked(found.flags, found.base, has_config=False)
    monkeypatch.setattr("lsjax.cli.report_making.timed", lambda *_: pytest.fail("it began"))
    with pytest.raises(ConfigError, match=message):
        make_report(wanted, output, Console(quiet=True), "")
    assert [*output.iterdir()] == []


def test_what_can_not_be_compared(model_directory, tmp_path):
    console, output = Console(quiet=True), tmp_path / "out"
    with pytest.raises(ConfigError, match="--compare has only"):
        as_reports([model_directory], output, console)
    with pytest.raises(ConfigError, match="have the same name"):
        as_reports([model_directory, model_directory], output, console)
    with pytest.raises(ConfigError, match="would overwrite what is compared"):
        as_reports([model_directory, tmp_path], model_directory.parent, console)
    with pytest.raises(ConfigError, match="has no report.json, and no run tells which text"):
        as_reports([model_directory, tmp_path], output, console)
    assert not output.exists()


class Began(Exception):
    """A training began."""


def test_the_trial_saves_its_last_step_alone(text, model_directory, tmp_path, monkeypatch):
    """Saving would slow the steps that are timed."""

    def train(config, *_, **__):
        assert config.checkpoints.every == config.num_steps == TRIAL_STEPS
        raise Began

    monkeypatch.setattr("lsjax.cli.report_making.shown_run", train)
    found = parsed("--model", model_directory, "--data.paths", text, "--output", "x")
    with pytest.raises(Began):
        timed(asked(found.flags, found.base, has_config=False), tmp_path, Console())


def test_short_steps_are_timed_longer(text, model_directory, tmp_path, monkeypatch):
    """Five steps of 0.25 seconds are too few to time. 20 follow, of both trainings."""
    trained = []

    def train(config, workdir, *_, **__):
        layerskip = config.early_exit.curriculum != "none"
        trained.append((workdir.name, config.num_steps, layerskip))
        workdir.mkdir(parents=True)
        seconds = 9.0, 5.0, 0.125, 0.125, 0.5  # two that compile, and a mean of 0.25
        rows = [{"kind": "step", "step": n, "seconds": one} for n, one in enumerate(seconds, 1)]
        rows.insert(3, {"kind": "evaluation", "step": 3, "seconds": 7.0})
        (workdir / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def ends(*_):
        raise Began

    monkeypatch.setattr("lsjax.cli.report_making.shown_run", train)
    monkeypatch.setattr("lsjax.cli.report_making.Measures", ends)
    found = parsed("--model", model_directory, "--data.paths", text, "--output", "x")
    wanted = asked(found.flags, found.base, has_config=False)
    assert timed_steps(wanted, True, 7, tmp_path / "one")[0] == 0.25
    with pytest.raises(Began):
        timed(wanted, tmp_path, Console())
    expected = [("step", 5, True), ("step_longer", 20, True)]
    expected += [("plain_step", 5, False), ("plain_step_longer", 20, False)]
    assert trained == [("one", 7, True), *expected]


def test_flags_of_fields():
    """What is announced can be given."""
    assert as_flag("early_exit.exits", (4, 8)) == "--early-exit.exits 4 8"
    assert as_flag("data.append_end", False) == "--data.no-append-end"
    assert as_flag("layer_dropout.rescale", True) == "--layer-dropout.rescale"
    assert as_flag("optimizer.learning_rate", 1e-3) == "--optimizer.learning-rate 0.001"


@pytest.mark.long
def test_training_and_its_control(model_directory, tmp_path, capsys, monkeypatch):
    """A task from Python: both are trained on as many tokens, with two seeds, and scored. Fixed
    settings have the draft vocabulary that auto has."""
    monkeypatch.setattr("lsjax.cli.engines.best_draft_vocab", lambda *_: 8)
    rows = [{"q": f"{n}+1=", "a": f"{n + 1}"} for n in range(300)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(
        source="jsonl",
        paths=(str(file),),
        prompt_template="{q}",
        response_template="{a}",
        tokenizer=str(model_directory),
        validation_fraction=0.2,
    )
    steps = dict(seeds=2, prompts=3, new_tokens=6, num_draft_tokens=(2,), minutes=30.0)
    config = lsjax.TrainConfig(
        model=lsjax.LlamaConfig.tiny(),
        num_steps=6,
        batch_size=2,
        seq_len=32,
        data=data,
        early_exit=lsjax.EarlyExitConfig(curriculum="subset", exits=(2,)),
        evaluation=lsjax.EvaluationConfig(every=3, batches=1, sample_tokens=0),
    )
    given = dict(config=config, quiet=True, **steps | {"minutes": None})
    made = lsjax.report(tmp_path / "report", **given)
    assert [(one.kind, one.seed) for one in made.models] == [
        *(("layerskip", 0), ("plain", 0), ("layerskip", 1), ("plain", 1)),
    ]
    assert made.score == "exact_match" and made.recipe["num_steps"] == 6
    first, plain, second, _ = made.models
    assert first.exits == (2,) and plain.exits == ()
    assert first.loss_nE != second.loss_nE and first.tokens_n == plain.tokens_n
    assert {row["kind"] for row in plain.training} == {"step", "evaluation"}
    assert [one["strategy"] for one in plain.answers] == ["autoregressive"] * 3
    sizes = {one["strategy"]: one["draft_vocab"] for one in first.answers}
    assert sizes == {"autoregressive": None, "auto": 8, "self_speculative": 8}
    assert re.search("exact_match", made.answer) and made.texts[0]["tokens"]
    assert not (tmp_path / "report" / "trial").exists()
    assert lsjax.report(tmp_path / "report", **given) == made
    file = tmp_path / "report" / "measured-plain-1.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"about": {"commit": "older"}}))
    resumed = lsjax.report(tmp_path / "report", **given)
    assert resumed.about["commit"] == f"{commit()}, older".removeprefix(", ")
    with pytest.raises(ConfigError, match="was begun with seeds 2, now it is 1"):
        lsjax.report(tmp_path / "report", **given | {"seeds": 1})
    with pytest.raises(ConfigError, match="model and config are both None"):
        lsjax.report(tmp_path / "other")
    assert replace(made, answer="") != made
