"""The tasks: how a row becomes a prompt with its reference, and what scores a text.

Templates, shots and lengths of the summaries, cnn_dm_lm and human_eval are those of the paper's
benchmark.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from lsjax.config import check
from lsjax.data.sources import Fields
from lsjax.evaluation import metrics
from lsjax.evaluation.sandbox import run_program

Scores = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row of a task.

    id: of the row, unique in its data. prompt: text, shots included. reference: what a text is
    compared with; empty where the row has none. group: its category, counted beside the whole.
    seen: whether given training rows have the same prompt. fields: of the row.
    """

    id: str
    prompt: str
    reference: str = ""
    group: str = ""
    seen: bool = False
    fields: Fields = field(default_factory=dict, repr=False)


def against_reference(*scores: Callable[[str, str], Scores]) -> Callable[[str, Example], Scores]:
    """A task's `score` that joins these, which compare a text with the reference."""

    def score(text: str, example: Example) -> Scores:
        return {name: x for one in scores for name, x in one(text, example.reference).items()}

    return score


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task.

    prompt_template, response_template: as in DataConfig, with the names of a row's fields.
    score: figures of a text, each from 0 to 1, the main one first; some examples may have none.
    score_by_running: the same, and runs the text as a program.
    max_new_tokens, num_shots, stop: defaults, which flags change.
    shot_response: changes the response of a shot. between_shots: what follows each shot.
    after_shots: what follows all of them.
    tfds: name of the TensorFlow data set, its split, and the split of its shots.
    change: changes a row before the templates read it. Raises ConfigError whose message continues
    from where the row stands.
    id: the field that is a row's id; by default where it stands. group: the field of its category.
    """

    name: str
    prompt_template: str
    response_template: str
    score: Callable[[str, Example], Scores] = against_reference(metrics.rouge)
    max_new_tokens: int = 512
    score_by_running: Callable[[str, Example], Scores] | None = None
    num_shots: int = 0
    shot_response: Callable[[str], str] = str
    between_shots: str = "\n"
    after_shots: str = ""
    stop: tuple[str, ...] = ()
    tfds: tuple[str, str, str] | None = None
    change: Callable[[Fields], Fields] = dict
    id: str | None = None
    group: str | None = None
    needs_reference: bool = True


def one_line(text: str) -> str:
    """A shot's summary on one line: CNN/DM's have a line a sentence, and a line end ends a shot."""
    return " ".join(text.splitlines())


def beginning_and_rest(row: Fields) -> Fields:
    """The row with its article split behind its first 100 words."""
    article = row.get("article")
    check(isinstance(article, str | bytes), "has no text under 'article': name files that have one")
    words = (article.decode(errors="replace") if isinstance(article, bytes) else article).split()
    return {**row, "beginning": " ".join(words[:100]), "rest": " ".join(words[100:])}


def english_columns(row: Fields) -> Fields:
    """TOPv2's rows under the names that the Hinglish-TOP files give its English columns."""
    names = {"en_query": "utterance", "en_parse": "semantic_parse"}
    return {new: row[old] for new, old in names.items() if old in row} | dict(row)


def tested_problem(row: Fields) -> Fields:
    """A row of HumanEval, if it has what its text is tested by."""
    for name in ("test", "entry_point"):
        check(
            isinstance(row.get(name), str),
            f"has no text under {name!r}: name HumanEval's own file (docs/evaluation.md)",
        )
    return row


def tested_program(text: str, example: Example) -> str:
    """HumanEval's prompt with the text, and its tests: a program that fails if they do."""
    prompt, test, name = (example.fields[key] for key in ("prompt", "test", "entry_point"))
    return f"{prompt}{metrics.function_body(text)}\n\n{test}\n\ncheck({name})\n"


def passed(text: str, example: Example) -> Scores:
    """Whether the function passes the problem's tests; and ROUGE."""
    passed = run_program(tested_program(text, example)).passed
    return {"passed": float(passed), **metrics.rouge(text, example.reference)}


# Spec-Bench's file has MT-bench under eight labels.
MT_BENCH = (
    *("writing", "roleplay", "reasoning", "math"),
    *("coding", "extraction", "stem", "humanities"),
)


def first_turn(row: Fields) -> Fields:
    """A question of Spec-Bench: its first turn, its first reference if that is a text, and one of
    six categories."""
    match row:
        case {"turns": [str(prompt), *_], "category": str(category)}:
            pass
        case _:
            check(False, 'is no question of Spec-Bench: it needs "turns" and "category"')
    match row.get("reference"):
        case [str(reference), *_] if category not in MT_BENCH:
            pass
        case _:
            reference = ""
    category = "mt_bench" if category in MT_BENCH else category
    return {**row, "prompt": prompt, "reference": reference, "category": category}


def score_of_category(text: str, example: Example) -> Scores:
    """Spec-Bench: the final number in mathematics, ROUGE in summarization and translation."""
    match example.group:
        case "math_reasoning":
            return metrics.accuracy(text, example.reference)
        case "summarization" | "translation":
            return metrics.rouge(text, example.reference)
    return {}


_TASKS = (
    Task(
        name="cnn_dm_summarization",
        prompt_template="Article: {article}\nSummary:",
        response_template=" {highlights}",
        num_shots=1,
        shot_response=one_line,
        after_shots="\n",
        tfds=("cnn_dailymail", "test", "train"),
    ),
    Task(
        name="xsum_summarization",
        prompt_template="Article: {document}\nSummary:",
        response_template=" {summary}",
        shot_response=one_line,
        after_shots="\n",
        tfds=("xsum", "test", "train"),
    ),
    Task(
        name="cnn_dm_lm",
        prompt_template="{beginning}",
        response_template=" {rest}",
        tfds=("cnn_dailymail", "test", "train"),
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
        score=against_reference(metrics.exact_match, metrics.tree_match),
        max_new_tokens=80,
        change=english_columns,
        group="domain",
    ),
    Task(
        name="gsm8k",
        prompt_template="Question: {question}\nAnswer:",
        response_template=" {answer}",
        score=against_reference(metrics.accuracy),
        max_new_tokens=256,
        between_shots="\n\n",
        stop=("\nQuestion:",),
        tfds=("gsm8k", "test", "train"),
    ),
    Task(
        name="spec_bench",
        prompt_template="{prompt}",
        response_template="{reference}",
        score=score_of_category,
        change=first_turn,
        id="question_id",
        group="category",
        needs_reference=False,
    ),
    Task(
        name="pairs",
        prompt_template="{prompt}",
        response_template="{response}",
        score=against_reference(metrics.exact_match, metrics.rouge),
        max_new_tokens=128,
    ),
)
TASKS = {task.name: task for task in _TASKS}
