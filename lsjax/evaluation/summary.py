"""What a file of results says: scores, speed, share of the ideal and acceptance by strategy."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from lsjax.config import LlamaConfig
from lsjax.decoding.cost import ideal_speedup, unsure_share

Line = Mapping[str, Any]

# Groups that are no category.
WHOLE = ALL, UNSEEN = "all", "not seen in training"
PASS_AT = (1, 10, 100)


def summarise(answers: Sequence[Line], config: LlamaConfig) -> list[dict[str, Any]]:
    """Figures of each strategy in the order in which they first answered: of all its answers
    (group ALL), of each category if there are several, and of the examples that training has not
    seen if it has seen some."""
    by_strategy: dict[str, list[Line]] = {}
    for answer in answers:
        by_strategy.setdefault(answer["strategy"], []).append(answer)
    found = []
    for strategy, own in by_strategy.items():
        parts = {ALL: own}
        if any(answer["seen"] for answer in own):
            parts[UNSEEN] = [answer for answer in own if not answer["seen"]]
        groups = sorted({answer["group"] for answer in own})
        if len(groups) > 1:
            parts |= {group: [a for a in own if a["group"] == group] for group in groups}
        for part, some in parts.items():
            if some:
                row = {"strategy": strategy, "group": part, **figures(some)}
                found.append(row | {"ideal": ideal(some, config)})
    plain = {row["group"]: row for row in found if row["strategy"] == "autoregressive"}
    for row in found:
        ms, base = row["ms_per_token"], plain.get(row["group"], {}).get("ms_per_token")
        row["speedup"] = base / ms if ms and base else None
        known = row["speedup"] is not None and row["ideal"] is not None
        row["share_of_ideal"] = row["speedup"] / row["ideal"] if known else None
    return found


def figures(answers: Sequence[Line]) -> dict[str, Any]:
    """Of some answers of one strategy; what is undefined is None.

    scores: mean and standard error over the examples, of the mean over an example's samples.
    tokens_per_second: new tokens after the first of each text over the time of decoding.
    ms_per_token: its inverse. ms_per_token_with_prompt: all new tokens, and the reading of the
    prompts counts.
    """
    total = {
        name: sum(answer[name] for answer in answers)
        for name in ("num_new_tokens", "rounds", "drafted", "accepted", "seconds")
    }
    later = total["num_new_tokens"] - len(answers)
    reading = sum(answer["prefill_seconds"] for answer in answers)
    seconds = total["seconds"]
    return {
        "examples": len({answer["id"] for answer in answers}),
        "answers": len(answers),
        "scores": {
            name: {"mean": statistics.fmean(means), "stderr": standard_error(means)}
            for name, by_example in scores_by_example(answers).items()
            if (means := list(by_example.values()))
        },
        "tokens_per_second": later / seconds if later and seconds else None,
        "ms_per_token": 1e3 * seconds / later if later else None,
        "ms_per_token_with_prompt": 1e3 * (seconds + reading) / total["num_new_tokens"],
        "acceptance_rate": total["accepted"] / total["drafted"] if total["drafted"] else None,
        "tokens_per_round": later / total["rounds"] if total["rounds"] else None,
        "new_tokens": total["num_new_tokens"],
    }


def ideal(answers: Sequence[Line], config: LlamaConfig) -> float | None:
    """Speedup of a strategy's drafts if time were bytes of weights (cost.py); None without any."""
    names = ("num_new_tokens", "rounds", "drafted")
    total = {name: sum(answer[name] for answer in answers) for name in names}
    if not total["drafted"]:
        return None
    strategy, unsure = answers[0], 0.0
    if strategy["draft_confidence"] is not None:
        columns = zip_longest(*(one["drafted_by_position"] for one in answers), fillvalue=0)
        drafted = [sum(column) for column in columns]
        unsure = unsure_share(drafted, strategy["num_draft_tokens"], total["rounds"])
    # Where an accepted draft ends a text, its round has no token of the verification: short texts
    # have fewer tokens a round than 1 + a d.
    later = total["num_new_tokens"] - len(answers)
    useful = (later - total["rounds"]) / total["drafted"]
    drafts = total["drafted"] / total["rounds"]
    exit_layer, vocabulary = strategy["exit_layer"], strategy["draft_vocab"]
    return ideal_speedup(config, exit_layer, drafts, useful, vocabulary, unsure)


def scores_by_example(answers: Iterable[Line]) -> dict[str, dict[str, float]]:
    """Of each score, the mean over an example's samples, by the example's id; of `passed`, the
    unbiased estimates of pass@k that the samples are enough for."""
    samples: dict[str, dict[str, list[float]]] = {}
    for answer in answers:
        for name, value in answer["scores"].items():
            samples.setdefault(name, {}).setdefault(answer["id"], []).append(value)
    found = {
        f"pass@{k}": {one: pass_at_k(len(p), int(sum(p)), k) for one, p in passed.items()}
        for passed in [samples.pop("passed", {})]
        for k in PASS_AT
        if k <= min(map(len, passed.values()), default=0)
    }
    return found | {
        name: {example: statistics.fmean(values) for example, values in by_example.items()}
        for name, by_example in samples.items()
    }


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """How likely one of k samples passes, from more of them (Chen et al., 2021, equation 1)."""
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean; None for a single value."""
    if len(values) < 2:
        return None
    return statistics.stdev(values) / len(values) ** 0.5
