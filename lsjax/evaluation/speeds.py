"""Speeds of strategies, from texts that were timed in turns with autoregressive decoding."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from lsjax.config import LlamaConfig
from lsjax.decoding.completion import Completion
from lsjax.decoding.cost import ideal_speedup
from lsjax.decoding.engine import Engine
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.evaluation import comparison
from lsjax.evaluation.answers import Question
from lsjax.evaluation.intervals import from_samples
from lsjax.evaluation.scores import Answer, acceptance, grouped, repeated_share

# A machine was probably busy if equal work takes this many times as long, or if a speedup is this
# many times the ideal one.
MOST_DISAGREEMENT, MOST_SHARE = 1.5, 1.1
FEWEST_TOKENS = 6  # of a text on average: shorter ones are over before they can be timed


def timed_beside(
    engine: Engine, question: Question, completion: Completion, base: Completion
) -> dict[str, Any]:
    """Seconds and tokens of the baseline in the same turn, the first difference from its text if
    both texts must be equal, and the share of 4-grams that repeat earlier ones. JSON has null for
    an infinite margin."""
    config, difference = engine.model.config, None
    if completion.seed is None and engine.strategy.depth(config) == config.num_layers:
        tokens = base.token_ids, completion.token_ids
        difference = comparison.first_difference(engine.model, question.request.prompt, *tokens)
    if difference is not None:
        margin = difference.margin if math.isfinite(difference.margin) else None
        difference = asdict(difference) | {"margin": margin}
    repeated = repeated_share(completion.token_ids)
    return {
        "base_seconds": base.decode_seconds,
        "base_num_new_tokens": base.num_new_tokens,
        "difference": difference,
        "repeated_4grams": repeated,
    }


def cell_speeds(config: LlamaConfig, answers: Sequence[Answer]) -> Iterator[dict[str, Any]]:
    """Figures of each strategy and group, starting with all answers. Undefined figures are None.

    docs/performance.md defines them. answers: with the fields of `timed_beside`.
    """
    base: dict[int, float] = {}  # fewest seconds of an autoregressive token by size
    for one in answers:
        size, seconds = _base_token(one)
        base[size] = min(base.get(size, math.inf), seconds)
    for cell, group, own in grouped(answers):
        speeds = [_rate(one) for one in own]
        by_text: dict[str, list[float]] = {}
        for one in own:
            tokens = (one["num_new_tokens"] - 1) / (one["base_num_new_tokens"] - 1)
            times = one["base_seconds"] / one["decode_seconds"] * tokens
            by_text.setdefault(one["id"], []).append(times)
        speedups = [statistics.median(repeats) for repeats in by_text.values()]
        estimate = from_samples(np.median, speedups, of="prompts")
        speedup = estimate.value
        greedy = {one["id"] for one in own if one["seed"] is None}
        found = [one for one in own if one["difference"]]
        differing = {one["id"] for one in found}
        passing, ideal = acceptance(own), None
        if cell.strategy == SelfSpeculative.name:
            # On average: the last round of a text may be shorter.
            drafts = sum(one["drafted"] for one in own) / sum(one["rounds"] for one in own)
            rate = passing["acceptance_rate"] or 0.0
            ideal = ideal_speedup(config, cell.exit_layer, drafts, rate, cell.draft_vocab)
        share = None if ideal is None else speedup / ideal
        slowdown = disagreement(own, base)
        length = statistics.fmean(one["num_new_tokens"] for one in own)
        margins = [comparison.margin_of(one["difference"]) for one in found]
        yield {
            "group": group,
            **cell._asdict(),
            "tokens_per_second": statistics.median(speeds),
            "slowest": min(speeds),
            "fastest": max(speeds),
            "speedup": speedup,
            "speedup_low": estimate.low,
            "speedup_high": estimate.high,
            "texts": estimate.count,
            **passing,
            "equal": len(greedy - differing) if greedy else None,
            "differ": len(differing) if greedy else None,
            "widest_margin": max(margins, default=None),
            "compile_seconds": max(one["compile_seconds"] for one in own),
            "ideal": ideal,
            "share_of_ideal": share,
            "repeated_4grams": statistics.fmean(one["repeated_4grams"] for one in own),
            "disagreement": slowdown,
            "new_tokens": length,
            "trusted": slowdown <= MOST_DISAGREEMENT
            and (share or 0) <= MOST_SHARE
            and length >= FEWEST_TOKENS,
        }


def _rate(answer: Answer) -> float:
    """Tokens per second, without the first token, which comes from the prompt."""
    return (answer["num_new_tokens"] - 1) / answer["decode_seconds"]


def _base_token(answer: Answer) -> tuple[int, float]:
    """Size and seconds of a token of autoregressive decoding. Texts of one size take equally long
    for a token: their lengths differ by less than a factor of two."""
    tokens = answer["base_num_new_tokens"]
    length = answer["num_prompt_tokens"] + tokens
    return length.bit_length(), answer["base_seconds"] / (tokens - 1)


def disagreement(own: Sequence[Answer], base: Mapping[int, float]) -> float:
    """Ratio of times that must be equal: those of a token of autoregressive decoding, and those of
    repeats of a strategy's greedy text. A tenth of the texts is left out, as a median does not see
    them. base: as in `cell_speeds`."""
    fastest: dict[str, float] = {}
    greedy = [one for one in own if one["seed"] is None]
    for one in greedy:
        fastest[one["id"]] = min(fastest.get(one["id"], math.inf), one["decode_seconds"])
    ratios = [seconds / base[size] for size, seconds in map(_base_token, own)]
    ratios += [one["decode_seconds"] / fastest[one["id"]] for one in greedy]
    return sorted(ratios)[math.ceil(0.9 * len(ratios)) - 1]


def doubts(rows: Sequence[Mapping[str, Any]]) -> str:
    """What to say of a busy machine's figures; empty if all are to be trusted."""
    doubtful = [row for row in rows if not row["trusted"]]
    if not doubtful:
        return ""
    causes, words = [], []
    if (worst := max(row["disagreement"] for row in doubtful)) > MOST_DISAGREEMENT:
        causes.append(f"times that must be equal differ by up to {worst:.1f}x")
    if (share := max(row["share_of_ideal"] or 0 for row in doubtful)) > MOST_SHARE:
        causes.append(f"a share of the ideal speedup is {share:.2f}")
    shortest = min(row["new_tokens"] for row in doubtful)
    if shortest < FEWEST_TOKENS:
        words.append(f"Texts of {shortest:.0f} new tokens on average are too short to time.")
    if causes:
        words.append(f"This machine was probably busy ({' and '.join(causes)}).")
    return f"{' '.join(words)} Do not trust figures with a question mark."
