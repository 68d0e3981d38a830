"""Speeds of strategies, from texts that were timed in turns with autoregressive decoding."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from lsjax.config import LlamaConfig
from lsjax.decoding.completion import Completion
from lsjax.decoding.cost import ideal_speedup
from lsjax.decoding.engine import Engine
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.evaluation import comparison
from lsjax.evaluation.answers import Question
from lsjax.evaluation.scores import Answer, acceptance, grouped


def timed_beside(
    engine: Engine, question: Question, completion: Completion, base: Completion
) -> dict[str, Any]:
    """Seconds of the baseline in the same turn, and the first difference from its text if both
    texts must be equal. JSON has null for an infinite margin."""
    config, difference = engine.model.config, None
    if completion.seed is None and engine.strategy.depth(config) == config.num_layers:
        tokens = base.token_ids, completion.token_ids
        difference = comparison.first_difference(engine.model, question.request.prompt, *tokens)
    if difference is not None:
        margin = difference.margin if math.isfinite(difference.margin) else None
        difference = asdict(difference) | {"margin": margin}
    return {"base_seconds": base.decode_seconds, "difference": difference}


def cell_speeds(config: LlamaConfig, answers: Sequence[Answer]) -> Iterator[dict[str, Any]]:
    """Figures of each strategy and group, starting with all answers. Undefined figures are None.

    docs/performance.md defines them. answers: with the fields of `timed_beside`.
    """
    for cell, group, own in grouped(answers):
        speeds = [(one["num_new_tokens"] - 1) / one["decode_seconds"] for one in own]
        speedup = statistics.median(one["base_seconds"] / one["decode_seconds"] for one in own)
        greedy = {one["id"] for one in own if one["seed"] is None}
        found = [one for one in own if one["difference"]]
        differing = {one["id"] for one in found}
        passing, ideal = acceptance(own), None
        if cell.strategy == SelfSpeculative.name:
            # On average: the last round of a text may be shorter.
            drafts = sum(one["drafted"] for one in own) / sum(one["rounds"] for one in own)
            rate = passing["acceptance_rate"] or 0.0
            ideal = ideal_speedup(config, cell.exit_layer, drafts, rate, cell.draft_vocab)
        margins = [comparison.margin_of(one["difference"]) for one in found]
        yield {
            "group": group,
            **cell._asdict(),
            "tokens_per_second": statistics.median(speeds),
            "slowest": min(speeds),
            "fastest": max(speeds),
            "speedup": speedup,
            **passing,
            "equal": len(greedy - differing) if greedy else None,
            "differ": len(differing) if greedy else None,
            "widest_margin": max(margins, default=None),
            "compile_seconds": max(one["compile_seconds"] for one in own),
            "ideal": ideal,
            "share_of_ideal": None if ideal is None else speedup / ideal,
        }
