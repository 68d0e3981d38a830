"""Scores of a text against its reference, and figures of a strategy over many answers."""

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from types import SimpleNamespace
from typing import Any, NamedTuple

from lsjax.decoding.strategy import Strategy
from lsjax.evaluation import installed

Answer = Mapping[str, Any]  # a line of a file of answers
Scores = dict[str, float]  # by name, each from 0 to 1
Tree = tuple  # an intent (IN) or a slot (SL) of TOPv2: its label, and the words and trees inside

ALL, UNSEEN = "all", "not seen in training"  # groups besides the task's categories
PASS_AT = (1, 10, 100)
DEEPEST = 100  # levels of a tree, many more than a sentence has
ROUGE_KINDS = ("rouge2", "rouge1", "rouge3", "rougeL")  # ROUGE-2 is the paper's
# A minus belongs to the number unless it follows something to subtract from.
NUMBER = re.compile(r"(?:(?<![\w)])-)?\$?\d[\d,]*(?:\.\d+)?")
# Text after a complete function (the stop sequences of Chen et al., 2021, section 2.3).
FUNCTION_ENDS = re.compile("\nclass|\ndef|\n#|\nif|\nprint")


def rouge(text: str, reference: str) -> Scores:
    """ROUGE F-measures (Lin, 2004) over lower-case words with their punctuation, not stemmed.

    Words are split at white space, as in the paper's benchmark. rouge-score's own tokenizer drops
    punctuation, and so most of a program. Raises ConfigError if rouge-score is not installed.
    """
    words = SimpleNamespace(tokenize=lambda text: text.lower().split())
    library = installed("rouge_score.rouge_scorer", "eval")
    found = library.RougeScorer(ROUGE_KINDS, tokenizer=words).score(reference, text)
    return {kind: float(found[kind].fmeasure) for kind in ROUGE_KINDS}


def exact_match(text: str, reference: str) -> Scores:
    """Whether both are equal, apart from white space around them."""
    return {"exact_match": float(text.strip() == reference.strip())}


def accuracy(text: str, reference: str) -> Scores:
    """Whether both have the same final number (GSM8K)."""
    found = final_number(text)
    return {"accuracy": float(found is not None and found == final_number(reference))}


def final_number(text: str) -> Decimal | None:
    """The first number after ####, or else the last number of the text."""
    before, mark, after = text.partition("####")
    found = NUMBER.findall(after if mark else before)
    return Decimal(re.sub("[$,]", "", found[0 if mark else -1])) if found else None


def tree_match(text: str, reference: str) -> Scores:
    """Whether both have the same intents, slots and values of slots in the same order."""
    trees = [parse_tree(text), parse_tree(reference)]
    same = None not in trees and decoupled(trees[0]) == decoupled(trees[1])
    return {"tree_match": float(same)}


def parse_tree(text: str) -> Tree | None:
    """The tree that a text spells, ignoring white space; None unless it spells exactly one, of at
    most DEEPEST levels.

    [IN:CREATE_ALARM set alarm [SL:DATE_TIME for 2 hours ] ]
    """
    opened: list[list] = [[]]
    for piece in re.findall(r"\[(?:IN|SL):\w+|\]|[^\s\[\]]+|\[", text):
        if piece.startswith(("[IN:", "[SL:")):
            opened.append([piece[1:]])
            if len(opened) > DEEPEST + 1:  # the first holds the tree itself
                return None
        elif piece != "]":
            opened[-1].append(piece)
        elif len(opened) == 1:
            return None
        else:
            tree = tuple(opened.pop())
            opened[-1].append(tree)
    whole = len(opened) == len(opened[0]) == 1 and isinstance(opened[0][0], tuple)
    return opened[0][0] if whole else None


def decoupled(tree: Tree) -> Tree:
    """The tree without the words that only repeat the utterance (Aghajanyan et al., 2020).

    Words are kept if they are the value of a slot without an intent.
    """
    label, *children = tree
    trees = [decoupled(child) for child in children if isinstance(child, tuple)]
    return tree if label.startswith("SL:") and not trees else (label, *trees)


def tested_program(text: str, problem: Mapping[str, Any]) -> str:
    """A program of a HumanEval problem's prompt, the text up to the end of the function, and the
    tests. It fails if a test fails."""
    prompt, test, name = (problem[key] for key in ("prompt", "test", "entry_point"))
    body = FUNCTION_ENDS.split(text, maxsplit=1)[0]
    return f"{prompt}{body}\n\n{test}\n\ncheck({name})\n"


class Cell(NamedTuple):
    """A strategy with its settings: one cell of a grid."""

    strategy: str
    exit_layer: int | None = None
    num_draft_tokens: int | None = None
    draft_vocab: int | None = None
    draft_confidence: float | None = None

    @classmethod
    def of(cls, found: Strategy | Answer) -> "Cell":
        """The cell of a strategy, or of an answer."""
        if isinstance(found, Strategy):
            settings = {name: getattr(found, name) for name in cls._fields[1:]}
            return cls(found.name, **settings)
        return cls._make(found[name] for name in cls._fields)

    def __str__(self) -> str:
        forms = ("{}", "exit {}", "{} drafts", "vocabulary {}", "confidence {:g}")
        pairs = zip(forms, self, strict=True)
        parts = [form.format(value) for form, value in pairs if value is not None]
        return ", ".join(parts).replace("_", " ")


def grouped(answers: Sequence[Answer]) -> Iterator[tuple[Cell, str, list[Answer]]]:
    """All answers of each strategy. Adds unseen examples if only some were seen in training, and
    each category if there are several."""
    for cell in dict.fromkeys(map(Cell.of, answers)):
        own = [one for one in answers if Cell.of(one) == cell]
        yield cell, ALL, own
        unseen = [one for one in own if not one["seen"]]
        if 0 < len(unseen) < len(own):
            yield cell, UNSEEN, unseen
        names = sorted({one["group"] for one in own})
        for name in names if len(names) > 1 else ():
            yield cell, name, [one for one in own if one["group"] == name]


def acceptance(answers: Sequence[Answer]) -> dict[str, float | None]:
    """Acceptance rate and tokens per round, over all texts."""
    names = ("drafted", "accepted", "rounds", "num_new_tokens")
    drafted, accepted, rounds, tokens = (sum(one[name] for one in answers) for name in names)
    return {
        "acceptance_rate": accepted / drafted if drafted else None,
        "tokens_per_round": (tokens - len(answers)) / rounds if rounds else None,
    }


def repeated_share(tokens: Sequence[int], size: int = 4) -> float:
    """Share of a text's n-grams of `size` tokens that it contains earlier; 0 without n-grams."""
    grams = [tuple(tokens[at : at + size]) for at in range(len(tokens) - size + 1)]
    return 1 - len({*grams}) / len(grams) if grams else 0.0


def summarise(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Figures of each strategy and group (`grouped`). Undefined ones are None.

    scores: mean and standard error over examples; samples are averaged per example first.
    equal: share of greedy texts identical to autoregressive decoding.
    """
    plain = Cell("autoregressive")
    texts = {one["id"]: one["text"] for one in answers if Cell.of(one) == plain}
    rows = []
    for cell, group, own in grouped(answers):
        compared = [one for one in own if one["seed"] is None and one["id"] in texts]
        same = [one["text"] == texts[one["id"]] for one in compared]
        scores = {}
        for name, means in example_scores(own).items():
            error = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else None
            scores[name] = {"mean": statistics.fmean(means), "stderr": error}
        examples = len({one["id"] for one in own})
        row = {"strategy": str(cell), "group": group, "examples": examples, "answers": len(own)}
        row |= {"scores": scores, "equal": statistics.fmean(same) if same else None}
        rows.append(row | acceptance(own))
    return rows


def example_scores(answers: Iterable[Answer]) -> dict[str, list[float]]:
    """Scores of every example, averaged over its samples. `passed` becomes unbiased estimates of
    pass@k, for each k of PASS_AT up to the sample count."""
    samples: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for answer in answers:
        for name, value in answer["scores"].items():
            samples[name][answer["id"]].append(value)
    tries = [*samples.pop("passed", {}).values()]
    means = {
        f"pass@{k}": [pass_at_k(len(one), int(sum(one)), k) for one in tries]
        for k in PASS_AT
        if k <= min(map(len, tries), default=0)
    }
    for name, by_example in samples.items():
        means[name] = [*map(statistics.fmean, by_example.values())]
    return means


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Probability that one of k samples passes, from more samples (Chen et al., 2021, eq. 1)."""
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)
