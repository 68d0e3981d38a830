"""Flags: what is wrong with them is said in one line."""

import importlib
import pkgutil
import re
import subprocess
import sys
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
from flax import nnx
from tyro import _fmtlib

import lsjax
from lsjax.checkpoints.run import RunSource
from lsjax.cli import flags
from lsjax.cli.engines import OpenModel, load_engine, make_strategies, open_model, trained_exits
from lsjax.cli.flags.evaluate import TaskName
from lsjax.cli.flags.fields import flags_of
from lsjax.cli.flags.parse import Program, parse_as
from lsjax.cli.flags.shared import ModelFlags, SamplingFlags, StrategyFlags
from lsjax.cli.main import PROGRAMS, find, main
from lsjax.cli.notes import notes_console
from lsjax.config import (
    GREEDY,
    Checked,
    ConfigError,
    DataConfig,
    DecodingShape,
    Hosts,
    LlamaConfig,
    OptimizerConfig,
    Sampling,
)
from lsjax.decoding.auto.adaptive import Adaptive
from lsjax.decoding.cost import best_draft_vocab
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.strategy import Autoregressive, EarlyExit
from lsjax.evaluation.tasks import TASKS
from lsjax.model.llama import Llama
from tests.programs import program

CONFIG = ("--config", str(Path(__file__).parents[2] / "configs" / "quickstart.py"))

REFERENCE = ["--kernels", "reference"]


@dataclass(frozen=True)
class Flags:
    """A program's."""

    number: int = 1
    kind: str = "a"
    switch: bool = False
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


def test_good_flags():
    flags = parse_as(Flags, ["--number", "3", "--optimizer.learning-rate", "0.5"])
    assert flags == Flags(3, optimizer=OptimizerConfig(learning_rate=0.5))


@pytest.mark.parametrize(
    "argv, message",
    [
        (
            ["--optimizer.learning-rate", "-1"],
            "optimizer.learning_rate -1.0 must be a finite number of at least 0",
        ),
        (
            ["--optimizer.learning-rat", "1"],
            "--optimizer.learning-rat is not a flag: did you mean --optimizer.learning-rate? "
            "--help-all lists all flags",
        ),
        (["--colour=1"], "--colour is not a flag: --help-all lists all flags"),
        (
            ["--no-switch-on"],
            "--no-switch-on is not a flag: did you mean --no-switch? --help-all lists all flags",
        ),
        (
            ["--number", "x"],
            "Error parsing --number: invalid literal for int() with base 10: 'x'; "
            "--help-all lists all flags",
        ),
        (["y"], "y is not expected here: --help-all lists all flags"),
    ],
)
@pytest.mark.parametrize("terminal", [False, True])
def test_one_line(argv, message, terminal, capsys, monkeypatch):
    if terminal:  # boxes of lines, and colours
        monkeypatch.setattr(_fmtlib, "_FORCE_UTF8_BOXES", True)
        monkeypatch.setattr(_fmtlib, "_FORCE_ANSI", True)
    with pytest.raises(ConfigError) as error:
        parse_as(Flags, argv)
    assert str(error.value) == message
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_fits_a_screen(name, capsys):
    """And names what people use. All flags are in the long one, with their texts and defaults."""
    screen, everything = (shown_help(capsys, name, flag) for flag in ("--help", "--help-all"))
    assert len(screen) <= 50 and all(len(line) <= 100 for line in screen), len(screen)
    assert screen[0].startswith(f"usage: lsjax {name}") and "--help-all" in screen[-1]
    about = find(name).about.strip().splitlines()[0]
    for lines in (screen, everything):
        text = "\n".join(lines)
        assert about in text and "(default" not in text and "Checked" not in text
        assert all(len(line) <= 100 for line in lines)
    names = [flag.names[0] for flag in flags_of(find(name).flags)]
    assert len(names) == len({*names})
    for flag in names:
        assert any(line.lstrip().startswith(flag) for line in everything), flag


def test_help_of_a_configuration_has_its_values(capsys):
    lines = " ".join(line.strip() for line in shown_help(capsys, "train", *CONFIG, "--help"))
    assert "stretched over them. [800]" in lines
    shown = {flag for name in ("train", "aot") for flag in shown_flags(capsys, name)}
    assert {"--config", "--workdir", "--programs"} <= shown


def shown_help(capsys, *argv) -> list[str]:
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert not end.value.code
    return capsys.readouterr().out.splitlines()


def shown_flags(capsys, name) -> set[str]:
    return {
        line.split()[0] for line in shown_help(capsys, name, "--help") if line.startswith("  --")
    }


def test_the_command_lists_its_programs(capsys, refused):
    assert main([]) == main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in PROGRAMS:
        assert f"\n  {name} " in shown
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{lsjax.__version__}\n"
    assert "lsjax has no program trian: did you mean train?" in refused(main, "trian")


def test_flags_import_no_jax():
    """So that help appears at once."""
    code = (
        "import sys\nfrom lsjax.cli.main import PROGRAMS, find, overview\noverview()\n"
        "from lsjax.cli.flags.help import help_text\n"
        "for name in PROGRAMS: help_text(find(name).flags, None)\n"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_tasks_are_those_of_the_flags():
    assert get_args(TaskName) == tuple(TASKS)


@dataclass(frozen=True, kw_only=True)
class Shared(StrategyFlags):
    """A program with strategies and sampling."""

    sampling: SamplingFlags = GREEDY


@pytest.mark.parametrize(
    "strategy, exits", [("--strategy", "--exit-layer"), ("--strategies", "--exit-layers")]
)
def test_shared_flags_have_no_prefix_and_two_names(tokenizer, strategy, exits):
    """Each exit with each draft length; doubles count once."""
    argv = [strategy, "autoregressive", "early_exit", "self_speculative", exits, "2", "3", "2"]
    argv += ["--num-draft-tokens", "1", "4", "--draft-confidence", "0.5", "--temperature", "0.5"]
    flags = parse_as(Shared, argv)
    assert flags.sampling == Sampling(temperature=0.5)
    source = SimpleNamespace(config=LlamaConfig.tiny(), agreement_E=None)
    model = OpenModel(ModelFlags(model=Path("nowhere")), source, tokenizer, None)
    assert make_strategies(flags, model) == [
        Autoregressive(),
        EarlyExit(2),
        EarlyExit(3),
        *(
            SelfSpeculative(exit_layer, drafts, draft_confidence=0.5)
            for exit_layer in (2, 3)
            for drafts in (1, 4)
        ),
    ]


@pytest.mark.parametrize(
    "early_exit, exits",
    [
        (dict(curriculum="rotational"), (2, 4, 8, 16)),
        (dict(curriculum="subset", exits=[24, 6]), (6, 24)),
        (dict(curriculum="subset", exits=[8, 32]), (8,)),  # the last one has nothing to verify
        (dict(curriculum="subset", exits=[2, 4, 6, 8, 10]), (2, 4, 6, 8)),
        (dict(curriculum="none"), ()),
        ({}, ()),
    ],
)
def test_exits_that_a_run_was_trained_with(tokenizer, tmp_path, early_exit, exits):
    source = object.__new__(RunSource)
    source.path = tmp_path  # without evaluations
    source.config, source.early_exit = LlamaConfig.tiny(num_layers=32), early_exit
    model = OpenModel(ModelFlags(model=Path("nowhere")), source, tokenizer, None)
    assert trained_exits(model) == exits
    flags = parse_as(Shared, ["--strategy", "auto"])
    assert make_strategies(flags, model) == [Adaptive(exits)]


def test_exits_of_a_model_that_names_one(tokenizer, tmp_path):
    model = OpenModel(
        ModelFlags(model=tmp_path), SimpleNamespace(config=LlamaConfig.tiny()), tokenizer, None
    )
    assert trained_exits(model) == ()
    (tmp_path / "generation_config.json").write_text('{"assistant_early_exit": 3}')
    assert trained_exits(model) == (1, 2, 3)


def test_agreement_of_another_model_is_refused(tokenizer, tmp_path):
    lsjax.save(
        Llama(LlamaConfig.tiny(num_layers=2), rngs=nnx.Rngs(0)),
        tmp_path / "model",
        tokenizer=tokenizer,
        generation=lsjax.GenerationDefaults(agreement_E=(0.5, 0.6, 1.0)),
    )
    model = open_model(ModelFlags(model=tmp_path / "model"))
    flags = parse_as(Shared, ["--strategy", "auto", "--exit-layers", "1"])
    message = "has the agreement of 3 exits, but 2 layers: restore the file, or remove exit_agre"
    with pytest.raises(ConfigError, match=message):
        make_strategies(flags, model)


def test_auto_chooses_a_draft_vocabulary(tokenizer, tmp_path):
    """By the counts; --draft-vocab sets another size."""
    config = LlamaConfig.smollm2_135m()
    tokenizer = SimpleNamespace(vocab_size=config.vocab_size)
    counts = {token: 1_000_000 // (token + 1) for token in range(20_000)}
    source = SimpleNamespace(config=config, agreement_E=None)
    model = OpenModel(ModelFlags(model=Path("nowhere")), source, tokenizer, None)
    auto = ["--strategy", "auto", "--exit-layers", "8", "15"]
    (chosen,) = make_strategies(parse_as(Shared, auto), model, counts)
    assert chosen.exits == (8, 15) and chosen.draft_vocab == best_draft_vocab(config, 15, counts)
    (chosen,) = make_strategies(parse_as(Shared, [*auto, "--draft-vocab", "99"]), model, counts)
    assert chosen.draft_vocab == 99


def flag_classes() -> set[type]:
    """Every dataclass of flags, and those of their fields."""
    names = [f"lsjax.cli.flags.{module.name}" for module in pkgutil.iter_modules(flags.__path__)]
    waiting = [
        found
        for module in map(importlib.import_module, names)
        for found in vars(module).values()
        if is_dataclass(found) and found.__module__ == module.__name__ and found is not Program
    ]
    classes: set[type] = set()
    while waiting:
        kind = waiting.pop()
        if is_dataclass(kind) and kind not in classes:
            classes.add(kind)
            waiting += get_type_hints(kind).values()
        waiting += get_args(kind)
    return classes


def test_every_class_of_flags_checks_its_values():
    classes = flag_classes()
    assert {find("train").flags, Hosts, Sampling, DecodingShape, DataConfig} < classes
    assert [kind for kind in classes if not issubclass(kind, Checked)] == []


@pytest.mark.parametrize(
    ("main", "argv", "flag"),
    [
        (program("train"), [*CONFIG, "--workdir", ""], "--workdir"),
        (program("train"), ["--config", "", "--workdir", "x"], "--config"),
        (program("decode"), ["--model", "", "--prompt", "a"], "--model"),
        (program("decode"), ["--model", "x", "--prompt-file", ""], "--prompt-file"),
        (program("decode"), ["--model", "x", "--prompt", "a", "--json", ""], "--json"),
        (program("report"), ["--compare", "x", "", "--output", "y"], "--compare"),
        (program("tokenize"), ["--config", ""], "--config"),
        (program("aot"), [*CONFIG, "--topology", "v5e:1", "--output", ""], "--output"),
        (program("count-tokens"), ["--model", "", "--text", "x"], "--model"),
        (program("convert"), ["", "x"], "source"),
    ],
)
def test_an_empty_path_is_refused_with_its_flag(refused, main, argv, flag):
    assert re.match(rf"error: {flag} .*''.* must be .*a path", refused(main, *argv))


def test_a_run_needs_a_directory(refused):
    assert "--workdir is missing: name the directory of the run" in refused(
        program("train"), *CONFIG
    )


@pytest.mark.parametrize(
    ("main", "argv", "words"),
    [
        (program("tokenize"), ["--workers", 0], "--workers 0 must be a whole number of at least 1"),
        (
            program("aot"),
            ["--topology", "v5e:1", "--decoding.batch-size", 0],
            "--decoding.batch-size (0,) must be a tuple, each item a whole number of at least 1",
        ),
        (
            program("train"),
            ["--workdir", "x", "--distributed.start-timeout", 0],
            "--distributed.start-timeout 0 must be a whole number of at least 1",
        ),
    ],
)
def test_a_number_out_of_range_is_refused(refused, main, argv, words):
    assert words in refused(main, *CONFIG, *argv)


def test_a_name_of_control_characters_is_shown_to_a_terminal(refused, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    shown = refused(program("decode"), "--model", "no\x1b[2J\x9bwhere", "--prompt", "a")
    assert shown.startswith(r"error: no\x1b[2J\x9bwhere: does not exist")
    monkeypatch.delenv("FORCE_COLOR")
    assert "no\x1b[2J\x9bwhere" in refused(
        program("decode"), "--model", "no\x1b[2J\x9bwhere", "--prompt", "a"
    )


@pytest.mark.parametrize(
    "name, needed",
    [
        ("decode", []),
        ("benchmark", []),
        ("evaluate", ["--task", "gsm8k", "--output", "answers.jsonl"]),
        ("lm-eval", ["--tasks", "gsm8k"]),
    ],
)
def test_programs_that_decode_take_the_kernels(name, needed):
    given = ["--model", "m", *needed]
    assert find(name).parsed(given).kernels == "auto"
    assert find(name).parsed([*given, *REFERENCE]).kernels == "reference"


def test_programs_with_a_configuration_take_the_kernels():
    """A kernel of attention beside them is refused."""
    for_training = [*CONFIG, "--workdir", "runs/x", *REFERENCE]
    assert find("train").parsed(for_training).fields.kernels == "reference"
    for_aot = [*CONFIG, "--topology", "h100:1", *REFERENCE]
    assert find("aot").parsed(for_aot).fields.kernels == "reference"
    message = 'attention "cudnn" needs kernels "auto": drop one of the two'
    with pytest.raises(ConfigError, match=message):
        find("train").parsed([*for_training, "--attention", "cudnn"])


def test_a_mistyped_config_is_named():
    with pytest.raises(ConfigError, match="--confg is not a flag: did you mean --config?"):
        find("train").parsed(["--confg", "quickstart"])


def test_a_configuration_has_a_name():
    """That of a file, or of one of those that lsjax comes with."""
    by_name = find("train").parsed(["--config", "quickstart", "--workdir", "x"])
    assert by_name.fields == find("train").parsed([*CONFIG, "--workdir", "x"]).fields
    with pytest.raises(ConfigError, match="--config nothing is no file.*choose from .*quickstart"):
        find("train").parsed(["--config", "nothing"])


def test_an_engine_gets_the_kernels(model_directory):
    opened = open_model(parse_as(ModelFlags, ["--model", str(model_directory), *REFERENCE]))
    assert load_engine(opened, notes_console()).runtime.kernels == "reference"
