"""Strategies timed beside autoregressive decoding: speed, share of the ideal, exactness."""

import math
import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lsjax.config import LlamaConfig
from lsjax.decoding.completion import Completion
from lsjax.decoding.cost import RoundCosts, ideal_speedup, unsure_share, weight_bytes
from lsjax.decoding.engine import Engine
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.state import Strategy
from lsjax.evaluation.answers import (
    Answer,
    Cell,
    Question,
    answer_line,
    by_group,
    decode_in_turns,
)
from lsjax.evaluation.exactness import first_difference


def warm_up(engine: Engine, strategies: Sequence[Strategy], questions: Sequence[Question]) -> None:
    """Compiles and runs each program once: prompts of equal sizes of the cache share theirs."""
    for strategy in {strategy.program: strategy for strategy in strategies}.values():
        engine.use(strategy)
        sizes = {}
        for question in questions:
            length = len(question.request.prompt)
            whole = length + question.request.max_new_tokens
            sizes[engine.capacity(length + 1), engine.capacity(whole)] = question
        for question in sizes.values():
            engine.generate([question.request])


def time_in_turns(
    engine: Engine,
    strategies: Sequence[Strategy],
    questions: Sequence[Question],
    done: Collection[tuple],
    on_answer: Callable[[Answer], None],
) -> None:
    """Decodes every question with every strategy, the first of which is autoregressive.

    Each answer also has base_seconds, of the autoregressive text of the same turn, and difference,
    the first from that text where both must be equal.
    """
    base: Completion | None = None
    base_seconds = 0.0

    def ended(question: Question, completion: Completion, seconds: float) -> None:
        nonlocal base, base_seconds
        model, strategy = engine.model, engine.strategy
        if Cell.of(strategy) == Cell.of(strategies[0]):
            base, base_seconds = completion, seconds
        difference = None
        if completion.seed is None and strategy.depth(model.config) == model.config.num_layers:
            tokens = base.token_ids, completion.token_ids
            difference = first_difference(model, question.request.prompt, *tokens)
        beside = {"base_seconds": base_seconds, "difference": difference and difference.to_json()}
        on_answer(answer_line(question, completion, seconds) | beside)

    decode_in_turns(engine, strategies, questions, done, ended, turn=1, beside_first=True)


@dataclass
class CellSpeed:
    """Figures of one strategy on the texts of one group. Undefined ones are None.

    tokens_per_second: median over the texts, and their slowest and fastest. speedup: median over
    the texts, each beside the autoregressive one of its turn. tokens_per_round: mean acceptance
    length. ideal, predicted: speedups (decoding/cost.py). round_over_parts: a round's time over
    that of its separately timed parts. equal, differ: prompts whose texts are those of
    autoregressive decoding, and the others. widest_margin: among the first differences.
    """

    group: str
    strategy: str
    exit_layer: int | None
    num_draft_tokens: int | None
    draft_vocab: int | None
    draft_confidence: float | None
    tokens_per_second: float
    slowest: float
    fastest: float
    speedup: float
    acceptance_rate: float | None
    acceptance_by_position: list[float]
    tokens_per_round: float
    equal: int | None
    differ: int | None
    widest_margin: float | None
    ideal: float | None = None
    share_of_ideal: float | None = None
    predicted: float | None = None
    round_over_parts: float | None = None
    bandwidth: float | None = None
    share_of_bandwidth: float | None = None

    @property
    def off_by(self) -> float | None:
        """By how much the prediction misses the speedup."""
        return None if self.predicted is None else self.predicted / self.speedup - 1


def cell_speeds(
    config: LlamaConfig,
    itemsize: int,
    strategies: Sequence[Strategy],
    answers: Sequence[Answer],
    costs: RoundCosts | None,
    bandwidth: float,
) -> Iterator[CellSpeed]:
    """The figures of each strategy and group, the whole of a strategy first.

    answers: of `time_in_turns`. costs: needed where a strategy drafts. bandwidth: of the memory,
    bytes per second.
    """
    for strategy in strategies:
        cell = Cell.of(strategy)
        own = [answer for answer in answers if Cell.of(answer) == cell]
        for group, some in by_group(own).items():
            speed = _speed(group, cell, some)
            if isinstance(strategy, SelfSpeculative):
                _add_limits(speed, config, strategy, some, costs)
            else:
                speed.bandwidth = speed.tokens_per_second * weight_bytes(config, itemsize)
                speed.share_of_bandwidth = speed.bandwidth / bandwidth
            yield speed


def _speed(group: str, cell: Cell, answers: Sequence[Answer]) -> CellSpeed:
    speeds = [(one["num_new_tokens"] - 1) / one["seconds"] for one in answers]
    drafted, accepted = (by_position(answers, kind) for kind in ("drafted", "accepted"))
    greedy = {one["id"] for one in answers if one["seed"] is None}
    differing = {one["id"] for one in answers if one["difference"]}
    margins = [margin_of(one["difference"]) for one in answers if one["difference"]]
    return CellSpeed(
        group,
        *vars(cell).values(),
        tokens_per_second=statistics.median(speeds),
        slowest=min(speeds),
        fastest=max(speeds),
        speedup=statistics.median(one["base_seconds"] / one["seconds"] for one in answers),
        acceptance_rate=sum(accepted) / sum(drafted) if drafted else None,
        acceptance_by_position=[a / d for a, d in zip(accepted, drafted, strict=True)],
        tokens_per_round=sum(one["num_new_tokens"] - 1 for one in answers)
        / sum(one["rounds"] for one in answers),
        equal=len(greedy - differing) if greedy else None,
        differ=len(differing) if greedy else None,
        widest_margin=max(margins, default=None),
    )


def margin_of(difference: Answer) -> float:
    """The margin of a line's difference; infinite where it is no finite number."""
    return math.inf if difference["margin"] is None else difference["margin"]


def _add_limits(
    speed: CellSpeed,
    config: LlamaConfig,
    strategy: SelfSpeculative,
    answers: Sequence[Answer],
    costs: RoundCosts,
) -> None:
    """Adds the ideal and the predicted speedup."""
    drafted, rounds = by_position(answers, "drafted"), sum(one["rounds"] for one in answers)
    unsure = 0.0
    if strategy.draft_confidence is not None:
        unsure = unsure_share(drafted, strategy.num_draft_tokens, rounds)
    # The last round of a text may be a shorter one.
    round_ = (strategy.exit_layer, sum(drafted) / rounds)
    acceptance, layers = speed.acceptance_rate or 0.0, config.num_layers
    speed.ideal = ideal_speedup(config, *round_, acceptance, strategy.draft_vocab, unsure)
    speed.share_of_ideal = speed.speedup / speed.ideal
    parts = dict(
        widths=verified_widths(strategy.lengths, drafted, rounds),
        draft_vocab=strategy.draft_vocab or config.vocab_size,
        unsure=unsure,
    )
    speed.predicted = costs.speedup(layers, *round_, acceptance, **parts)
    seconds = statistics.median(one["seconds"] / one["rounds"] for one in answers)
    speed.round_over_parts = seconds / costs.round(layers, *round_, **parts)


def by_position(answers: Sequence[Answer], kind: str) -> list[int]:
    """Tokens drafted or accepted at each position of all texts' drafts."""
    counts = [one[f"{kind}_by_position"] for one in answers]
    longest = max(map(len, counts), default=0)
    return [sum(one[i] for one in counts if i < len(one)) for i in range(longest)]


def verified_widths(
    lengths: Sequence[int], drafted: Sequence[int], rounds: int
) -> dict[int, float]:
    """Positions that a round verifies, each with its share of the rounds.

    lengths: draft lengths that the program verifies. A round takes the shortest that holds its
    drafts. drafted: rounds that have drafted at each position.
    """
    more = [sum(drafted[length : length + 1]) for length in lengths[:-1]]  # rounds that need more
    counts = [left - right for left, right in pairwise([rounds, *more, 0])]
    pairs = zip(lengths, counts, strict=True)
    return {1 + length: count / rounds for length, count in pairs if count > 0}
