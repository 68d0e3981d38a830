"""Prompts as they are asked, letter by letter, and scores that were worked out by hand."""

import dataclasses
import gzip
import json
from decimal import Decimal

import pytest

from lsjax.config import ConfigError, DataConfig
from lsjax.data.sources import tfds_builder
from lsjax.decoding.request import Request
from lsjax.evaluation import scores
from lsjax.evaluation.answers import Question
from lsjax.evaluation.scores import example_scores, final_number, pass_at_k, rouge
from lsjax.evaluation.tasks import TASKS, as_trained, choose_shots, make_questions
from lsjax.io.rows import file_rows

NUMBERS = " ".join(map(str, range(120)))
FIRST = " ".join(map(str, range(100)))
REST = " ".join(map(str, range(100, 120)))

ROWS = {  # task: fields, id, prompt, reference, group
    "cnn_dm_summarization": (
        {"article": "A dog ran.", "highlights": "Dog runs.", "id": "x"},
        *("rows.jsonl:1", "Article: A dog ran.\nSummary:", " Dog runs.", ""),
    ),
    "cnn_dm_lm": (
        {"article": NUMBERS, "highlights": "-"},
        *("rows.jsonl:1", FIRST, f" {REST}", ""),
    ),
    "xsum_summarization": (
        {"document": "A dog ran.", "summary": "Dog runs.", "id": 7},
        *("rows.jsonl:1", "Article: A dog ran.\nSummary:", " Dog runs.", ""),
    ),
    "human_eval": (
        {
            "task_id": "HumanEval/0",
            "prompt": "def one():\n",
            "canonical_solution": "    return 1\n",
            "test": "def check(f):\n    assert f() == 1\n",
            "entry_point": "one",
        },
        *("HumanEval/0", "def one():\n", "    return 1\n", ""),
    ),
    "topv2": (
        {"en_query": "stop it", "en_parse": "[IN:STOP stop it ]", "domain": "timer"},
        *("rows.jsonl:1", "stop it\n", "[IN:STOP stop it ]", "timer"),
    ),
    "gsm8k": (
        {"question": "1 + 1?", "answer": "It is 2.\n#### 2"},
        *("rows.jsonl:1", "Question: 1 + 1?\nAnswer:", " It is 2.\n#### 2", ""),
    ),
    "spec_bench": (
        {"question_id": 81, "category": "coding", "turns": ["Sort.", "Now faster."]},
        *("81", "Sort.", "", "mt_bench"),
    ),
    "pairs": (
        {"prompt": "2 * 3 =", "response": " 6"},
        *("rows.jsonl:1", "2 * 3 =", " 6", ""),
    ),
}


@pytest.fixture
def examples(tmp_path):
    """Examples of a task that is given its rows."""

    def make(name, *rows, problems=None, seen=()):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = TASKS[name]
        refuse = {} if problems is None else {"refuse": problems.append}
        rows = file_rows([str(file)])
        return list(make_questions(task, rows, seen=seen, **refuse))

    return make


def test_every_task_is_here():
    assert ROWS.keys() == TASKS.keys()


@pytest.mark.parametrize("name", ROWS)
def test_prompts_and_references(examples, name):
    fields, id_, prompt, reference, group = ROWS[name]
    (example,) = examples(name, fields)
    assert (example.id, example.request.prompt, example.reference) == (id_, prompt, reference)
    assert example.group == group and not example.seen


def test_columns_of_topv2_itself(examples):
    row = {"domain": "timer", "utterance": "stop it", "semantic_parse": "[IN:STOP stop it ]"}
    (example,) = examples("topv2", row)
    assert (example.request.prompt, example.reference) == ("stop it\n", "[IN:STOP stop it ]")


def test_shots_stand_before_the_prompt(tmp_path):
    file = tmp_path / "train.csv"  # quoted commas and line ends
    file.write_text('article,highlights\n"A, b\nc","one .\nmore ."\nD,two\nE,three\n')
    task = TASKS["cnn_dm_summarization"]

    def drawn(seed):
        shots = choose_shots(task, file_rows([str(file)]), 2, seed=seed)
        (question,) = make_questions(task, [("a", "a", asked)], shots=shots)
        return question.request.prompt.removesuffix("Article: F\nSummary:")

    asked = {"article": "F", "highlights": "four"}
    # Of a shot the summary is one line; the article is as it is.
    three = {"Article: A, b\nc\nSummary: one . more .\n", "Article: D\nSummary: two\n"}
    three |= {"Article: E\nSummary: three\n"}
    assert drawn(0) == drawn(0)
    assert {drawn(seed) for seed in range(40)} == {a + b + "\n" for a in three for b in three - {a}}
    shots = choose_shots(task, file_rows([str(file)]), 2, seed=0)
    with pytest.raises(ConfigError, match="4 shots are requested, but there are 3 rows"):
        choose_shots(task, file_rows([str(file)]), 4, seed=0)

    found, problems = [], []
    rows = file_rows([str(file)])
    found = list(make_questions(task, rows, shots=shots, refuse=problems.append))
    (left,) = {"A, b\nc", "D", "E"} - {
        shot.prompt[len("Article: ") : -len("\nSummary:")] for shot in shots
    }
    assert [one.request.prompt for one in found] == [f"{drawn(0)}Article: {left}\nSummary:"]
    assert len(problems) == 2 and "is one of the shots" in str(problems[0])


def test_gsm8k_shots_stand_a_line_apart():
    task = TASKS["gsm8k"]
    rows = [("a", "a", {"question": "1 + 1?", "answer": "#### 2"})]
    shots = choose_shots(task, rows, 1, seed=0)
    before = "Question: 1 + 1?\nAnswer: #### 2\n\n"
    # A row of which the shot has the letters is not the shot.
    other = ("b", "b", {"question": "1 + 1?", "answer": "#"})
    (example,) = make_questions(task, [other], shots=shots)
    assert example.request.prompt == f"{before}Question: 1 + 1?\nAnswer:"


def test_prompts_that_training_has_seen(examples):
    rows = [{"prompt": p, "response": "r"} for p in ("a", " b", "c")]
    training = [("x", "x", {"prompt": "b ", "response": "other"})]
    assert [one.seen for one in examples("pairs", *rows, seen=training)] == [False, True, False]


def test_a_finetuned_model_is_asked_as_it_was_trained():
    row = {"utterance": "stop", "semantic_parse": "[IN:STOP ]", "en_query": "stop"}
    row["en_parse"] = row["semantic_parse"]
    trained = DataConfig(
        source="tsv",
        paths=("train.tsv",),
        prompt_template="Parse {utterance}:",
        response_template=" {semantic_parse}",
    )
    task = TASKS["topv2"]
    rows = [("a", "a", fields) for fields in ({}, {"utterance": "x"}, row)]
    (example,) = make_questions(as_trained(task, trained, rows), [("a", "a", row)])
    assert (example.request.prompt, example.reference) == ("Parse stop:", " [IN:STOP ]")
    for other in (DataConfig(), dataclasses.replace(trained, prompt_template="{question}")):
        assert as_trained(task, other, [("a", "a", row)]) is task


@pytest.mark.parametrize(
    ("name", "row", "problem"),
    [
        ("pairs", {"prompt": "a"}, "line 2 has no field 'response', it has prompt"),
        ("pairs", {"prompt": "", "response": "b"}, "line 2 has an empty prompt"),
        ("pairs", {"prompt": "a", "response": " "}, "line 2 has an empty response"),
        ("pairs", {"prompt": None, "response": "b"}, "line 2: prompt is None"),
        ("spec_bench", {"turns": ["a"]}, "line 2 is not a question of Spec-Bench"),
        ("spec_bench", {"turns": [], "category": "qa"}, "line 2 is not a question of Spec-Bench"),
        ("cnn_dm_lm", {"highlights": "a"}, "line 2 has no text under 'article'"),
        ("cnn_dm_lm", {"article": "too short"}, "line 2 has an empty response"),
    ],
)
def test_bad_rows_are_named(examples, name, row, problem):
    good = ROWS[name][0]
    with pytest.raises(ConfigError, match="rows.jsonl, line 2") as error:
        examples(name, good, row, good)
    assert problem in str(error.value)
    problems = []
    assert len(examples(name, good, row, good, problems=problems)) == 2
    assert [problem in str(one) for one in problems] == [True]


def test_files_of_every_kind(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as stream:
        stream.write('{"x": 1}\n')
    (tmp_path / "b.tsv").write_text("x\n2\n")
    (tmp_path / "c.csv").write_text('x,y\n"a\nb",1\n\nc,2,3\nd,4\n')
    problems = []
    rows = list(file_rows([str(tmp_path / "?.*")], problems.append))
    assert [(name, row) for name, _, row in rows] == [
        ("a.jsonl.gz:1", {"x": 1}),
        ("b.tsv:2", {"x": "2"}),
        ("c.csv:2", {"x": "a\nb", "y": "1"}),
        ("c.csv:6", {"x": "d", "y": "4"}),
    ]
    assert "c.csv, line 5 has 3 columns, but the header has 2" in str(problems[0])
    (tmp_path / "d.gz").write_text("no rows")
    with pytest.raises(ConfigError, match="extension '' is not one of .jsonl, .tsv, .csv"):
        next(file_rows([str(tmp_path / "d.gz")]))
    (tmp_path / "e.jsonl.gz").write_text("{}\n")
    with pytest.raises(ConfigError, match="cannot be decompressed"):
        next(file_rows([str(tmp_path / "e.jsonl.gz")]))
    packed = bytearray(gzip.compress(b"{}\n"))
    packed[10] |= 0b111  # behind the header: a block of a kind that there is not
    (tmp_path / "f.jsonl.gz").write_bytes(packed)
    with pytest.raises(ConfigError, match="cannot be decompressed"):
        next(file_rows([str(tmp_path / "f.jsonl.gz")]))


def test_rouge_by_hand():
    """5 of 6 words are shared, in order; 3 of 5 pairs; 1 of 4 triples."""
    pytest.importorskip("rouge_score")
    found = rouge("The cat sat on the mat!", "the cat is on the mat!")
    expected = {"rouge2": 3 / 5, "rouge1": 5 / 6, "rouge3": 1 / 4, "rougeL": 5 / 6}
    assert found == pytest.approx(expected) and next(iter(found)) == "rouge2"
    assert set(rouge("", "the cat").values()) == {0.0}
    # Signs are words or parts of words: of 4 pairs 1 is among the other's 2.
    assert rouge("x = y % 1.0", "x = y%1.0")["rouge2"] == pytest.approx(2 * 1 / (4 + 2))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7 ducks", "7"),
        (" He has $1,234.50 left.", "1234.50"),
        ("2 * 9 = 18\n#### 18\nQuestion: 5?", "18"),
        ("it is -5", "-5"),
        ("#### -$5", "-5"),
        ("5 remain (16-3)", "3"),
        ("no number", None),
        ("12 and ####", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_gsm8k_accuracy():
    request = Request(prompt="?")
    example = Question(id="1", request=request, reference="9 * 2 = <<9*2=18>>18\n#### 18")
    score = TASKS["gsm8k"].score
    assert score("That makes 18.00.", example) == {"accuracy": 1}
    assert score("18 minus 1", example) == {"accuracy": 0}


def test_spec_bench_scores_what_has_a_reference(examples):
    rows = [
        {"question_id": 1, "category": "math_reasoning", "turns": ["?"], "reference": ["#### 3"]},
        {"question_id": 2, "category": "rag", "turns": ["?"], "reference": [["a name"]]},
        {"question_id": 3, "category": "math", "turns": ["?", "?"], "reference": ["3", ""]},
    ]
    score = TASKS["spec_bench"].score
    made = examples("spec_bench", *rows)
    assert [one.group for one in made] == ["math_reasoning", "rag", "mt_bench"]
    assert [score("3", one) for one in made] == [{"accuracy": 1}, {}, {}]


def test_a_text_is_run_with_its_prompt_and_the_problem_s_tests(examples):
    pytest.importorskip("rouge_score")
    (example,) = examples("human_eval", ROWS["human_eval"][0])
    run = TASKS["human_eval"].score_by_running
    assert run("    return 1\n\ndef other(:", example)["passed"] == 1
    assert run("    return 2\n", example)["passed"] == 0


@pytest.mark.parametrize("change", [{"test": None}, {"entry_point": 1}])
def test_a_problem_without_tests_is_a_bad_row(examples, change):
    with pytest.raises(ConfigError, match="line 1 has no texts under test and entry_point"):
        examples("human_eval", ROWS["human_eval"][0] | change)


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.tfds])
def test_tensorflow_data_sets_have_these_names(name, tmp_path):
    builder = tfds_builder(TASKS[name].tfds, data_dir=str(tmp_path))
    assert not builder.is_prepared()


def test_a_function_ends_where_the_next_thing_begins():
    problem = {"prompt": "def f(x):\n", "test": "T", "entry_point": "f"}
    body = "    if x:\n        return 1\n    # no\n    return 2\n"
    program = f"def f(x):\n{body}\n\nT\n\ncheck(f)\n"
    assert scores.tested_program(body, problem) == program
    for rest in ("\ndef other():\n    pass", "\nclass A:", "\n# Test", "\nif x:", "\nprint(1)"):
        assert scores.tested_program(body + rest + body, problem) == program


def test_pass_at_k():
    """2 of 5 samples passed: 2 drawn at once both fail with 3/5 * 2/4."""
    assert pass_at_k(5, 2, 1) == pytest.approx(2 / 5)
    assert pass_at_k(5, 2, 2) == pytest.approx(1 - 3 / 5 * 2 / 4)
    assert (pass_at_k(5, 0, 2), pass_at_k(5, 4, 2)) == (0, 1)
    answers = [
        {"id": name, "scores": {"passed": float(number < good), "rouge2": 0.5}}
        for name, good in (("a", 1), ("b", 0))
        for number in range(10)
    ]
    found = example_scores(answers)
    assert list(found) == ["pass@1", "pass@10", "rouge2"]
    assert found["pass@1"] == pytest.approx([0.1, 0.0])
    assert found["pass@10"] == [1, 0]
