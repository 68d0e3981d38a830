"""Flags: what is wrong with them is said in one line."""

import importlib
import pkgutil
import re
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
from tyro import _fmtlib

from lsjax import cli
from lsjax.aot.decoding import DecodingShape
from lsjax.checkpoints.run import RunSource
from lsjax.cli import (
    aot,
    benchmark,
    convert,
    count_tokens,
    decode,
    evaluate,
    exits,
    lm_eval,
    prompts,
    tokenize,
    train,
    training,
)
from lsjax.cli.flags import (
    ModelFlags,
    OpenModel,
    SamplingFlags,
    StrategyFlags,
    load_engine,
    make_strategies,
    open_model,
    trained_exits,
)
from lsjax.cli.setup import parse_flags
from lsjax.cli.show import notes_console
from lsjax.cli.training import TrainingFlags
from lsjax.config import Checked, ConfigError, DataConfig, LlamaConfig, OptimizerConfig
from lsjax.decoding.auto.adaptive import Adaptive
from lsjax.decoding.cost import best_draft_vocab
from lsjax.decoding.sampling import GREEDY, Sampling
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.strategy import Autoregressive, EarlyExit
from lsjax.training.hosts import Hosts

CONFIG = ("--config", str(Path(__file__).parents[2] / "configs" / "quickstart.py"))

REFERENCE = ["--kernels", "reference"]


@dataclass(frozen=True)
class Flags:
    """A program's."""

    number: int = 1
    kind: str = "a"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


def test_good_flags():
    flags = parse_flags(Flags, ["--number", "3", "--optimizer.learning-rate", "0.5"], "")
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
            "Unrecognized options: --optimizer.learning-rat, 1; Perhaps you meant: "
            "--optimizer.learning-rate FLOAT Highest learning rate, reached after warm-up. "
            "(default: 0.0003); --help lists all flags",
        ),
        (
            ["--number", "x"],
            "Error parsing --number: invalid literal for int() with base 10: 'x'; Argument "
            "helptext: --number INT (default: 1); --help lists all flags",
        ),
        (["y"], "Unrecognized options: y; --help lists all flags"),
    ],
)
@pytest.mark.parametrize("terminal", [False, True])
def test_one_line(argv, message, terminal, capsys, monkeypatch):
    if terminal:  # boxes of lines, and colours
        monkeypatch.setattr(_fmtlib, "_FORCE_UTF8_BOXES", True)
        monkeypatch.setattr(_fmtlib, "_FORCE_ANSI", True)
    with pytest.raises(ConfigError) as error:
        parse_flags(Flags, argv, "")
    assert str(error.value) == message
    assert capsys.readouterr().err == ""


def test_help_goes_to_the_terminal(capsys):
    with pytest.raises(SystemExit) as end:
        parse_flags(Flags, ["--help"], "What it does.")
    assert not end.value.code
    assert "What it does." in capsys.readouterr().out


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
    flags = parse_flags(Shared, argv, "")
    assert flags.sampling == Sampling(temperature=0.5)
    source = SimpleNamespace(config=LlamaConfig.tiny())
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
def test_exits_that_a_run_was_trained_with(tokenizer, early_exit, exits):
    source = object.__new__(RunSource)
    source.config, source.early_exit = LlamaConfig.tiny(num_layers=32), early_exit
    model = OpenModel(ModelFlags(model=Path("nowhere")), source, tokenizer, None)
    assert trained_exits(model) == exits
    flags = parse_flags(Shared, ["--strategy", "auto"], "")
    assert make_strategies(flags, model) == [Adaptive(exits)]


def test_exits_of_a_model_that_names_one(tokenizer, tmp_path):
    model = OpenModel(
        ModelFlags(model=tmp_path), SimpleNamespace(config=LlamaConfig.tiny()), tokenizer, None
    )
    assert trained_exits(model) == ()
    (tmp_path / "generation_config.json").write_text('{"assistant_early_exit": 3}')
    assert trained_exits(model) == (1, 2, 3)


def test_auto_chooses_a_draft_vocabulary(tokenizer, tmp_path):
    """By the counts; --draft-vocab sets another size."""
    config = LlamaConfig.smollm2_135m()
    tokenizer = SimpleNamespace(vocab_size=config.vocab_size)
    counts = {token: 1_000_000 // (token + 1) for token in range(20_000)}
    model = OpenModel(
        ModelFlags(model=Path("nowhere")), SimpleNamespace(config=config), tokenizer, None
    )
    auto = ["--strategy", "auto", "--exit-layers", "8", "15"]
    (chosen,) = make_strategies(parse_flags(Shared, auto, ""), model, counts)
    assert chosen.exits == (8, 15) and chosen.draft_vocab == best_draft_vocab(config, 15, counts)
    (chosen,) = make_strategies(
        parse_flags(Shared, [*auto, "--draft-vocab", "99"], ""), model, counts
    )
    assert chosen.draft_vocab == 99


def flag_classes() -> set[type]:
    """Every dataclass that lsjax.cli defines, and those of their fields."""
    names = [f"lsjax.cli.{module.name}" for module in pkgutil.iter_modules(cli.__path__)]
    waiting = [
        found
        for module in map(importlib.import_module, names)
        for found in vars(module).values()
        if is_dataclass(found) and found.__module__ == module.__name__
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
    assert {TrainingFlags, Hosts, Sampling, DecodingShape, DataConfig} < classes
    assert [kind for kind in classes if not issubclass(kind, Checked)] == []


@pytest.mark.parametrize(
    ("main", "argv", "flag"),
    [
        (train.main, [*CONFIG, "--workdir", ""], "--workdir"),
        (train.main, ["--config", "", "--workdir", "x"], "--config"),
        (decode.main, ["--model", "", "--prompt", "a"], "--model"),
        (decode.main, ["--model", "x", "--prompt-file", ""], "--prompt-file"),
        (decode.main, ["--model", "x", "--prompt", "a", "--json", ""], "--json"),
        (exits.main, ["--runs", "x", ""], "--runs"),
        (tokenize.main, ["--config", ""], "--config"),
        (aot.main, [*CONFIG, "--topology", "v5e:1", "--output", ""], "--output"),
        (count_tokens.main, ["--model", "", "--text", "x"], "--model"),
        (convert.main, ["", "x"], "source"),
    ],
)
def test_an_empty_path_is_refused_with_its_flag(refused, main, argv, flag):
    assert re.match(rf"error: {flag} .*''.* must be .*a path", refused(main, *argv))


def test_a_run_needs_a_directory(refused):
    assert "--workdir is missing: name the directory of the run" in refused(train.main, *CONFIG)


@pytest.mark.parametrize(
    ("main", "argv", "words"),
    [
        (tokenize.main, ["--workers", 0], "--workers 0 must be a whole number of at least 1"),
        (
            aot.main,
            ["--topology", "v5e:1", "--decoding.batch-size", 0],
            "--decoding.batch-size (0,) must be a tuple, each item a whole number of at least 1",
        ),
        (
            train.main,
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
    shown = refused(decode.main, "--model", "no\x1b[2J\x9bwhere", "--prompt", "a")
    assert shown.startswith(r"error: no\x1b[2J\x9bwhere: does not exist")
    monkeypatch.delenv("FORCE_COLOR")
    assert "no\x1b[2J\x9bwhere" in refused(
        decode.main, "--model", "no\x1b[2J\x9bwhere", "--prompt", "a"
    )


@pytest.mark.parametrize(
    "program, needed",
    [
        (prompts, []),
        (benchmark, []),
        (evaluate, ["--task", "gsm8k", "--output", "answers.jsonl"]),
        (lm_eval, ["--tasks", "gsm8k"]),
    ],
)
def test_programs_that_decode_take_the_kernels(program, needed):
    given = ["--model", "m", *needed]
    assert parse_flags(program.Arguments, given, "").kernels == "auto"
    assert parse_flags(program.Arguments, [*given, *REFERENCE], "").kernels == "reference"


def test_programs_with_a_configuration_take_the_kernels():
    """A kernel of attention beside them is refused."""
    for_training = [*CONFIG, "--workdir", "runs/x", *REFERENCE]
    found = training.parse_config(training.TrainingFlags, for_training, "")
    assert found.fields.kernels == "reference"
    for_aot = [*CONFIG, "--topology", "h100:1", *REFERENCE]
    assert aot.parse(aot.Arguments, for_aot, "").fields.kernels == "reference"
    message = 'attention "cudnn" needs kernels "auto": drop one of the two'
    with pytest.raises(ConfigError, match=message):
        training.parse_config(training.TrainingFlags, [*for_training, "--attention", "cudnn"], "")


def test_an_engine_gets_the_kernels(model_directory):
    opened = open_model(parse_flags(ModelFlags, ["--model", str(model_directory), *REFERENCE], ""))
    assert load_engine(opened, notes_console()).runtime.kernels == "reference"
