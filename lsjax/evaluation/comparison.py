"""Compares strategies with autoregressive decoding: how fast are they, and are they exact?

Self-speculation is lossless in exact arithmetic. In floating point, matmuls of one token and of
d + 1 tokens round differently. If the two best logits are almost equal, either may win. A margin
wider than rounding explains is a bug.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lsjax.config import LlamaConfig
from lsjax.decoding.completion import Completion
from lsjax.decoding.cost import ideal_speedup
from lsjax.decoding.engine import Engine
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.strategy import Strategy
from lsjax.evaluation.answers import (
    Answer,
    Cell,
    Question,
    acceptance,
    answer_line,
    grouped,
)
from lsjax.model.llama import Llama, unstacked

# Widest margin between the two best logits that rounding in float32 may reverse.
FLOAT32_MARGIN = 1e-4


@dataclass(frozen=True)
class Difference:
    """First position where two decodings differ.

    index: index of the new token. margin: the full model's best logit there minus the lower logit
    of the two tokens; infinite if one decoding only ends earlier.
    """

    index: int
    expected: int | None
    found: int | None
    margin: float

    def to_json(self) -> dict[str, Any]:
        """The fields, with null for an infinite margin."""
        return asdict(self) | {"margin": self.margin if math.isfinite(self.margin) else None}


def first_difference(
    model: Llama, prompt: Sequence[int], expected: Sequence[int], found: Sequence[int]
) -> Difference | None:
    """First difference of `found` from `expected`, new tokens after `prompt`; None if equal."""
    if list(expected) == list(found):
        return None
    pairs = enumerate(zip_longest(expected, found))
    index, one, other = next((index, one, other) for index, (one, other) in pairs if one != other)
    if one is None or other is None:
        return Difference(index, one, other, math.inf)
    logits_V = last_logits(model, [*prompt, *expected[:index]])
    margin = float(logits_V.max() - np.minimum(logits_V[one], logits_V[other]))
    return Difference(index, one, other, margin)


def last_logits(model: Llama, tokens: Sequence[int]) -> Float[np.ndarray, " V"]:
    """Logits of the next token, from one pass over the complete text without a cache."""
    padded = np.zeros((1, -(-len(tokens) // 128) * 128), np.int32)  # few shapes to compile
    padded[0, : len(tokens)] = tokens
    return np.asarray(_logits_at(model, padded, np.int32(len(tokens) - 1)))


@jax.jit
def _logits_at(
    model: Llama, tokens_BT: Int[Array, "1 T"], index: Int[Array, ""]
) -> Float[Array, " V"]:
    return model.unembed(jnp.take(model.exits(tokens_BT)[-1, 0], index, axis=0))


def identity_tail(model: Llama, exit_layer: int) -> Llama:
    """The model, except that layers from `exit_layer` on add nothing: drafts of exits from there on
    are all accepted. The output projections are separate zero arrays, so the cost is unchanged."""
    tail = jax.tree.map(lambda leaf: leaf, unstacked(model))
    for block in list(tail.layers)[exit_layer:]:
        for linear in (block.attention.out, block.feed_forward.down):
            linear.kernel = nnx.Param(jnp.zeros_like(linear.kernel[...]))
            if linear.bias is not None:
                linear.bias = nnx.Param(jnp.zeros_like(linear.bias[...]))
    return tail


def warm_up(engine: Engine, strategies: Sequence[Strategy], questions: Sequence[Question]) -> None:
    """Compiles and runs each program once. Prompts with equal cache sizes share a program."""
    for strategy in {strategy.program: strategy for strategy in strategies}.values():
        engine.use(strategy)
        sizes = {}
        for request in (question.request for question in questions):
            length = len(request.prompt)
            whole = length + request.max_new_tokens
            sizes[engine.capacity(length + 1), engine.capacity(whole)] = request
        for request in sizes.values():
            engine.generate([request])


def timed_lines(engine: Engine, first: Strategy) -> Callable[[Question, Completion], Answer]:
    """Returns a function that makes answer lines, with the strategy `first` as the baseline.

    Answers of `first` (autoregressive) must come first. A line adds seconds, base_seconds of the
    same turn, and the first difference if both texts must be equal. A batch has one row.
    """
    base: Completion | None = None

    def line(question: Question, completion: Completion) -> Answer:
        nonlocal base
        config, strategy, difference = engine.model.config, engine.strategy, None
        if strategy == first:
            base = completion
        if completion.seed is None and strategy.depth(config) == config.num_layers:
            tokens = base.token_ids, completion.token_ids
            difference = first_difference(engine.model, question.request.prompt, *tokens)
        return answer_line(
            question,
            completion,
            seconds=completion.decode_seconds,
            base_seconds=base.decode_seconds,
            difference=difference and difference.to_json(),
        )

    return line


def cell_speeds(
    config: LlamaConfig, strategies: Sequence[Strategy], answers: Sequence[Answer]
) -> Iterator[dict[str, Any]]:
    """Figures of each strategy and group, starting with all answers. Undefined figures are None.

    docs/performance.md defines them. answers: from `timed_lines`.
    """
    by_cell = {Cell.of(strategy): strategy for strategy in strategies}
    for cell, group, own in grouped(answers):
        speeds = [(one["num_new_tokens"] - 1) / one["seconds"] for one in own]
        speedup = statistics.median(one["base_seconds"] / one["seconds"] for one in own)
        greedy = {one["id"] for one in own if one["seed"] is None}
        found = [one for one in own if one["difference"]]
        differing = {one["id"] for one in found}
        yield {
            "group": group,
            **cell._asdict(),
            "tokens_per_second": statistics.median(speeds),
            "slowest": min(speeds),
            "fastest": max(speeds),
            "speedup": speedup,
            **acceptance(own),
            "equal": len(greedy - differing) if greedy else None,
            "differ": len(differing) if greedy else None,
            "widest_margin": max((margin_of(one["difference"]) for one in found), default=None),
            **limits(config, by_cell[cell], own, speedup),
        }


def margin_of(difference: Answer) -> float:
    """The margin of a line's difference; null means infinite."""
    return math.inf if difference["margin"] is None else difference["margin"]


def limits(
    config: LlamaConfig, strategy: Strategy, answers: Sequence[Answer], speedup: float
) -> dict[str, float | None]:
    """The ideal speedup, and the measured one over it. None for a strategy without drafts."""
    if not isinstance(strategy, SelfSpeculative):
        return {"ideal": None, "share_of_ideal": None}
    # The last round of a text may be shorter.
    drafts = sum(one["drafted"] for one in answers) / sum(one["rounds"] for one in answers)
    accepted = acceptance(answers)["acceptance_rate"] or 0.0
    round_ = (strategy.exit_layer, drafts, accepted, strategy.draft_vocab)
    ideal = ideal_speedup(config, *round_)
    return {"ideal": ideal, "share_of_ideal": speedup / ideal}
