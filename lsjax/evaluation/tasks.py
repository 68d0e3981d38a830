"""Table of tasks: how a row becomes a prompt with a reference, and how a text is scored.

Templates, shots and lengths of the summaries, cnn_dm_lm and human_eval are those of the paper's
benchmark.
"""

import re
from collections.abc import Callable
from decimal import Decimal
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

from lsjax.config import check
from lsjax.data.files import Fields
from lsjax.evaluation.examples import Example, Task
from lsjax.evaluation.extras import installed
from lsjax.evaluation.sandbox import run_program

Scores = dict[str, float]
Tree = tuple  # an intent (IN) or a slot (SL) of TOPv2: its label, and the words and trees inside

ROUGE_KINDS = ("rouge2", "rouge1", "rouge3", "rougeL")  # ROUGE-2 is the paper's
ANSWER_MARK = "####"  # before the final number of a GSM8K reference
# A minus belongs to the number unless it follows something to subtract from.
NUMBER = re.compile(r"(?:(?<![\w)])-)?\$?(\d[\d,]*(?:\.\d+)?)")
# Text after a complete function (the stop sequences of Chen et al., 2021, section 2.3).
FUNCTION_ENDS = re.compile("\nclass|\ndef|\n#|\nif|\nprint")
# Spec-Bench's file has MT-bench under eight labels.
MT_BENCH = (
    *("writing", "roleplay", "reasoning", "math"),
    *("coding", "extraction", "stem", "humanities"),
)


def rouge(text: str, reference: str) -> Scores:
    """ROUGE F-measures (Lin, 2004) over lower-case words with their punctuation, not stemmed.

    Words are split at white space, as in the paper's benchmark. rouge-score's own tokenizer drops
    punctuation, and so most of a program. Raises ConfigError if rouge-score is not installed.
    """
    found = _rouge_scorer().score(reference, text)
    return {kind: float(found[kind].fmeasure) for kind in ROUGE_KINDS}


@lru_cache
def _rouge_scorer() -> Any:
    words = SimpleNamespace(tokenize=lambda text: text.lower().split())
    scorer = installed("rouge_score.rouge_scorer", "eval").RougeScorer
    return scorer(list(ROUGE_KINDS), tokenizer=words)


def exact_match(text: str, reference: str) -> Scores:
    """Whether both are equal, apart from white space around them."""
    return {"exact_match": float(text.strip() == reference.strip())}


def accuracy(text: str, reference: str) -> Scores:
    """Whether both have the same final number (GSM8K)."""
    found = final_number(text)
    return {"accuracy": float(found is not None and found == final_number(reference))}


def final_number(text: str) -> Decimal | None:
    """The first number after ####, or else the last number of the text."""
    before, mark, after = text.partition(ANSWER_MARK)
    found = list(NUMBER.finditer(after if mark else before))
    if not found:
        return None
    chosen = found[0] if mark else found[-1]
    value = Decimal(chosen[1].replace(",", ""))
    return -value if chosen[0].startswith("-") else value


def parse_tree(text: str) -> Tree | None:
    """The tree that a text spells, ignoring white space; None unless it spells exactly one.

    [IN:CREATE_ALARM set alarm [SL:DATE_TIME for 2 hours ] ]
    """
    opened: list[list] = []
    pieces = re.findall(r"\[(?:IN|SL):\w*|\]|[^\s\[\]]+|\[", text)
    for number, piece in enumerate(pieces, 1):
        if re.match(r"\[(IN|SL):\w", piece):
            opened.append([piece[1:]])
        elif not opened:
            return None
        elif piece != "]":
            opened[-1].append(piece)
        else:
            tree = tuple(opened.pop())
            if not opened:
                return tree if number == len(pieces) else None
            opened[-1].append(tree)
    return None


def decoupled(tree: Tree) -> Tree:
    """The tree without the words that only repeat the utterance (Aghajanyan et al., 2020).

    Words are kept if they are the value of a slot without an intent.
    """
    label, *children = tree
    trees = [decoupled(child) for child in children if isinstance(child, tuple)]
    return tree if label.startswith("SL:") and not trees else (label, *trees)


def tree_match(text: str, reference: str) -> Scores:
    """Whether both have the same intents, slots and values of slots in the same order."""
    trees = [parse_tree(text), parse_tree(reference)]
    same = None not in trees and decoupled(trees[0]) == decoupled(trees[1])
    return {"tree_match": float(same)}


def function_body(text: str) -> str:
    """The text up to the end of the function (HumanEval)."""
    return FUNCTION_ENDS.split(text, maxsplit=1)[0]


def against_reference(*scores: Callable[[str, str], Scores]) -> Callable[[str, Example], Scores]:
    """A task's `score` that merges these scores of a text against the reference."""
    return lambda text, example: {
        name: value for one in scores for name, value in one(text, example.reference).items()
    }


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
    for name in ("test", "entry_point"):
        check(
            isinstance(row.get(name), str),
            f"has no text under {name!r}: name HumanEval's own file (docs/evaluation.md)",
        )
    return row


def tested_program(text: str, example: Example) -> str:
    """A program of HumanEval's prompt, the text, and the tests. It fails if a test fails."""
    prompt, test, name = (example.fields[key] for key in ("prompt", "test", "entry_point"))
    return f"{prompt}{function_body(text)}\n\n{test}\n\ncheck({name})\n"


def passed(text: str, example: Example) -> Scores:
    """Whether the function passes the problem's tests, and ROUGE."""
    outcome = run_program(tested_program(text, example))
    return {"passed": float(outcome.passed), **rouge(text, example.reference)}


def first_turn(row: Fields) -> Fields:
    """The row. If it has Spec-Bench's "turns", the first turn becomes the prompt."""
    match row:
        case {"turns": [str(prompt), *_]} if "prompt" not in row:
            return {**row, "prompt": prompt}
    return row


def spec_bench_question(row: Fields) -> Fields:
    """A question of Spec-Bench: its first turn, its first reference if that is a text, and one of
    six categories."""
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


def score_of_category(text: str, example: Example) -> Scores:
    """Spec-Bench: the final number in mathematics, ROUGE in summarization and translation."""
    match example.group:
        case "math_reasoning":
            return accuracy(text, example.reference)
        case "summarization" | "translation":
            return rouge(text, example.reference)
    return {}


_TASKS = (
    Task(
        name="cnn_dm_summarization",
        prompt_template="Article: {article}\nSummary:",
        response_template=" {highlights}",
        score=against_reference(rouge),
        num_shots=1,
        shot_response=one_line,
        after_shots="\n",
        tfds="cnn_dailymail",
    ),
    Task(
        name="xsum_summarization",
        prompt_template="Article: {document}\nSummary:",
        response_template=" {summary}",
        score=against_reference(rouge),
        shot_response=one_line,
        after_shots="\n",
        tfds="xsum",
    ),
    Task(
        name="cnn_dm_lm",
        prompt_template="{beginning}",
        response_template=" {rest}",
        score=against_reference(rouge),
        tfds="cnn_dailymail",
        change=beginning_and_rest,
    ),
    Task(
        name="human_eval",
        prompt_template="{prompt}",
        response_template="{canonical_solution}",
        score=against_reference(rouge),
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
