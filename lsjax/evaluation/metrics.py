"""Scores of a text against its reference, and estimates over several texts."""

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import Any

from lsjax.config import ConfigError

ROUGE_KINDS = ("rouge2", "rouge1", "rouge3", "rougeL")  # ROUGE-2 is the paper's
ANSWER_MARK = "####"  # before the final number of a GSM8K reference
# A minus belongs to the number unless it stands behind something to subtract from.
NUMBER = re.compile(r"(?:(?<![\w)])-)?\$?(\d[\d,]*(?:\.\d+)?)")
# What follows a finished function (the stop sequences of Chen et al., 2021, section 2.3).
FUNCTION_ENDS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


def rouge(text: str, reference: str) -> dict[str, float]:
    """ROUGE F-measures (Lin, 2004) over lower-case words with their punctuation, not stemmed.

    Words are split at white space, as in the paper's benchmark. rouge-score's own words drop
    punctuation, and with it most of a program. Raises ConfigError where it is not installed.
    """
    found = _rouge_scorer().score(reference, text)
    return {kind: float(found[kind].fmeasure) for kind in ROUGE_KINDS}


@lru_cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"ROUGE comes from rouge-score, and {error.name} is not installed: "
            "pip install 'lsjax[eval]'"
        ) from None

    class Words(Tokenizer):
        def tokenize(self, text: str) -> list[str]:
            return text.lower().split()

    return RougeScorer(list(ROUGE_KINDS), tokenizer=Words())


def exact_match(text: str, reference: str) -> dict[str, float]:
    """Whether both are equal but for white space around them."""
    return {"exact_match": float(text.strip() == reference.strip())}


def accuracy(text: str, reference: str) -> dict[str, float]:
    """Whether both have the same final number (GSM8K)."""
    found = final_number(text)
    return {"accuracy": float(found is not None and found == final_number(reference))}


def final_number(text: str) -> Decimal | None:
    """The first number behind ####, or else the last number of the text."""
    before, mark, behind = text.partition(ANSWER_MARK)
    found = list(NUMBER.finditer(behind if mark else before))
    if not found:
        return None
    chosen = found[0] if mark else found[-1]
    value = Decimal(chosen[1].replace(",", ""))
    return -value if chosen[0].startswith("-") else value


@dataclass(frozen=True)
class Tree:
    """An intent (IN) or a slot (SL) of TOPv2, with the words and trees inside it."""

    label: str
    children: tuple["str | Tree", ...]


def parse_tree(text: str) -> Tree | None:
    """The tree that a text spells, whatever the white space; None if it spells none, or more.

    [IN:CREATE_ALARM set alarm [SL:DATE_TIME for 2 hours ] ]
    """
    opened: list[tuple[str, list]] = []
    pieces = re.findall(r"\[(?:IN|SL):\w*|\]|[^\s\[\]]+|\[", text)
    for number, piece in enumerate(pieces, 1):
        if re.match(r"\[(IN|SL):\w", piece):
            opened.append((piece[1:], []))
        elif not opened:
            return None
        elif piece != "]":
            opened[-1][1].append(piece)
        else:
            label, children = opened.pop()
            tree = Tree(label, tuple(children))
            if not opened:
                return tree if number == len(pieces) else None
            opened[-1][1].append(tree)
    return None


def decoupled(tree: Tree) -> Tree:
    """The tree without the words that only repeat the utterance (Aghajanyan et al., 2020).

    Words stay where they are the value of a slot that holds no intent.
    """
    trees = tuple(decoupled(child) for child in tree.children if isinstance(child, Tree))
    if tree.label.startswith("SL:") and not trees:
        return tree
    return Tree(tree.label, trees)


def tree_match(text: str, reference: str) -> dict[str, float]:
    """Whether both have the same intents, slots and values of slots in the same order."""
    trees = [parse_tree(text), parse_tree(reference)]
    same = None not in trees and decoupled(trees[0]) == decoupled(trees[1])
    return {"tree_match": float(same)}


def function_body(text: str) -> str:
    """The text up to what follows the function (HumanEval)."""
    return text[: min([len(text), *(at for end in FUNCTION_ENDS if (at := text.find(end)) >= 0)])]


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Probability that one of k samples passes, from more samples (Chen et al., 2021, eq. 1)."""
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None for a single value."""
    if len(values) < 2:
        return None
    return statistics.stdev(values) / len(values) ** 0.5
