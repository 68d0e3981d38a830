"""The program that answers tasks: every strategy, going on after a kill, bad rows."""

import dataclasses
import gzip
import json

import pytest
import tensorflow_datasets as tfds

from lsjax.checkpoints.run import begin_run
from lsjax.checkpoints.saving import Checkpoints
from lsjax.cli import evaluate
from lsjax.config import DataConfig, TrainConfig
from lsjax.data.shards import encode_documents
from lsjax.data.sources import document_source
from lsjax.evaluation import answers as stored
from lsjax.evaluation.answers import read
from lsjax.evaluation.scores import Cell
from lsjax.evaluation.tasks import TASKS
from lsjax.io.lines import Lines
from lsjax.training.step import init_state
from tests.data import tiny_questions  # noqa: F401 (TFDS knows it from then on)
from tests.programs import program

main = program("evaluate")

ROWS = ["en_query\ten_parse\tdomain"] + [
    f"{text}\t[IN:GET_{domain.upper()} {text} ]\t{domain}"
    for text, domain in [
        ("will it rain", "weather"),
        ("set alarm", "alarm"),
        ("is it cold", "weather"),
        ("wake me", "alarm"),
        ("any snow", "weather"),
    ]
]
EVERY = (
    *("--strategies", "autoregressive", "early_exit", "self_speculative"),
    *("--exit-layers", 2, 3, "--num-draft-tokens", 3),
)


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("topv2") / "test.tsv"
    file.write_text("\n".join(ROWS) + "\n")
    return file


@pytest.fixture
def run(model_directory, rows, tmp_path):
    """Runs the program on the rows; the answers of the file that it writes."""

    def evaluate(*options, output="out.jsonl", data=("--data", rows)):
        argv = ["--model", model_directory, "--max-new-tokens", 12]
        argv += [] if "--task" in options else ["--task", "topv2"]
        argv += ["--output", tmp_path / output]
        argv += [] if "--data" in options else data
        assert main([str(word) for word in (*argv, *options)]) == 0
        return read(tmp_path / output)[1]

    return evaluate


def untimed(answers):
    """The answers in one order, without what a clock says."""
    times = {"prefill_seconds", "decode_seconds", "compile_seconds", "tokens_per_second"}
    rows = [{name: one[name] for name in one.keys() - times} for one in answers]
    return sorted(rows, key=lambda row: (str(Cell.of(row)), row["id"], row["sample"]))


@pytest.mark.long
def test_every_strategy_answers_every_row(run, rows, tmp_path, capsys):
    (tmp_path / "train.tsv").write_text("\n".join([*ROWS[:2], "set alarm\tx\talarm"]))
    answers = run(*EVERY, "--without-seen", tmp_path / "train.tsv", "--limit", 4, "--offset", 1)
    names = {
        "autoregressive",
        *(f"early exit, exit {e}" for e in (2, 3)),
        *(f"self speculative, exit {e}, 3 drafts" for e in (2, 3)),
    }
    by_strategy = {name: [a for a in answers if str(Cell.of(a)) == name] for name in names}
    assert len(answers) == 5 * 4
    for own in by_strategy.values():
        assert [a["id"] for a in own] == [f"test.tsv:{n}" for n in (3, 4, 5, 6)]
        assert [a["group"] for a in own] == ["alarm", "weather", "alarm", "weather"]
        assert [a["seen"] for a in own] == [True, False, False, False]
        assert own[0]["reference"] == "[IN:GET_ALARM set alarm ]"
    texts = {name: [a["text"] for a in own] for name, own in by_strategy.items()}
    for exit_layer in (2, 3):
        assert texts[f"self speculative, exit {exit_layer}, 3 drafts"] == texts["autoregressive"]
        assert texts[f"early exit, exit {exit_layer}"] != texts["autoregressive"]

    summary = json.loads((tmp_path / "out.summary.json").read_text())
    assert summary["asked"]["prompt_template"] == "{en_query}\n"
    figures = {(row["strategy"], row["group"]): row for row in summary["figures"]}
    assert len(figures) == 5 * 4  # all, not seen, two domains
    assert figures["autoregressive", "not seen in training"]["examples"] == 3
    own = by_strategy["self speculative, exit 3, 3 drafts"]
    row = figures["self speculative, exit 3, 3 drafts", "all"]
    assert row["acceptance_rate"] == sum(a["accepted"] for a in own) / sum(
        a["drafted"] for a in own
    )
    assert row["equal"] == 1 > figures["early exit, exit 2", "all"]["equal"]
    printed = capsys.readouterr().out
    assert "self speculative, exit 3, 3 drafts" in printed and "exact_match" in printed
    assert "weather" not in printed


@pytest.mark.long
def test_a_killed_run_goes_on(run, rows, tmp_path, monkeypatch):
    two = ("--strategies", "autoregressive", "early_exit", "--exit-layers", 2, "--limit", 4)
    two += ("--batch-size", 2)
    whole = run(*two, output="whole.jsonl")
    write, count = Lines.write, 0

    def killed(self, line):
        nonlocal count
        count += 1
        if count == 6:
            with (tmp_path / "out.jsonl").open("a") as stream:
                stream.write('{"strategy": "early ex')
            raise KeyboardInterrupt
        write(self, line)

    monkeypatch.setattr(Lines, "write", killed)
    with pytest.raises(SystemExit) as exit_:
        run(*two)
    assert exit_.value.code == 130
    before = (tmp_path / "out.jsonl").read_text().splitlines()
    assert len(before) == 1 + 5 + 1
    monkeypatch.setattr(Lines, "write", write)
    answers = run(*two)
    assert (tmp_path / "out.jsonl").read_text().splitlines()[:6] == before[:6]
    assert untimed(answers) == untimed(whole)
    again = (tmp_path / "out.jsonl").read_bytes()
    run(*two)  # nothing is left to do
    assert (tmp_path / "out.jsonl").read_bytes() == again


def test_other_conditions_are_not_mixed_in(run, rows, tmp_path, refused, model_directory, capsys):
    """More examples and strategies are answered in the same file."""
    run("--limit", 1)
    answers = run("--limit", 2, "--strategies", "autoregressive", "early_exit", "--exit-layers", 2)
    assert [(a["exit_layer"], a["id"]) for a in answers] == [
        *((None, "test.tsv:2"), (None, "test.tsv:3"), (2, "test.tsv:2"), (2, "test.tsv:3")),
    ]
    assert "1 of 4 answers are already stored" in capsys.readouterr().err
    words = ("--model", model_directory, "--task", "topv2", "--output", tmp_path / "out.jsonl")
    words += ("--data", rows, "--limit", 2)
    assert "max_new_tokens was 12 and is now 9" in refused(main, *words, "--max-new-tokens", 9)
    # The summary is of what was asked.
    run("--limit", 1)
    summary = json.loads((tmp_path / "out.summary.json").read_text())
    assert [row["examples"] for row in summary["figures"]] == [1]


def test_bad_rows(run, rows, tmp_path, refused, model_directory, capsys):
    bad = tmp_path / "bad.tsv"
    lines = ROWS[:2] + ["no tabs", *ROWS[2:3], "\t[IN:X ]\talarm", "x" * 600 + "\ty\talarm"]
    bad.write_text("\n".join([*lines, *ROWS[3:5]]) + "\n")
    words = ("--model", model_directory, "--task", "topv2", "--output", tmp_path / "out.jsonl")
    assert f"{bad}, line 3 has 1 columns" in refused(main, *words, "--data", bad)
    answers = run("--data", bad, "--bad-rows", "skip", "--limit", 3)
    assert [answer["id"] for answer in answers] == [f"bad.tsv:{n}" for n in (2, 4, 7)]
    summary = json.loads((tmp_path / "out.summary.json").read_text())
    problems = "\n".join(summary["bad_rows"])
    assert len(summary["bad_rows"]) == 3
    assert "line 5 has an empty prompt" in problems
    assert "line 6: a prompt of 601 tokens and 12 new ones do not fit" in problems
    assert f"skipped: {bad}, line 3 has 1 columns" in capsys.readouterr().err


def test_a_run_is_asked_in_its_own_template(model, tokenizer, rows, tmp_path):
    """With the tokens that training has before a response, and its end token ends the answer."""
    data = DataConfig(
        source="tsv",
        paths=(str(rows),),
        prompt_template="Parse: {en_query} ->",
        response_template=" {en_parse}",
        tokenizer="bytes",
    )
    config = TrainConfig(model=model.config, data=data, num_steps=4, batch_size=2, seq_len=16)
    directory = tmp_path / "run"
    begin_run(directory, config, tokenizer)
    with Checkpoints(directory / "checkpoints", config.checkpoints) as checkpoints:
        state = init_state(config, model)
        checkpoints.save(state, step=1, data={})
    asked = []

    def spy(engine, strategies, questions, *rest, **more):
        asked.extend(questions)
        return []

    bad = tmp_path / "bad.tsv"  # with a bad row first
    bad.write_text("\n".join([ROWS[0], "no query\t\tx", *ROWS[1:]]))
    words = ("--task", "topv2", "--data", bad, "--output", tmp_path / "out.jsonl")
    words += ("--bad-rows", "skip")
    argv = [str(word) for word in ("--model", directory, *words, "--max-new-tokens", 4)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "complete", spy)
        main(argv)
    trained = list(document_source(data).documents())
    for question, document in zip(asked, trained, strict=True):
        ((ids, count),) = encode_documents([document], data, tokenizer)
        assert list(question.request.prompt) == ids[:count].tolist()
        assert question.reference == document.text
    assert tokenizer.decode(asked[0].request.prompt) == "Parse: will it rain ->"


def test_shots_of_a_tensorflow_data_set(run, tmp_path, monkeypatch):
    tfds.disable_progress_bar()
    task = dataclasses.replace(TASKS["gsm8k"], tfds="tiny_questions")
    monkeypatch.setitem(evaluate.TASKS, "gsm8k", task)
    (tmp_path / "tfds").mkdir()
    words = ("--task", "gsm8k", "--num-shots", 2, "--limit", 2, "--max-length", 256)
    answers = run(*words, "--tfds-data-dir", tmp_path / "tfds", data=())
    assert [answer["id"] for answer in answers] == ["test:0", "test:1"]
    assert answers[0]["reference"].startswith(" It is ")
    # Two shots of 41 to 45 characters, and a question.
    assert all(105 < answer["num_prompt_tokens"] < 125 for answer in answers)
    assert set(answers[0]["scores"]) == {"accuracy"}


def test_programs_are_run_only_if_allowed(run, tmp_path, capsys):
    pytest.importorskip("rouge_score")
    problem = {
        "prompt": "def one():\n",
        "canonical_solution": "    return 1\n",
        "test": "def check(f):\n    assert f() == 1\n",
        "entry_point": "one",
    }
    file = tmp_path / "HumanEval.jsonl.gz"
    with gzip.open(file, "wt") as stream:
        for number in range(2):
            stream.write(json.dumps(problem | {"task_id": f"HumanEval/{number}"}) + "\n")
    words = ("--task", "human_eval", "--temperature", 0.9, "--num-samples", 2, "--data", file)
    answers = run(*words, output="rouge.jsonl")
    assert set(answers[0]["scores"]) == {"rouge1", "rouge2", "rouge3", "rougeL"}
    answers = run(*words, "--allow-code-execution", "--seed", 7)
    assert [answer["scores"]["passed"] for answer in answers] == [0] * 4
    assert [(a["id"], a["sample"], a["seed"]) for a in answers] == [
        *(("HumanEval/0", 0, 7), ("HumanEval/0", 1, 8)),
        *(("HumanEval/1", 0, 9), ("HumanEval/1", 1, 10)),
    ]
    assert len({answer["text"] for answer in answers}) > 1
    assert "pass@1" in capsys.readouterr().out


def test_categories(run, tmp_path, capsys):
    pytest.importorskip("rouge_score")
    rows = [
        {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
        {"question_id": 82, "category": "stem", "turns": ["Why?", "Really?"]},
        {"question_id": 90, "category": "math_reasoning", "turns": ["?"], "reference": ["#### 3"]},
    ]
    file = tmp_path / "question.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("--task", "spec_bench", "--groups", "--data", file)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in printed[2:]] == [
        ["autoregressive", "all", "3"],
        ["math_reasoning", "1", "0"],
        ["mt_bench", "2", "-"],
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--limit", 0), "--limit 0 must be a whole number of at least 1"),
        (("--offset", 9), "no examples after the first 9"),
        (("--num-samples", 2), "--num-samples has no effect on greedy decoding"),
        (("--num-shots", 1), "1 shots need rows that are not evaluated"),
        (("--data", "/nowhere.tsv"), "no file matches /nowhere.tsv"),
        (("--strategies", "early_exit"), "early_exit needs --exit-layer"),
        (("--num-draft-tokens", 2), "--num-draft-tokens has no effect on autoregressive: add"),
        (("--prompt-template", "{query}"), "line 2 has no field 'query'"),
        (("--output", "/nowhere/out.jsonl"), "/nowhere/out.jsonl can't be written"),
        (("--output", "out.json"), "--output out.json is not a .jsonl file"),
        (("--system", "x"), "--system needs --chat"),
        (("--chat",), "this model has no chat template"),
        (("--allow-code-execution",), "--allow-code-execution has no effect on topv2"),
    ],
)
def test_bad_input(model_directory, rows, tmp_path, refused, monkeypatch, options, words):
    """Before the model is loaded."""
    monkeypatch.delattr("lsjax.cli.engines.load_engine")
    given = ["--model", model_directory, "--task", "topv2"]
    given += [] if "--data" in options else ["--data", rows]
    given += [] if "--output" in options else ["--output", tmp_path / "out.jsonl"]
    assert words in refused(main, *given, *options)
