"""Tasks: how rows become examples, prompts with references, and which score rates a text.

Templates, shots and lengths of the summaries, cnn_dm_lm and human_eval are those of the paper's
benchmark.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice

from lsjax.config import ConfigError, DataConfig, check
from lsjax.data.pieces import Document
from lsjax.data.sources import row_document
from lsjax.decoding.request import Request
from lsjax.evaluation.answers import Question
from lsjax.evaluation.sandbox import run_program
from lsjax.evaluation.scores import Scores, accuracy, exact_match, rouge, tested_program, tree_match
from lsjax.io.rows import Fields, PlacedRow, Refuse, stop_at

TEMPLATES = ("prompt_template", "response_template", "allow_special")
SHOT_ROWS = 10_000  # rows that shots are drawn from
# Spec-Bench's file has MT-bench under eight labels.
MT_BENCH = ("writing", "roleplay", "reasoning", "math")
MT_BENCH += ("coding", "extraction", "stem", "humanities")


def against_reference(*scores: Callable[[str, str], Scores]) -> Callable[[str, Question], Scores]:
    """A task's `score` that merges these scores of a text against the reference."""
    return lambda text, question: {
        name: value for one in scores for name, value in one(text, question.reference).items()
    }


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task.

    prompt_template, response_template, allow_special: as in DataConfig, with names of fields.
    score: figures of a text, the main one first; ROUGE by default. Some examples may have none.
    score_by_running: like `score`, but runs the text as a program. max_new_tokens, num_shots, stop:
    defaults, which flags override. shot_response: changes the response of a shot. between_shots,
    after_shots: text after each shot, and after all of them.
    tfds: name of the TensorFlow data set, which has the splits test and train (for shots).
    change: changes a row before the templates read it. Raises ConfigError, whose message continues
    the row's location.
    id: field with a row's id; by default, the row's location. group: field with its category.
    """

    name: str
    prompt_template: str
    response_template: str
    allow_special: bool = False
    score: Callable[[str, Question], Scores] = against_reference(rouge)
    score_by_running: Callable[[str, Question], Scores] | None = None
    max_new_tokens: int = 512
    num_shots: int = 0
    shot_response: Callable[[str], str] = str
    between_shots: str = "\n"
    after_shots: str = ""
    stop: tuple[str, ...] = ()
    tfds: str | None = None
    change: Callable[[Fields], Fields] = dict
    id: str | None = None
    group: str | None = None
    needs_reference: bool = True

    def read(self, where: str, row: Fields) -> tuple[Fields, Document]:
        """The changed row, and its document. Raises ConfigError that begins with the location."""
        try:
            row = self.change(row)
        except ConfigError as error:
            raise ConfigError(f"{where} {error}") from None
        templates = {name: getattr(self, name) for name in TEMPLATES}
        data = DataConfig(source="jsonl", paths=(self.name,), **templates)
        return row, row_document(row, data, where)


def as_trained(task: Task, trained: DataConfig, rows: Iterable[PlacedRow]) -> Task:
    """The task with the templates of training, if the model was finetuned on such rows.

    rows: some rows of the task; the first that fits either template decides.
    """
    own = replace(task, **{name: getattr(trained, name) for name in TEMPLATES})
    for _, where, row in rows if trained.has_prompts else ():
        for one in (own, task):
            with suppress(ConfigError):
                one.read(where, row)
                return one
    return task


def choose_shots(task: Task, rows: Iterable[PlacedRow], count: int, seed: int) -> list[Document]:
    """`count` of the first SHOT_ROWS rows, drawn by the seed. Raises ConfigError for fewer rows."""
    found = [task.read(where, row)[1] for _, where, row in islice(rows, SHOT_ROWS)]
    check(
        len(found) >= count,
        f"{count} shots are requested, but there are {len(found)} rows for them: lower --num-shots",
    )
    return random.Random(seed).sample(found, count)


def make_questions(
    task: Task,
    rows: Iterable[PlacedRow],
    *,
    shots: Sequence[Document] = (),
    seen: Iterable[PlacedRow] = (),
    encode: Callable[[str], str | Sequence[int]] = str,
    refuse: Refuse = stop_at,
) -> Iterator[Question]:
    """The questions of a task, one per valid row.

    shots: precede each prompt. seen: training rows. encode: returns a prompt's ids, or raises
    ConfigError for a prompt that the model can't take. refuse: called with the error of each bad
    row; if it returns, the row is skipped.
    """
    parts = (f"{one.prompt}{task.shot_response(one.text)}{task.between_shots}" for one in shots)
    before = "".join(parts) + task.after_shots * bool(shots)
    known = {task.read(where, row)[1].prompt.strip() for _, where, row in seen}
    for name, where, row in rows:
        try:
            fields, own = task.read(where, row)
            check(
                bool(own.text.strip()) or not task.needs_reference,
                f"{where} has an empty response: add a text to compare with",
            )
            check(own not in shots, f"{where} is one of the shots: draw them from other rows")
            try:
                prompt = encode(before + own.prompt)
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from None
        except ConfigError as error:
            refuse(error)
            continue
        request = Request(prompt=prompt, max_new_tokens=task.max_new_tokens, stop=task.stop)
        yield Question(
            id=str(fields.get(task.id, name)),
            request=request,
            reference=own.text,
            group=str(fields.get(task.group, "")),
            seen=own.prompt.strip() in known,
            fields=fields,
        )


def one_line(text: str) -> str:
    """A shot's summary on one line. CNN/DM has a line per sentence, and a line end ends a shot."""
    return " ".join(text.splitlines())


def beginning_and_rest(row: Fields) -> Fields:
    """The row with its article split after the first 100 words."""
    article = row.get("article")
    article = article.decode(errors="replace") if isinstance(article, bytes) else article
    check(isinstance(article, str), "has no text under 'article': name files that have one")
    words = article.split()
    return {**row, "beginning": " ".join(words[:100]), "rest": " ".join(words[100:])}


def english_columns(row: Fields) -> Fields:
    """The row, with TOPv2's columns renamed as in the Hinglish-TOP files."""
    names = {"en_query": "utterance", "en_parse": "semantic_parse"}
    return {new: row[old] for new, old in names.items() if old in row} | dict(row)


def tested_problem(row: Fields) -> Fields:
    """A row of HumanEval. Raises ConfigError if it has no tests."""
    check(
        all(isinstance(row.get(name), str) for name in ("test", "entry_point")),
        "has no texts under test and entry_point: name HumanEval's own file (docs/evaluation.md)",
    )
    return row


def passed(text: str, question: Question) -> Scores:
    """Whether the function passes the problem's tests, and ROUGE."""
    failure = run_program(tested_program(text, question.fields))
    return {"passed": float(failure is None), **rouge(text, question.reference)}


def first_turn(row: Fields) -> Fields:
    """The row. If it has Spec-Bench's "turns", the first turn becomes the prompt."""
    match row:
        case {"turns": [str(prompt), *_]} if "prompt" not in row:
            return {**row, "prompt": prompt}
    return row


def spec_bench_question(row: Fields) -> Fields:
    """A question of Spec-Bench: its first turn, its first reference and one of six categories."""
    row, reference = first_turn(row), ""
    check(
        {"turns", "prompt", "category"} <= row.keys(),
        'is not a question of Spec-Bench: it needs "turns" and "category"',
    )
    category = "mt_bench" if row["category"] in MT_BENCH else row["category"]
    match row.get("reference"):
        case [str(first), *_] if category != "mt_bench":
            reference = first
    return {**row, "reference": reference, "category": category}


def score_of_category(text: str, question: Question) -> Scores:
    """Spec-Bench: the final number in mathematics, ROUGE in summarization and translation."""
    match question.group:
        case "math_reasoning":
            return accuracy(text, question.reference)
        case "summarization" | "translation":
            return rouge(text, question.reference)
    return {}


_TASKS = (
    Task(
        name="cnn_dm_summarization",
        prompt_template="Article: {article}\nSummary:",
        response_template=" {highlights}",
        num_shots=1,
        shot_response=one_line,
        after_shots="\n",
        tfds="cnn_dailymail",
    ),
    Task(
        name="xsum_summarization",
        prompt_template="Article: {document}\nSummary:",
        response_template=" {summary}",
        shot_response=one_line,
        after_shots="\n",
        tfds="xsum",
    ),
    Task(
        name="cnn_dm_lm",
        prompt_template="{beginning}",
        response_template=" {rest}",
        tfds="cnn_dailymail",
        change=beginning_and_rest,
    ),
    Task(
        name="human_eval",
        prompt_template="{prompt}",
        response_template="{canonical_solution}",
        score_by_running=passed,
        change=tested_problem,
        id="task_id",
    ),
    Task(
        name="topv2",
        prompt_template="{en_query}\n",
        response_template="{en_parse}",
        score=against_reference(exact_match, tree_match),
        max_new_tokens=80,
        change=english_columns,
        group="domain",
    ),
    Task(
        name="gsm8k",
        prompt_template="Question: {question}\nAnswer:",
        response_template=" {answer}",
        score=against_reference(accuracy),
        max_new_tokens=256,
        between_shots="\n\n",
        stop=("\nQuestion:",),
        tfds="gsm8k",
    ),
    Task(
        name="spec_bench",
        prompt_template="{prompt}",
        response_template="{reference}",
        score=score_of_category,
        change=spec_bench_question,
        id="question_id",
        group="category",
        needs_reference=False,
    ),
    Task(
        name="pairs",
        prompt_template="{prompt}",
        response_template="{response}",
        score=against_reference(exact_match, rouge),
        max_new_tokens=128,
    ),
)
TASKS = {task.name: task for task in _TASKS}
