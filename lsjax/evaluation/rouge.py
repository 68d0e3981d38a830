"""ROUGE (Lin, 2004) by the package rouge-score: n-grams, and the longest common subsequence, that a
text shares with its reference. Words are what stands between white space, in lower case, as in the
paper's benchmark: rouge-score by itself drops what is no letter or digit, and with it most of a
program."""

from functools import lru_cache
from typing import Any

from lsjax.config import ConfigError

KINDS = ("rouge2", "rouge1", "rouge3", "rougeL")  # ROUGE-2 is the paper's


def rouge(text: str, reference: str) -> dict[str, float]:
    """F-measures over lower-case words with their punctuation, not stemmed.

    Raises ConfigError where rouge-score is not installed.
    """
    found = _scorer().score(reference, text)
    return {kind: float(found[kind].fmeasure) for kind in KINDS}


@lru_cache
def _scorer() -> Any:
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

    return RougeScorer(list(KINDS), tokenizer=Words())
