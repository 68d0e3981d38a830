"""Greedy self-speculation gives the tokens of autoregressive decoding, whatever E, d and batch."""

import copy
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.config import ConfigError
from lsjax.decoding.draft_vocabulary import DraftVocabulary
from lsjax.decoding.engine import Engine
from lsjax.decoding.programs import decode, prefill
from lsjax.decoding.request import Request
from lsjax.decoding.self_speculative import SelfSpeculative, speculative_round
from lsjax.decoding.strategy import Autoregressive, EarlyExit
from lsjax.evaluation.comparison import identity_tail
from lsjax.model.llama import stacked
from tests.marks import long
from tests.states import new_state

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
@pytest.mark.parametrize("confidence", [0.1, 0.003, 0.9])
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
        assert set(proposed) <= set(vocabulary.ids_W.tolist())
        assert other.drafted > 0
    if size == 257:  # the whole vocabulary but a token that nobody says
        whole = complete(engine, SelfSpeculative(3, 4))
        for one, other in zip(whole, found, strict=True):
            assert 0 in one.token_ids or one.accepted == other.accepted


def test_the_most_frequent_tokens():
    counts = {7: 5, 3: 9, 200: 5, 4: 1}
    assert DraftVocabulary.most_frequent(counts, 1, 258).ids_W.tolist() == [3]
    assert DraftVocabulary.most_frequent(counts, 2, 258).ids_W.tolist() == [3, 7]
    # Tokens that were never seen: the lowest ids.
    assert DraftVocabulary.most_frequent(counts, 7, 258).ids_W.tolist() == [0, 1, 2, 3, 4, 7, 200]
    with pytest.raises(ConfigError, match="draft vocabulary of 0 is empty"):
        DraftVocabulary.most_frequent(counts, 0, 258)


def test_drafts_are_accepted_and_refused(engine):
    """Else the test above would say nothing."""
    completions = complete(engine, SelfSpeculative(3, 4))
    accepted = sum(c.accepted for c in completions)
    assert 0.1 < accepted / sum(c.drafted for c in completions) < 0.9


@pytest.mark.long
@pytest.mark.parametrize("form", [lambda model: model, stacked], ids=["separate", "stacked"])
def test_a_draft_by_the_whole_model_is_always_right(model, tokenizer, expected, form):
    """Layers that add nothing behind the exit: every draft is accepted, nothing is overshot."""
    engine = Engine(form(identity_tail(model, 2)), tokenizer)
    for strategy in [SelfSpeculative(2, drafts) for drafts in (1, 4, 7)]:
        engine.use(strategy)
        drafts = strategy.num_draft_tokens
        (completion,) = engine.generate([[5, 6]], max_new_tokens=NEW)
        assert completion.acceptance_rate == 1.0
        assert completion.num_new_tokens == NEW
        # The prefill gives one token, a round drafts + 1, and the last round drafts what is left.
        assert completion.rounds == -(-(NEW - 1) // (drafts + 1))
        assert completion.drafted == NEW - 1 - completion.rounds


@dataclass(frozen=True)
class Drafted(SelfSpeculative):
    """Another model's first layers draft; the model verifies from `verified_from`. What was kept is
    passed on through the log-probabilities: the sums of each state."""

    verified_from: int = 2

    def round(self, model, state, arguments):
        drafter = jax.tree.map(lambda leaf: leaf * (1.02 if self.verified_from == 0 else 1), model)
        rest = drafter, model, self.verified_from, state, arguments
        done, kept = speculative_round(self, *rest, keep=(3, 1, 2))
        assert sorted(kept) == [1, 2, 3]
        steps = kept[1].shape[1]
        places_BT = state.length_B[:, None] - 1 + jnp.arange(steps)
        sums_BT = sum(factor * kept[exit_].sum(-1) for exit_, factor in ((1, 1), (2, 3), (3, 9)))
        rows_B1 = jnp.arange(len(sums_BT))[:, None]
        return replace(done, log_probs_BS=done.log_probs_BS.at[rows_B1, places_BT].set(sums_BT))


@pytest.mark.long
@pytest.mark.parametrize("verified_from", [2, 0])
def test_another_drafter_and_the_states_of_exits(model, expected, verified_from):
    """The text is the model's own, whoever drafts. States of exits are those of a plain pass."""
    strategy, prompt = Drafted(2, 3, verified_from=verified_from), PROMPTS[1]
    request = Request(prompt=prompt, max_new_tokens=NEW, log_probs=True)
    sizes = dict(capacity=64, num_layers=4, dtype=model.dtype)
    state = new_state(model.config, [request], **sizes)
    rest = dict(chunk=32, depth=4)
    state = jax.jit(partial(prefill, **rest))(model, state, np.int32(0))
    run = jax.jit(partial(decode, strategy=strategy))
    state = run(model, state, np.int32(99), strategy.arguments(model))
    text = np.asarray(state.tokens_BS)[0, : len(prompt) + NEW].tolist()
    assert_same_tokens(model, prompt, expected[1], text[len(prompt) :])
    states = jax.jit(lambda model, ids: model.exits(ids))(model, jnp.asarray([text]))[:, 0]
    sums = np.asarray(states.sum(-1))
    # The prompt's states are not kept, and the last token has none.
    here = slice(len(prompt), len(text) - 1)
    found = np.asarray(state.log_probs_BS)[0, here]
    np.testing.assert_allclose(found, (sums[0] + 3 * sums[1] + 9 * sums[2])[here], atol=1e-2)


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
