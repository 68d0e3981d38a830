"""Greedy self-speculation gives the tokens of autoregressive decoding, whatever E, d and batch."""

import copy
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.config import ConfigError
from lsjax.decoding.draft import DraftVocabulary
from lsjax.decoding.engine import Engine
from lsjax.decoding.self_speculative import SelfSpeculative, sharing_programs
from lsjax.decoding.strategy import Autoregressive, EarlyExit
from lsjax.evaluation.comparison import identity_tail
from lsjax.model.llama import stacked
from tests.marks import long

PROMPTS = [[7], [1, 2, 3], list(range(40, 60)), [200, 100] * 17]
NEW = 24
# Where two computations differ in rounding, a tie of this size may fall either way.
MARGIN = 1e-4


def assert_same_tokens(model, prompt, expected, found):
    """Fails on a difference unless the two best logits there lie closer than MARGIN."""
    if expected == found:
        return
    place = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), None)
    assert place is not None, f"{len(expected)} and {len(found)} tokens"
    logits = model(jnp.asarray([list(prompt) + expected[:place]]))[0, -1]
    margin = logits.max() - jnp.minimum(logits[expected[place]], logits[found[place]])
    assert margin < MARGIN, f"token {place} differs with a margin of {margin}"


def tokens(model, tokenizer, strategy, prompts, batch_size=1, **options):
    engine = Engine(model, tokenizer, strategy, batch_size=batch_size)
    return [c.token_ids for c in engine.generate(prompts, max_new_tokens=NEW, **options)]


@pytest.fixture(scope="module")
def model(deep):
    return deep


@pytest.fixture(scope="module")
def expected(model, tokenizer):
    return tokens(model, tokenizer, Autoregressive(), PROMPTS)


@pytest.fixture(scope="module")
def engine(model, tokenizer):
    """Four rows; for all strategies, so that what they share is compiled once."""
    return Engine(model, tokenizer, batch_size=4)


def complete(engine, strategy):
    """Four ragged prompts side by side."""
    engine.use(strategy)
    return engine.generate(PROMPTS, max_new_tokens=NEW)


def rounds_of(trace):
    """Drafts of each round, and how many of them were accepted."""
    ends = np.flatnonzero(trace.round_n)
    return zip(
        trace.round_n[ends[1:]] - 1,
        np.add.reduceat(trace.accepted_n.astype(int), ends[:-1] + 1),
        strict=True,
    )


@jax.jit
def all_exits(model, tokens):
    return model.unembed(model.exits(tokens))


def test_autoregressive_equals_the_full_forward(model, expected):
    """Without a cache: the best next token of every prefix."""
    forward = jax.jit(lambda model, tokens: model(tokens).argmax(-1))
    for prompt, new in zip(PROMPTS, expected, strict=True):
        best = np.asarray(forward(model, jnp.asarray([prompt + new])))[0]
        assert_same_tokens(model, prompt, best[len(prompt) - 1 : -1].tolist(), new)


@pytest.mark.parametrize("exit_layer", [1, *long(2, 3, 4)])
def test_early_exit_equals_the_truncated_forward(model, tokenizer, exit_layer):
    found = tokens(model, tokenizer, EarlyExit(exit_layer), PROMPTS[:2])
    for prompt, new in zip(PROMPTS, found, strict=False):
        logits = np.asarray(all_exits(model, jnp.asarray([prompt + new])))[exit_layer - 1, 0]
        chosen = np.take_along_axis(logits[len(prompt) - 1 : -1], np.array(new)[:, None], 1)[:, 0]
        assert (logits[len(prompt) - 1 : -1].max(-1) - chosen < MARGIN).all()


@pytest.mark.long
@pytest.mark.parametrize(
    "exit_layer, drafts",
    [(2, 1), (3, 8), *long(*((2, drafts) for drafts in range(2, 9)), (1, 1), (1, 4), (3, 3))],
)
def test_self_speculation_is_lossless(model, engine, expected, exit_layer, drafts):
    """Each prompt gives what it gives alone."""
    found = complete(engine, SelfSpeculative(exit_layer, drafts))
    for prompt, one, other in zip(PROMPTS, expected, found, strict=True):
        assert_same_tokens(model, prompt, one, other.token_ids)


@pytest.mark.long
@pytest.mark.parametrize("strategy", [SelfSpeculative(1, 4), Autoregressive(), EarlyExit(4)])
def test_stacked_layers_give_the_same_tokens(model, tokenizer, expected, strategy):
    """The form of training: its layers are separated inside the programs."""
    found = tokens(stacked(model), tokenizer, strategy, PROMPTS, batch_size=4)
    for prompt, one, other in zip(PROMPTS, expected, found, strict=True):
        assert_same_tokens(model, prompt, one, other)


@pytest.mark.long
def test_strategies_share_a_program(model, tokenizer, engine, expected):
    """Every exit with every length: the same tokens, the same statistics as a program of its own,
    and one program for all rounds."""
    cells = [SelfSpeculative(*cell) for cell in itertools.product((1, 2, 3), (0, 2, 5))]
    shared = Engine(model, tokenizer, batch_size=4)
    for cell, one_of_many in zip(cells, sharing_programs(cells), strict=True):
        found = complete(shared, one_of_many)
        for prompt, one, other in zip(PROMPTS, expected, found, strict=True):
            assert_same_tokens(model, prompt, one, other.token_ids)
            assert cell.num_draft_tokens or other.drafted == 0 and other.tokens_per_round == 1
        if (cell.exit_layer, cell.num_draft_tokens) in [(2, 5), (3, 2)]:
            own = complete(engine, cell)
            for one, other in zip(own, found, strict=True):
                assert one.trace.round_n.tolist() == other.trace.round_n.tolist()
                assert one.accepted_by_position == other.accepted_by_position
    assert len(shared.programs) == 4  # two sizes of prompts, into the batch, rounds


def test_a_confidence_keeps_its_own_lengths():
    """With lengths of other settings it would verify fewer positions than alone."""
    cells = [SelfSpeculative(1, 4), SelfSpeculative(2, 6)]
    for exit_layer, drafts, confidence in [(1, 8, 0.5), (2, 8, 0.7), (2, 12, 0.5)]:
        cells.append(SelfSpeculative(exit_layer, drafts, draft_confidence=confidence))
    shared = sharing_programs(cells)
    assert [one.lengths for one in shared] == [(4, 6)] * 2 + [(0, 2, 4, 6, 8)] * 2 + [
        (0, 3, 6, 9, 12)
    ]
    assert {one.exits for one in shared} == {(1, 2)}
    assert len({one.program for one in shared}) == 3


@pytest.mark.long
def test_lengths_between_those_compiled_for(model, tokenizer, expected):
    """A round takes the shortest verification that holds its drafts."""
    strategy = SelfSpeculative(2, 5, shared_lengths=(0, 2))
    engine = Engine(model, tokenizer, strategy, batch_size=4)
    for drafts in range(5):
        settings = strategy.arguments(engine.model)
        engine.arguments = settings._replace(num_draft_tokens=jnp.int32(drafts))
        found = engine.generate(PROMPTS, max_new_tokens=NEW)
        for prompt, one, other in zip(PROMPTS, expected, found, strict=True):
            assert_same_tokens(model, prompt, one, other.token_ids)
            assert len(other.drafted_by_position) == drafts
    assert len(engine.programs) == 4


@pytest.mark.parametrize("confidence", [0.1, *long(0.003, 0.9)])
def test_a_draft_ends_where_the_exit_is_unsure(model, engine, expected, confidence):
    """Every draft is likely enough by a forward pass of its own, and with the token that would have
    come next it is not, unless the draft ended for another reason."""
    strategy = SelfSpeculative(2, 4, draft_confidence=confidence)
    found, ends = complete(engine, strategy), 0
    for prompt, want, one in zip(PROMPTS, expected, found, strict=True):
        assert_same_tokens(model, prompt, want, one.token_ids)
        logits = all_exits(model, jnp.asarray([prompt + one.token_ids]))[1, 0]
        sure = np.asarray(jax.nn.softmax(logits, -1).max(-1))[len(prompt) - 1 :]
        at = 0  # new tokens that are there before a round
        for drafted, accepted in rounds_of(one.trace):
            at += 1
            # What follows a refused draft is another text than the one that was drafted on.
            known = min(drafted, accepted + 1)
            assert sure[at : at + known].prod() > confidence - 1e-6
            room = min(4, NEW - at - 1)
            if drafted == accepted and drafted < room:
                assert sure[at : at + drafted + 1].prod() < confidence + 1e-6
                ends += 1
            at += accepted
        assert at == len(one.token_ids) - 1
    assert ends > 0


@pytest.mark.long
@pytest.mark.parametrize("size", [257, 1, 50])
def test_a_draft_vocabulary_is_lossless(model, engine, expected, size):
    """The draft proposes no other tokens, and the text is the same."""
    vocabulary = DraftVocabulary(np.arange(258 - size, 258))
    found = complete(engine, SelfSpeculative(3, 4, vocabulary))
    for prompt, one, other in zip(PROMPTS, expected, found, strict=True):
        assert_same_tokens(model, prompt, one, other.token_ids)
        proposed = other.trace.tokens_n[other.trace.accepted_n].tolist()
        proposed += other.trace.replaced_n[other.trace.replaced_n >= 0].tolist()
        assert set(proposed) <= set(vocabulary.ids_N.tolist())
        assert other.drafted > 0
    if size == 257:  # the whole vocabulary but a token that nobody says
        whole = complete(engine, SelfSpeculative(3, 4))
        for one, other in zip(whole, found, strict=True):
            assert 0 in one.token_ids or one.accepted == other.accepted


def test_the_most_frequent_tokens():
    counts = {7: 5, 3: 9, 200: 5, 4: 1}
    assert DraftVocabulary.most_frequent(counts, 1, 258).ids_N.tolist() == [3]
    assert DraftVocabulary.most_frequent(counts, 2, 258).ids_N.tolist() == [3, 7]
    # Tokens that were never seen: the lowest ids.
    assert DraftVocabulary.most_frequent(counts, 7, 258).ids_N.tolist() == [0, 1, 2, 3, 4, 7, 200]
    with pytest.raises(ConfigError, match="draft vocabulary of 0 is empty"):
        DraftVocabulary.most_frequent(counts, 0, 258)


def test_drafts_are_accepted_and_refused(engine):
    """Else the test above would say nothing."""
    completions = complete(engine, SelfSpeculative(3, 4))
    accepted = sum(c.accepted for c in completions)
    assert 0.1 < accepted / sum(c.drafted for c in completions) < 0.9


@pytest.mark.parametrize("form", [lambda model: model, *long(stacked)], ids=["separate", "stacked"])
def test_a_draft_by_the_whole_model_is_always_right(model, tokenizer, expected, form):
    """Layers that add nothing behind the exit: every draft is accepted, nothing is overshot."""
    engine = Engine(form(identity_tail(model, 2)), tokenizer)
    for strategy in sharing_programs([SelfSpeculative(2, drafts) for drafts in (1, 4, 7)]):
        engine.use(strategy)
        drafts = strategy.num_draft_tokens
        (completion,) = engine.generate([[5, 6]], max_new_tokens=NEW)
        assert completion.acceptance_rate == 1.0
        assert completion.num_new_tokens == NEW
        # The prefill gives one token, a round drafts + 1, and the last round drafts what is left.
        assert completion.rounds == -(-(NEW - 1) // (drafts + 1))
        assert completion.drafted == NEW - 1 - completion.rounds


def test_end_token_inside_a_draft(model, tokenizer, expected):
    """Any token of the expected text may be the end: the text stops at its first occurrence."""
    inside = 0
    ending = copy.copy(tokenizer)
    engine = Engine(model, ending, SelfSpeculative(3, 5))
    for prompt, new in list(zip(PROMPTS, expected, strict=True))[1:3]:
        for end in sorted(set(new)):
            ending.eos_ids = (end,)
            (completion,) = engine.generate([prompt], max_new_tokens=NEW)
            assert completion.token_ids == new[: new.index(end) + 1]
            assert completion.finish_reason == "eos"
            assert completion.drafted <= completion.num_new_tokens + 5 * completion.rounds
            inside += bool(completion.trace.accepted_n[-1])
    assert inside, "no end token was an accepted draft"


def test_max_new_tokens_1_needs_no_round(engine, expected):
    engine.use(SelfSpeculative(1, 4))
    completions = engine.generate(PROMPTS, max_new_tokens=1)
    assert [c.token_ids for c in completions] == [new[:1] for new in expected]
    assert all(c.rounds == 0 and c.tokens_per_second is None for c in completions)
    assert all(c.acceptance_rate is None and c.tokens_per_round is None for c in completions)


@pytest.mark.parametrize(
    "strategy, words",
    [
        (SelfSpeculative(0, 4), "exit layer 0 is out of range: use --exit-layer 1..3"),
        (SelfSpeculative(4, 4), "exit layer 4 is out of range: use --exit-layer 1..3"),
        (SelfSpeculative(2, -1), "num_draft_tokens -1 is out of range: use 0..512"),
        (SelfSpeculative(2, 3 * 10**9), "num_draft_tokens 3000000000 is out of range: use 0..512"),
        (SelfSpeculative(1, 2, DraftVocabulary(np.array([3, 9, 7]))), "ids must ascend"),
        (SelfSpeculative(1, 2, DraftVocabulary(np.array([], int))), "a draft vocabulary of 0"),
        (
            SelfSpeculative(1, 2, shared_exits=(1, 4)),
            "exit layer 4 is out of range: use --exit-layer 1..3",
        ),
        (
            SelfSpeculative(1, 2, shared_lengths=(-1,)),
            "num_draft_tokens -1 is out of range: use 0..512",
        ),
        (
            SelfSpeculative(1, 2, draft_confidence=1.1),
            "draft_confidence 1.1 is out of range: use a value from 0 to 1",
        ),
        (
            SelfSpeculative(1, 2, draft_confidence=-0.1),
            "draft_confidence -0.1 is out of range: use a value from 0 to 1",
        ),
        (SelfSpeculative(1, 2, DraftVocabulary(np.arange(258))), "258 does not make the head"),
        (SelfSpeculative(1, 2, DraftVocabulary(np.array([3, 258]))), "has ids 3..258, the model"),
        (EarlyExit(0), "exit layer 0 is out of range: use --exit-layer 1..4"),
        (EarlyExit(5), "exit layer 5 is out of range: use --exit-layer 1..4"),
    ],
)
def test_bad_strategies_are_refused(model, tokenizer, strategy, words):
    with pytest.raises(ConfigError, match=words):
        Engine(model, tokenizer, strategy)
