"""What times and drafts say of strategies, and by how much a difference was decided."""

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from rich.console import Console

from lsjax.config import LlamaConfig
from lsjax.decoding.completion import Completion
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import Request
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.strategy import Autoregressive, EarlyExit
from lsjax.evaluation import comparison
from lsjax.evaluation.answers import Question, as_line, complete, read, resume
from lsjax.evaluation.comparison import Difference, first_difference, identity_tail
from lsjax.evaluation.scores import Cell, repeated_share
from lsjax.evaluation.speeds import cell_speeds, doubts, timed_beside

PLAIN, DRAFTS = Autoregressive(), [SelfSpeculative(1, 2), SelfSpeculative(2, 2)]
EVERYTHING = [PLAIN, *DRAFTS]
QUESTIONS = [
    Question(id=str(prompt), sample=repeat, request=Request(prompt=[prompt]))
    for repeat in range(2)
    for prompt in (7, 8)
]


@dataclass
class Recorder:
    """In the place of an engine: notes who decodes what; each text takes a second longer."""

    asked: list = field(default_factory=list)
    model: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(config=LlamaConfig.tiny())
    )
    tokens: dict = field(default_factory=dict)  # by the exit
    runtime: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(capacity=lambda length, strategy: 256)
    )
    programs: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(compile_seconds=0.0))

    def use(self, strategy):
        self.strategy = strategy

    def generate(self, requests, *, on_completion=None):
        if on_completion is None:  # the warm-up
            self.programs.compile_seconds += 7
            return
        (request,) = requests
        cell = Cell.of(self.strategy)
        self.asked.append((cell.exit_layer, request.prompt[0]))
        found = dict.fromkeys((one.name for one in dataclasses.fields(Completion)), None)
        found |= cell._asdict() | {"decode_seconds": len(self.asked)}
        found["token_ids"] = self.tokens.get(cell.exit_layer, [1, 2])
        completion = object.__new__(Completion)  # of which only some fields are known
        completion.__dict__.update(found)
        on_completion(0, completion)


@pytest.fixture
def turns(tmp_path):
    """Completes a file in which some answers are there; who was asked, and the new answers."""

    def turns(done=(), engine=None, strategies=EVERYTHING) -> tuple[list, list[dict]]:
        engine, file = engine or Recorder(), tmp_path / "answers.jsonl"
        resume(file, {})
        with file.open("a") as stream:
            stream.writelines(as_line({"key": key}) for key in done)
        figures = partial(timed_beside, engine)
        rest = (engine, strategies, QUESTIONS, {}, file, Console(quiet=True), figures)
        complete(*rest, timed=True)
        return engine.asked, read(file)[1][len(done) :]

    return turns


def test_strategies_take_turns(turns):
    asked, answers = turns()
    assert asked == [(e, p) for p in (7, 8, 7, 8) for e in (None, 1, 2)]
    assert [(one["sample"], one["id"]) for one in answers[::3]] == [
        *((0, "7"), (0, "8"), (1, "7"), (1, "8")),
    ]
    # Each beside the autoregressive text of its own turn.
    assert [one["base_seconds"] for one in answers] == [n for n in (1, 4, 7, 10) for _ in range(3)]
    assert [one["decode_seconds"] for one in answers] == [*range(1, 13)]


def test_what_is_done_is_left_out_and_has_a_base_beside_it(turns):
    done = [QUESTIONS[0].key(strategy) for strategy in EVERYTHING]
    done += [QUESTIONS[1].key(strategy) for strategy in EVERYTHING[:2]]
    done += [QUESTIONS[2].key(strategy) for strategy in EVERYTHING[1:]]
    asked, answers = turns(done)
    assert asked == [(None, 8), (2, 8), (None, 7), *((e, 8) for e in (None, 1, 2))]
    assert answers[1]["base_seconds"] == answers[0]["decode_seconds"]


def test_differences_are_those_from_the_text_beside(monkeypatch, turns):
    """Only strategies that must be exact are compared; early exit is not."""
    seen = []

    def first_difference(model, prompt, expected, found):
        seen.append((prompt, expected, found))
        return Difference(1, 2, 3, np.nan) if expected != found else None

    monkeypatch.setattr(comparison, "first_difference", first_difference)
    engine = Recorder(tokens={2: [1, 3], 3: [4, 4]})
    _, answers = turns(engine=engine, strategies=[*EVERYTHING, EarlyExit(3)])
    assert [one["difference"] is None for one in answers[:4]] == [True, True, False, True]
    assert answers[2]["difference"] == {**{"index": 1, "expected": 2, "found": 3, "margin": None}}
    assert seen[:3] == [([7], [1, 2], [1, 2]), ([7], [1, 2], [1, 2]), ([7], [1, 2], [1, 3])]


def timed(strategy, seconds, prompt=0, drafted=(), accepted=(), rounds=9, base=None, **more):
    own = Cell.of(strategy)._asdict() | {"id": str(prompt), "group": "", "seen": False}
    own |= {"decode_seconds": seconds, "num_new_tokens": 10, "rounds": rounds, "seed": None}
    own |= {"drafted": sum(drafted), "accepted": sum(accepted)}
    own |= {"drafted_by_position": list(drafted), "accepted_by_position": list(accepted)}
    own |= {"base_seconds": base or seconds, "base_num_new_tokens": 10}
    own |= {"difference": None, "compile_seconds": 3.0}
    own["num_prompt_tokens"] = 5
    own["repeated_4grams"] = repeated_share([1, 2, 3, 4, 1, 2, 3, 4, 5, 6])
    return own | more


def test_figures_by_hand():
    """Two prompts; the run was killed between the two cells of the second one."""
    one, two = DRAFTS
    answers = [
        timed(PLAIN, 9.0),
        timed(one, 3.0, 0, [4, 3], [3, 2], rounds=4, base=9.0),
        timed(two, 6.0, 0, [5, 5, 1], [4, 0, 0], rounds=5, base=9.0),
        timed(one, 50.0, 1, [4], [1], rounds=8, base=100.0),
        timed(PLAIN, 12.0, 1),
        timed(two, 3.0, 1, [3], [3], rounds=6, base=12.0),
    ]
    config = LlamaConfig.tiny(vocab_size=100)
    base, first, second = cell_speeds(config, answers)
    assert base["speedup"] == 1 and base["acceptance_rate"] is None
    # 9 tokens in 9 s and 9 in 12 s.
    assert (base["slowest"], base["fastest"]) == (9 / 12, 1.0)
    assert first["speedup"] == (3.0 + 2.0) / 2 and second["speedup"] == (1.5 + 4.0) / 2
    # Resamples of two prompts have the median of either, or of both.
    assert (first["speedup_low"], first["speedup_high"], first["texts"]) == (2.0, 3.0, 2)
    assert first["acceptance_rate"] == 6 / 11 and second["tokens_per_round"] == 18 / 11
    # 11 drafts in 12 rounds of exit 1 of 4 layers, and a head as large as k of them.
    k = config.head_params / config.layer_params
    ideal = (1 + 6 / 12) * (4 + k) / (11 / 12 * (1 + k) + 4 + k)
    assert first["ideal"] == pytest.approx(ideal)
    assert first["share_of_ideal"] == pytest.approx(first["speedup"] / ideal)
    # Of 7 4-grams one stood earlier. Autoregressive decoding took 9, 12 and 100 s.
    assert first["repeated_4grams"] == pytest.approx(1 / 7)
    assert [row["disagreement"] for row in (base, first, second)] == [12 / 9, 100 / 9, 12 / 9]
    assert [row["trusted"] for row in (base, first, second)] == [True, False, False]
    assert second["share_of_ideal"] > 1.1
    words = doubts([base, first, second])
    assert "differ by up to 11.1x" in words and f"is {second['share_of_ideal']:.2f}" in words
    assert doubts([base]) == ""


@pytest.mark.parametrize(
    "seconds, bases, seed, expected",
    [
        ([10.0, 10.2, 11.0], [9, 9, 9], None, 1.1),
        ([10.0, 10.2, 21.0], [9, 9, 9], None, 2.1),  # its own repeats
        ([10.0, 10.2, 21.0], [9, 9, 9], 5, 1),  # sampled texts differ, and so do their times
        ([10.0, 10.0, 10.0], [9, 18, 9], 5, 2),  # autoregressive decoding
    ],
)
def test_repeats_that_disagree(seconds, bases, seed, expected):
    one = DRAFTS[0]
    answers = [
        timed(one, own, base=base, seed=seed) for own, base in zip(seconds, bases, strict=True)
    ]
    longer = timed(DRAFTS[1], 50.0, num_prompt_tokens=500)  # of another size
    row, _ = cell_speeds(LlamaConfig.tiny(), [*answers, longer])
    assert row["disagreement"] == pytest.approx(expected)
    assert row["trusted"] == (expected <= 1.5)


def test_short_texts_are_not_timed():
    """Their speedups are marked, and the warning names their length."""
    short = dict(num_new_tokens=3, base_num_new_tokens=3)
    (row,) = cell_speeds(LlamaConfig.tiny(), [timed(PLAIN, 1.0, **short)])
    assert not row["trusted"] and row["new_tokens"] == 3
    assert "Texts of 3 new tokens on average are too short to time" in doubts([row])


def test_groups_and_differences_of_prompts():
    """Whatever the repeats; a margin that is no finite number is infinite."""
    narrow, wide = ({"margin": margin} for margin in (1e-5, None))
    answers = [
        timed(PLAIN, 1.0, 0, group="b"),
        timed(PLAIN, 2.0, 1, group="a", difference=narrow),
        timed(PLAIN, 2.0, 1, group="a", difference=narrow),
        timed(PLAIN, 4.0, 2, group="a", difference=wide),
    ]
    rows = list(cell_speeds(LlamaConfig.tiny(), answers))
    assert [(row["group"], row["equal"], row["differ"]) for row in rows] == [
        *(("all", 1, 2), ("a", 0, 2), ("b", 1, 0)),
    ]
    assert [row["widest_margin"] for row in rows] == [np.inf, np.inf, None]
    assert [row["slowest"] for row in rows] == [9 / 4, 9 / 4, 9.0]
    sampled = [answers[0] | {"seed": 3}]
    (row,) = cell_speeds(LlamaConfig.tiny(), sampled)
    assert row["equal"] is row["differ"] is row["widest_margin"] is None


PROMPT = [72, 101, 108]


@pytest.fixture(scope="module")
def engine(model, tokenizer):
    """An engine whose model's layers from 2 on add nothing."""
    return Engine(identity_tail(model, 2), tokenizer, drafting_from(1), ignore_end=True)


def drafting_from(exit_layer: int) -> SelfSpeculative:
    return SelfSpeculative(exit_layer, 3)


def test_acceptance_by_position_of_an_identity_tail(engine):
    """Every draft of exit 2 is right. Ten tokens are one of the prompt's reading and rounds of 4, 4
    and, as nothing is left to draft, 1."""
    engine.use(drafting_from(2))
    (done,) = engine.generate([PROMPT], max_new_tokens=10)
    assert done.drafted_by_position == done.accepted_by_position == [2, 2, 2]
    assert done.rounds == 3


def test_acceptance_by_position_counted_one_by_one(engine):
    """Decodes from exit 1, whose drafts are rejected now and then."""
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


@pytest.mark.parametrize(
    "logits, found, margin",
    [
        ([5.0, 4.5, -3.0], 1, 0.5),
        ([5.0, 5.00001, -3.0], 1, 1e-5),
        ([5.0, 5.00001, -3.0], 2, 8.00001),  # a tie, but of other tokens
        ([4.0, 3.0, 6.0], 1, 3.0),  # the expected token was not the best either
        ([np.nan, 3.0, 6.0], 1, np.nan),
    ],
)
def test_margin(model, monkeypatch, logits, found, margin):
    seen = []
    monkeypatch.setattr(
        comparison, "last_logits", lambda _, tokens: seen.append(tokens) or np.array(logits)
    )
    difference = first_difference(model, [7, 8], [4, 0, 2], [4, found, 9])
    assert (difference.index, difference.expected, difference.found) == (1, 0, found)
    assert difference.margin == pytest.approx(margin, nan_ok=True)
    assert seen == [[7, 8, 4]]


def test_equal_and_shorter(model):
    assert first_difference(model, [7], [1, 2], [1, 2]) is None
    difference = first_difference(model, [7], [1, 2], [1])
    assert (difference.index, difference.expected, difference.found) == (1, 2, None)
    assert difference.margin == np.inf
