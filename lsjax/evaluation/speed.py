"""What runs of several strategies on the same prompts say: speedup, and its share of the ideal."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lsjax.config import LlamaConfig
from lsjax.decoding.completion import Completion
from lsjax.decoding.cost import Costs, ideal_speedup, weight_bytes
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.state import Strategy


@dataclass
class Row:
    """What one strategy gave. Undefined figures are None; lists are by draft position."""

    strategy: str
    exit_layer: int | None
    num_draft_tokens: int | None
    draft_vocab: int | None
    tokens_per_second: float
    slowest: float
    fastest: float
    speedup: float
    acceptance_rate: float | None
    acceptance_by_position: list[float]
    tokens_per_round: float | None
    ideal: float | None = None
    share_of_ideal: float | None = None
    predicted: float | None = None
    round_over_parts: float | None = None
    bandwidth: float | None = None
    share_of_bandwidth: float | None = None


def compare(
    config: LlamaConfig,
    itemsize: int,
    everything: Sequence[Strategy],
    runs: list[list[list[Completion]]],
    costs: Costs | None,
    bandwidth: float,
) -> Iterator[Row]:
    """The figures of each strategy, the first of which is autoregressive.

    runs: completions by repeat, strategy and prompt. costs: needed where a strategy drafts.
    bandwidth: of the memory, bytes per second.
    """
    for index, strategy in enumerate(everything):
        pairs = [
            (base, own)
            for repeat in runs
            for base, own in zip(repeat[0], repeat[index], strict=True)
        ]
        done = [own for _, own in pairs]
        speeds = [own.tokens_per_second for own in done]
        drafted, accepted = sum(c.drafted for c in done), sum(c.accepted for c in done)
        longest = max(len(c.drafted_by_position) for c in done)
        row = Row(
            strategy=strategy.name,
            exit_layer=strategy.exit_layer,
            num_draft_tokens=strategy.num_draft_tokens,
            draft_vocab=strategy.draft_vocab,
            tokens_per_second=statistics.median(speeds),
            slowest=min(speeds),
            fastest=max(speeds),
            # Of each prompt and repeat against its own neighbour in time.
            speedup=statistics.median(
                base.decode_seconds / own.decode_seconds for base, own in pairs
            ),
            acceptance_rate=accepted / drafted if drafted else None,
            acceptance_by_position=[
                sum(c.accepted_by_position[i] for c in done if i < len(c.accepted_by_position))
                / sum(c.drafted_by_position[i] for c in done if i < len(c.drafted_by_position))
                for i in range(longest)
            ],
            tokens_per_round=sum(c.num_new_tokens - 1 for c in done) / sum(c.rounds for c in done),
        )
        if isinstance(strategy, SelfSpeculative):
            rounds = sum(c.rounds for c in done)
            # The last round of a text may be a shorter one.
            cell = (strategy.exit_layer, drafted / rounds, row.acceptance_rate or 0.0)
            row.ideal = ideal_speedup(config, *cell, strategy.draft_vocab)
            row.share_of_ideal = row.speedup / row.ideal
            size = strategy.draft_vocab or config.vocab_size
            cost = dict(width=strategy.num_draft_tokens + 1, draft_vocab=size)
            row.predicted = costs.speedup(config.num_layers, *cell, **cost)
            parts = costs.round(config.num_layers, *cell[:2], **cost)
            seconds = statistics.median(c.decode_seconds / c.rounds for c in done)
            row.round_over_parts = seconds / parts
        else:
            row.bandwidth = row.tokens_per_second * weight_bytes(config, itemsize)
            row.share_of_bandwidth = row.bandwidth / bandwidth
        yield row
