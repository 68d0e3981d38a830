"""What times and drafts say of strategies, and where drafts are accepted."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from lsjax.config import LlamaConfig
from lsjax.decoding.autoregressive import Autoregressive
from lsjax.decoding.cost import RoundCosts
from lsjax.decoding.engine import Engine
from lsjax.decoding.sampling import GREEDY
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.evaluation.identity_tail import identity_tail
from lsjax.evaluation.speed import Timed, cell_of, compare, take_turns

PLAIN, DRAFTS = Autoregressive(), [SelfSpeculative(1, 2), SelfSpeculative(2, 2)]
EVERYTHING = [PLAIN, *DRAFTS]


@dataclass
class Recorder:
    """In the place of an engine: notes who decodes what."""

    asked: list = field(default_factory=list)

    def use(self, strategy):
        self.strategy = strategy

    def generate(self, prompts, *, sampling, max_new_tokens):
        ((prompt,),) = prompts
        self.asked.append((self.strategy.exit_layer, prompt, sampling.seed))
        names = ("decode_seconds", "num_new_tokens", "rounds", "drafted", "accepted")
        figures = dict.fromkeys(names, 1) | dict(drafted_by_position=[], accepted_by_position=[])
        strategy, exit_layer, drafts, vocab = cell_of(self.strategy)
        who = dict(strategy=strategy, exit_layer=exit_layer)
        who |= dict(num_draft_tokens=drafts, draft_vocab=vocab)
        return [SimpleNamespace(**who, **figures)]


def turns(done=()) -> tuple[list, list[Timed], int]:
    engine, steps = Recorder(), []
    texts = take_turns(
        engine,
        EVERYTHING,
        [[7], [8]],
        new_tokens=3,
        repeats=range(1, 3),
        sampling=GREEDY,
        done=set(done),
        advance=lambda: steps.append(1),
    )
    return engine.asked, list(texts), len(steps)


def test_strategies_take_turns():
    asked, texts, steps = turns()
    # Exits None, 1, 2 for each prompt, with the seed repeat * prompts + prompt.
    assert asked == [(e, p, s) for p, s in ((7, 2), (8, 3), (7, 4), (8, 5)) for e in (None, 1, 2)]
    assert [(one.repeat, one.prompt) for one in texts[::3]] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert steps == 12


def test_what_is_done_is_left_out_and_has_a_base_beside_it():
    cells = [cell_of(strategy) for strategy in EVERYTHING]
    done = [(1, 0, cell) for cell in cells] + [(1, 1, cells[0]), (1, 1, cells[1])]
    asked, _, steps = turns(done + [(2, 0, cell) for cell in cells[1:]])
    rest = [(None, 8, 5), (1, 8, 5), (2, 8, 5)]
    assert asked == [(None, 8, 3), (2, 8, 3), (None, 7, 4), *rest]
    assert steps == 12


def timed(strategy, seconds, prompt=0, drafted=(), accepted=(), rounds=9) -> Timed:
    figures = (seconds, 10, rounds, list(drafted), list(accepted))
    return Timed(1, prompt, *cell_of(strategy), *figures)


def test_figures_by_hand():
    """Two prompts; the sweep was killed between the two cells of the second one."""
    one, two = DRAFTS
    texts = [
        timed(PLAIN, 9.0),
        timed(one, 3.0, 0, [4, 3], [3, 2], rounds=4),
        timed(two, 6.0, 0, [5, 5, 1], [4, 0, 0], rounds=5),
        timed(PLAIN, 100.0, 1),
        timed(one, 50.0, 1, [4], [1], rounds=8),
        timed(PLAIN, 12.0, 1),
        timed(two, 3.0, 1, [3], [3], rounds=6),
    ]
    costs = RoundCosts(4.0, {1: 1.0, 3: 1.5}, {3: 0.5}, {100: 0.25})
    config = LlamaConfig.tiny(vocab_size=100)
    base, first, second = compare(config, 4, EVERYTHING, texts, costs, 1e6)
    assert base.speedup == 1 and base.acceptance_rate is None
    # 9 tokens in 9 s and, counted once, 9 in 12 s.
    assert (base.slowest, base.fastest) == (9 / 12, 1.0)
    assert first.speedup == (3.0 + 2.0) / 2 and second.speedup == (1.5 + 4.0) / 2
    assert first.acceptance_by_position == [4 / 8, 2 / 3]
    assert second.acceptance_by_position == [7 / 8, 0, 0]
    assert first.acceptance_rate == 6 / 11 and second.tokens_per_round == 18 / 11
    # 11 drafts in 12 rounds of exit 1 of 4 layers.
    drafts = 11 / 12
    parts = drafts * (1.0 + 0.25) + 1.0 + 3 * 1.5 + 0.5
    assert first.predicted == pytest.approx((1 + 6 / 12) * 4.0 / parts)
    assert first.round_over_parts == pytest.approx((3 / 4 + 50 / 8) / 2 / parts)


def test_what_rounds_verify_by_hand():
    """10 rounds of at most 8 drafts: 2 have none, 1 has one or two, 3 three or four, none five or
    six, and 4 more."""
    sure = SelfSpeculative(1, 8, draft_confidence=0.5)
    drafted, accepted = [8, 7, 7, 6, 4, 4, 4, 1], [5, 0, 0, 0, 0, 0, 0, 0]
    texts = [timed(PLAIN, 9.0), timed(sure, 3.0, 0, drafted, accepted, rounds=10)]
    layer, head = {1: 8.0, 3: 1.0, 5: 2.0, 9: 3.0}, {3: 0.5, 5: 1.0, 9: 2.0}
    costs = RoundCosts(40.0, layer, head, {100: 0.5})
    _, row = compare(LlamaConfig.tiny(vocab_size=100), 4, [PLAIN, sure], texts, costs, 1e6)
    # 41 drafts by one layer of four, and 9 rounds in which the head gives a token in vain.
    parts = 4.1 * (8.0 + 0.5) + 8.0 + 0.9 * 0.5
    parts += 0.2 * (40.0 - 8.0) + 0.1 * (3 * 1.0 + 0.5) + 0.3 * (3 * 2.0 + 1.0)
    parts += 0.4 * (3 * 3.0 + 2.0)
    assert row.predicted == pytest.approx((1 + 5 / 10) * 40.0 / parts)


PROMPT = [72, 101, 108]


@pytest.fixture(scope="module")
def engine(model, tokenizer):
    """Of a model whose layers from 2 on add nothing."""
    return Engine(identity_tail(model, 2), tokenizer, drafting_from(1), ignore_end=True)


def drafting_from(exit_layer: int) -> SelfSpeculative:
    return SelfSpeculative(exit_layer, 3, shared_exits=(1, 2))


def test_acceptance_by_position_of_an_identity_tail(engine):
    """Every draft of exit 2 is right. Ten tokens are one of the prompt's reading and rounds of 4, 4
    and, as nothing is left to draft, 1."""
    engine.use(drafting_from(2))
    (done,) = engine.generate([PROMPT], max_new_tokens=10)
    assert done.drafted_by_position == done.accepted_by_position == [2, 2, 2]
    assert done.rounds == 3


def test_acceptance_by_position_counted_one_by_one(engine):
    """Of exit 1, whose drafts are refused now and then."""
    engine.use(drafting_from(1))
    (done,) = engine.generate([PROMPT], max_new_tokens=24)

    @jax.jit
    def best_of(tokens_BT, last):
        return engine.model.unembed(engine.model.exits(tokens_BT)[:, 0, last]).argmax(-1)

    def says(exit_layer: int, tokens: list[int]) -> int:
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(tokens)] = tokens
        return int(best_of(padded, len(tokens) - 1)[exit_layer - 1])

    text, end = [*PROMPT, says(4, PROMPT)], len(PROMPT) + 24
    drafted, accepted = [0] * 3, [0] * 3
    while len(text) < end:
        drafts: list[int] = []
        for _ in range(min(3, end - len(text) - 1)):
            drafts.append(says(1, text + drafts))
        stands = True
        for position, draft in enumerate(drafts):
            drafted[position] += 1
            stands = stands and says(4, text) == draft
            if stands:
                accepted[position] += 1
                text.append(draft)
        text.append(says(4, text))
    assert text[len(PROMPT) :] == done.token_ids
    assert 0 < sum(accepted) < sum(drafted)
    assert (done.drafted_by_position, done.accepted_by_position) == (drafted, accepted)
