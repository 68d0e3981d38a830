"""Strategies take turns on the same prompts, and what that says: speedup, share of the ideal."""

import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

from lsjax.config import LlamaConfig, check
from lsjax.decoding.completion import Completion
from lsjax.decoding.cost import RoundCosts, ideal_speedup, unsure_share, weight_bytes
from lsjax.decoding.engine import Engine
from lsjax.decoding.sampling import Sampling
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.state import Strategy

Cell = tuple[str, int | None, int | None, int | None]  # name, exit, drafts, draft vocabulary


def cell_of(strategy: Any) -> Cell:
    """What tells strategies apart; of a strategy, a Timed or a Row."""
    name = getattr(strategy, "name", None) or strategy.strategy
    return (name, strategy.exit_layer, strategy.num_draft_tokens, strategy.draft_vocab)


@dataclass(frozen=True)
class Timed:
    """One text by one strategy, as far as its speed is concerned: the fields of a `Completion`,
    with the number of the repeat (from 1) and of the prompt (from 0)."""

    repeat: int
    prompt: int
    strategy: str
    exit_layer: int | None
    num_draft_tokens: int | None
    draft_vocab: int | None
    decode_seconds: float
    num_new_tokens: int
    rounds: int
    drafted_by_position: list[int]
    accepted_by_position: list[int]

    @classmethod
    def of(cls, completion: Completion, repeat: int, prompt: int) -> "Timed":
        """What counts of a completion."""
        names = [field.name for field in fields(cls)][2:]
        return cls(repeat, prompt, **{name: getattr(completion, name) for name in names})

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> "Timed":
        """One of a file; raises ConfigError for a row that is none."""
        names = [field.name for field in fields(cls)]
        check(
            row.keys() == {*names},
            f"a line of the results has {', '.join(row)} and not {', '.join(names)}: it is none of "
            "this sweep's; name another --output, or remove it",
        )
        return cls(**row)

    @property
    def tokens_per_second(self) -> float:
        """New tokens after the first over the time that they took."""
        return (self.num_new_tokens - 1) / self.decode_seconds


def take_turns(
    engine: Engine,
    everything: Sequence[Strategy],
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    repeats: Iterable[int],
    sampling: Sampling,
    done: Collection[tuple[int, int, Cell]] = frozenset(),
    advance: Callable[[], None] = lambda: None,
) -> Iterator[Timed]:
    """Each prompt by each strategy, one after the other, in every repeat.

    The first strategy is what the others are compared with: it runs beside them, again where some
    of them are `done` (repeat, prompt and cell) and others are not. A text has the same seed under
    every strategy. advance: called for every text, done before or now.
    """
    for repeat in repeats:
        for number, prompt in enumerate(prompts):
            wanted = [s for s in everything if (repeat, number, cell_of(s)) not in done]
            if wanted and wanted[0] is not everything[0]:
                wanted.insert(0, everything[0])
            sampling = replace(sampling, seed=repeat * len(prompts) + number)
            for strategy in everything:
                if strategy in wanted:
                    engine.use(strategy)
                    (completion,) = engine.generate(
                        [prompt], sampling=sampling, max_new_tokens=new_tokens
                    )
                    yield Timed.of(completion, repeat, number)
                advance()


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
    texts: Iterable[Timed],
    costs: RoundCosts | None,
    bandwidth: float,
) -> Iterator[Row]:
    """The figures of each strategy, the first of which is autoregressive.

    texts: in the order in which they were decoded (`take_turns`). costs: needed where a strategy
    drafts. bandwidth: of the memory, bytes per second.
    """
    pairs = _beside(cell_of(everything[0]), texts)
    for strategy in everything:
        own_pairs = pairs[cell_of(strategy)]
        done = [own for _, own in own_pairs]
        speeds = [own.tokens_per_second for own in done]
        drafted, accepted = (
            _by_position([getattr(own, f"{kind}_by_position") for own in done])
            for kind in ("drafted", "accepted")
        )
        rounds = sum(own.rounds for own in done)
        row = Row(
            *cell_of(strategy),
            tokens_per_second=statistics.median(speeds),
            slowest=min(speeds),
            fastest=max(speeds),
            # Of each prompt and repeat against its own neighbour in time.
            speedup=statistics.median(
                base.decode_seconds / own.decode_seconds for base, own in own_pairs
            ),
            acceptance_rate=sum(accepted) / sum(drafted) if drafted else None,
            acceptance_by_position=[a / d for a, d in zip(accepted, drafted, strict=True)],
            tokens_per_round=sum(own.num_new_tokens - 1 for own in done) / rounds,
        )
        if isinstance(strategy, SelfSpeculative):
            # The last round of a text may be a shorter one.
            cell = (strategy.exit_layer, sum(drafted) / rounds, row.acceptance_rate or 0.0)
            unsure = 0.0
            if strategy.draft_confidence is not None:
                unsure = unsure_share(drafted, strategy.num_draft_tokens, rounds)
            row.ideal = ideal_speedup(config, *cell, strategy.draft_vocab, unsure)
            row.share_of_ideal = row.speedup / row.ideal
            size = strategy.draft_vocab or config.vocab_size
            widths = _widths(strategy, drafted, rounds)
            cost = dict(widths=widths, draft_vocab=size, unsure=unsure)
            row.predicted = costs.speedup(config.num_layers, *cell, **cost)
            parts = costs.round(config.num_layers, *cell[:2], **cost)
            seconds = statistics.median(own.decode_seconds / own.rounds for own in done)
            row.round_over_parts = seconds / parts
        else:
            row.bandwidth = row.tokens_per_second * weight_bytes(config, itemsize)
            row.share_of_bandwidth = row.bandwidth / bandwidth
        yield row


def _beside(base: Cell, texts: Iterable[Timed]) -> Mapping[Cell, list[tuple[Timed, Timed]]]:
    """Each text, by its strategy, with the base's text that was decoded last before it. Of a base
    that ran twice for one prompt and repeat, the later text stays."""
    pairs: dict[Cell, dict[tuple[int, int], tuple[Timed, Timed]]] = {}
    latest = None
    for own in texts:
        if cell_of(own) == base:
            latest = own
        pairs.setdefault(cell_of(own), {})[own.repeat, own.prompt] = (latest, own)
    return {cell: list(found.values()) for cell, found in pairs.items()}


def _widths(strategy: SelfSpeculative, drafted: Sequence[int], rounds: int) -> dict[int, float]:
    """Positions that a round verifies, each with its share of the rounds.

    drafted: rounds that have drafted at each position. A round takes the shortest verification of
    the program that holds its drafts.
    """
    lengths = strategy.lengths
    more = [sum(drafted[length : length + 1]) for length in lengths[:-1]]  # rounds that need more
    counts = [left - right for left, right in pairwise([rounds, *more, 0])]
    return {
        1 + length: count / rounds
        for length, count in zip(lengths, counts, strict=True)
        if count > 0
    }


def _by_position(counts: Sequence[Sequence[int]]) -> list[int]:
    """Sums at each position, over texts whose drafts reach differently far."""
    longest = max(map(len, counts), default=0)
    return [sum(one[i] for one in counts if i < len(one)) for i in range(longest)]
