"""Acceptance rules: those that a caller passes in, and block verification in exact sums."""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from lsjax.config import ConfigError, Sampling
from lsjax.decoding.acceptance import accept_block, accept_equal, block_chances
from lsjax.decoding.draft import Draft
from lsjax.decoding.draft_vocabulary import DraftHead
from lsjax.decoding.engine import Engine
from lsjax.decoding.sampling import Purpose, RowSampling
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.strategy import Autoregressive

PROMPTS, NEW = [[7], [1, 2, 3], list(range(40, 60))], 24


def accept_none(logits_BTV, draft):
    accepted_B = jnp.zeros_like(draft.count_B)
    return draft.followed_by(logits_BTV.argmax(-1), accepted_B), accepted_B


def texts(model, tokenizer, strategy, **options):
    engine = Engine(model, tokenizer, strategy, batch_size=4)
    return engine.generate(PROMPTS, max_new_tokens=NEW, **options)


@pytest.fixture(scope="module")
def expected(model, tokenizer):
    return texts(model, tokenizer, Autoregressive())


def test_a_rule_that_accepts_nothing(model, tokenizer, expected):
    found = texts(model, tokenizer, SelfSpeculative(1, 4, accept=accept_none))
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    assert sum(c.drafted for c in found) > sum(c.accepted for c in found) == 0


@pytest.mark.long
@pytest.mark.parametrize(
    "rule, sampling",
    [(accept_equal, Sampling()), (accept_block, Sampling(temperature=1.0, seed=3))],
)
def test_the_defaults(model, tokenizer, rule, sampling):
    default = texts(model, tokenizer, SelfSpeculative(1, 4), sampling=sampling)
    named = texts(model, tokenizer, SelfSpeculative(1, 4, accept=rule), sampling=sampling)
    assert [c.token_ids for c in named] == [c.token_ids for c in default]


def test_columns_of_a_draft_by_hand():
    """Two drafts of a row and one of another; T is one more than the longest draft has."""
    tokens_BT = jnp.array([[5, 6, 0], [7, 0, 0]])
    draft = Draft(None, jnp.zeros((2, 3, 4)), tokens_BT, jnp.array([2, 1]), None, None)
    assert draft.exists_BT.tolist() == [[True, True, False], [True, False, False]]
    for stands, accepted in [
        ([[1, 1, 1], [1, 1, 1]], [2, 1]),
        ([[0, 1, 1], [1, 0, 0]], [0, 1]),
        ([[1, 0, 1], [0, 1, 1]], [1, 0]),
    ]:
        assert draft.leading(jnp.array(stands, bool)).tolist() == accepted
    own_BT = jnp.array([[1, 2, 3], [4, 8, 9]])
    assert draft.followed_by(own_BT, jnp.array([2, 0])).tolist() == [[5, 6, 3], [4, 8, 9]]
    logits_BTV = jnp.arange(2 * 3 * 10).reshape(2, 3, 10)
    assert draft.of_drafts(logits_BTV).tolist() == [[5, 16, 20], [37, 40, 50]]
    assert draft.first(2).tokens_BT.tolist() == [[5, 6], [7, 0]]


Text = tuple[int, ...]
D, N = 3, 4  # the longest draft, and the vocabulary


@dataclass
class Case:
    """Distributions of the next token, p and q, after each text of at most D tokens.

    drafts: the tokens that may be drafted. ends: texts after which nothing is drafted.
    """

    p: dict[Text, np.ndarray]
    q: dict[Text, np.ndarray]
    drafts: list[int] = field(default_factory=lambda: list(range(N)))
    ends: frozenset[Text] = frozenset()

    def all_drafts(self, text: Text = ()) -> list[Text]:
        """Every draft that q may give."""
        if len(text) == D or text in self.ends:
            return [text]
        tokens = np.flatnonzero(self.q[text])
        return [draft for token in tokens for draft in self.all_drafts((*text, int(token)))]

    def probability(self, text: Text, of: dict[Text, np.ndarray]) -> float:
        return float(np.prod([of[text[:t]][token] for t, token in enumerate(text)]))


def texts_up_to(length: int) -> list[Text]:
    return [text for size in range(length + 1) for text in np.ndindex((N,) * size)]


def case(kind: str, seed: int = 0) -> Case:
    random = np.random.default_rng(seed)

    def table(change=lambda p: p):
        rows = {text: change(random.dirichlet(np.ones(N))) for text in texts_up_to(D)}
        return {text: row / row.sum() for text, row in rows.items()}

    def filtered(p):
        return np.where(p < np.sort(p)[1], 0, p)  # all but one token

    def point(p):
        return np.eye(N)[p.argmax()]

    p, q = table(), table()
    if kind == "filters":
        return Case(table(filtered), table(filtered))
    if kind == "greedy":
        return Case(table(point), table(point))
    if kind == "point":  # as of a draft that is looked up in the prompt
        return Case(p, table(point))
    if kind == "equal":
        return Case(p, p)
    if kind == "vocabulary":
        return Case(p, table(lambda p: p * [1, 0, 1, 1]), drafts=[0, 2, 3])
    if kind == "stop token":
        return Case(p, q, ends=frozenset(text for text in texts_up_to(D) if 1 in text))
    if kind == "confidence":  # a text ends by what is known before its next token
        return Case(p, q, ends=frozenset(text for text in q if text and q[text].max() < 0.5))
    if kind == "no draft":
        return Case(p, q, ends=frozenset([()]))
    assert kind == "random"
    return Case(p, q)


def as_draft(case: Case, drafts: list[Text], sampling=None) -> tuple[jnp.ndarray, Draft]:
    """Log-probabilities of the full model, and a batch with one row for each draft. Columns that
    are not used hold what no rule should read."""
    shape_BT = len(drafts), D + 1
    tokens_BT, log_p_BTV = np.full(shape_BT, case.drafts[0]), np.full((*shape_BT, N), -np.inf)
    log_q_BTW = np.full((*shape_BT, len(case.drafts)), -np.inf)
    for row, text in enumerate(drafts):
        tokens_BT[row, : len(text)] = text
        with np.errstate(divide="ignore"):
            for t in range(len(text) + 1):
                log_p_BTV[row, t] = np.log(case.p[text[:t]])
            for t in range(len(text)):
                log_q_BTW[row, t] = np.log(case.q[text[:t]][case.drafts])
    head, count_B = None, np.array([len(text) for text in drafts], np.int32)
    if len(case.drafts) < N:
        places_V = np.full(N, len(case.drafts))
        places_V[case.drafts] = np.arange(len(case.drafts))
        head = DraftHead(np.array(case.drafts), places_V, np.zeros((len(case.drafts), 1)))
    state = SimpleNamespace(sampling=sampling, length_B=np.full(len(drafts), 5))
    arrays = jax.device_put((tokens_BT.astype(np.int32), log_q_BTW.astype(np.float32)))
    draft = Draft(state, np.zeros((*shape_BT, 1)), arrays[0], count_B, arrays[1], head)
    return jax.device_put(log_p_BTV.astype(np.float32)), draft


class FixedDraws:
    """Lets only the test of `passing` drafts pass, and keeps the weights of the next token."""

    def __init__(self, passing: int):
        self.passing = passing

    def log_distribution(self, logits_BTV):
        return logits_BTV

    def uniform(self, position_B, offset_T, purpose):
        u_T = jnp.where(offset_T == self.passing, 0.0, 2.0)
        return jnp.broadcast_to(u_T, (len(position_B), len(offset_T)))

    def token(self, weight_BV, position_B, purpose):
        self.weight_BV = np.asarray(weight_BV, np.float64)
        return weight_BV.argmax(-1)


def outcomes(case: Case, drafts: list[Text]) -> tuple[np.ndarray, np.ndarray]:
    """Probability [drafts, D + 1] that the rule accepts t tokens of a draft, and distributions
    [drafts, D + 1, N] of the token after them."""
    count, drafts = len(drafts), (drafts * N**D)[: N**D]  # one shape for all cases
    log_p_BTV, draft = as_draft(case, drafts)
    chance_BT = np.array(block_chances(log_p_BTV, draft)[1], np.float64)
    chance_BT[np.arange(D + 1) > np.asarray(draft.count_B)[:, None]] = 0
    chance_BT[:, 0] = 1  # whatever fails
    later_BT = np.cumprod(1 - chance_BT[:, ::-1], axis=1)[:, ::-1]  # this and all later ones fail
    share_BT = chance_BT * np.append(later_BT[:, 1:], np.ones((len(drafts), 1)), axis=1)
    next_BTV = np.zeros((*share_BT.shape, N))
    for t in range(D + 1):
        draws = FixedDraws(t)
        tokens_BT, accepted_B = accept_block(*as_draft(case, drafts, draws))
        assert (accepted_B == np.where(chance_BT[:, t] > 0, t, 0)).all()
        next_BTV[:, t] = draws.weight_BV / draws.weight_BV.sum(-1, keepdims=True)
        for row, accepted in enumerate(np.asarray(accepted_B)):
            assert tokens_BT[row, :accepted].tolist() == list(drafts[row][:accepted])
    return share_BT[:count], next_BTV[:count]


KINDS = (
    *("random", "filters", "greedy", "point", "equal"),
    *("vocabulary", "stop token", "confidence", "no draft"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_block_verification_is_exact(kind):
    """The sum over all drafts gives D + 1 tokens the distribution p. Where a round commits fewer,
    samples of p follow."""
    one = case(kind)
    drafts = one.all_drafts()
    share_BT, next_BTV = outcomes(one, drafts)
    assert share_BT.sum(1) == pytest.approx(1, abs=1e-6)
    found = dict.fromkeys(texts_up_to(D + 1), 0.0)
    for draft, share_T, next_TV in zip(drafts, share_BT, next_BTV, strict=True):
        for t in range(len(draft) + 1):
            mass = one.probability(draft, one.q) * share_T[t]
            for token in range(N):
                found[(*draft[:t], token)] += mass * next_TV[t, token]
    for text in texts_up_to(D):  # in ascending length
        for token in range(N if text else 0):
            found[(*text, token)] += found[text] * one.p[text][token]
    whole = [text for text in found if len(text) == D + 1]
    expected = [one.probability(text, one.p) for text in whole]
    np.testing.assert_allclose([found[text] for text in whole], expected, atol=1e-6)


def accepted_by_block(case: Case) -> float:
    """Mean number of accepted drafts."""
    drafts = case.all_drafts()
    share_BT, _ = outcomes(case, drafts)
    of_drafts = [case.probability(draft, case.q) for draft in drafts]
    return float(of_drafts @ share_BT @ np.arange(D + 1))


def accepted_by_ratio(case: Case) -> float:
    """The same for the rule of Leviathan et al. (2023), which tests each draft in turn."""
    total = 0.0
    for draft in case.all_drafts():
        stands = 1.0
        for t, token in enumerate(draft):
            stands *= min(1, case.p[draft[:t]][token] / case.q[draft[:t]][token])
            total += case.probability(draft, case.q) * stands
    return total


def test_block_verification_accepts_no_fewer():
    """Than a test of each draft in turn, in ten random settings and those above."""
    gains = []
    for one in [*(case("random", seed) for seed in range(10)), *map(case, KINDS)]:
        block, ratio = accepted_by_block(one), accepted_by_ratio(one)
        assert block > ratio - 1e-6
        gains.append(block / max(ratio, 1e-9))
    print("accepted drafts over those in turn, ten random settings:", np.round(gains[:10], 3))
    assert min(gains[:10]) > 1.001


def test_the_example_of_the_paper():
    """Sun et al. (2024), section 2: two tokens, whatever precedes them, and two drafts. 10/9 drafts
    are accepted in turn and 11/9 as a block."""
    p, q = np.array([1, 2, 0, 0]) / 3, np.array([2, 1, 0, 0]) / 3
    ends = frozenset(text for text in texts_up_to(D) if len(text) == 2)
    one = Case(*({text: row for text in texts_up_to(D)} for row in (p, q)), ends=ends)
    assert accepted_by_ratio(one) == pytest.approx(10 / 9)
    assert accepted_by_block(one) == pytest.approx(11 / 9, abs=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("fresh", [True, False], ids=["as it is", "by position"])
def test_rounds_are_independent(monkeypatch, fresh):
    """Two rounds of the paper's example give p, unless the second draws again the numbers that
    belong to the positions of the first."""
    rows, steps, of_round = 20_000, 2, RowSampling._keys
    if not fresh:

        def of_position(self, position_B, offset, purpose):
            return of_round(self, position_B + offset, 0, purpose)

        monkeypatch.setattr(RowSampling, "_keys", of_position)
    alone = RowSampling.create([Sampling(temperature=1.0)])
    key_B2 = jax.vmap(lambda seed: jax.random.key_data(jax.random.key(seed)))(jnp.arange(rows))
    draws = jax.tree.map(lambda leaf: jnp.repeat(leaf, rows, axis=0), alone)
    draws = replace(draws, key_B2=key_B2)
    p_BV, q_BV = (jnp.tile(jnp.array(x) / 3, (rows, 1)) for x in ([1.0, 2.0], [2.0, 1.0]))
    log_p_BTV, log_q_BTV = (jnp.log(x_BV)[:, None].repeat(steps + 1, 1) for x_BV in (p_BV, q_BV))
    length_B, text_BS = jnp.zeros(rows, int), np.zeros((rows, 8), int)

    @jax.jit
    def one_round(length_B):
        drafts = [draws.token(q_BV, length_B, Purpose.DRAFT, i) for i in range(steps)]
        tokens_BT = jnp.stack([*drafts, jnp.zeros_like(length_B)], axis=1)
        state = SimpleNamespace(sampling=draws, length_B=length_B)
        count_B = jnp.full(rows, steps)
        draft = Draft(state, jnp.zeros((rows, steps + 1, 1)), tokens_BT, count_B, log_q_BTV, None)
        return accept_block(log_p_BTV, draft)

    for _ in range(2):
        tokens_BT, accepted_B = one_round(length_B)
        places = np.arange(rows)[:, None], np.asarray(length_B)[:, None] + np.arange(steps + 1)
        text_BS[places] = tokens_BT  # the next round overwrites what is not committed
        length_B = length_B + accepted_B + 1
    seen = np.bincount(text_BS[:, 0] * 2 + text_BS[:, 1], minlength=4)
    p_value = chisquare(seen, np.array([1, 2, 2, 4]) / 9 * rows).pvalue
    assert p_value > 0.01 if fresh else p_value < 1e-12


def test_results_of_a_rule_are_checked(model, tokenizer):
    """More accepted drafts than there are count as all; another form is refused."""

    def too_many(logits_BTV, draft):
        return logits_BTV.argmax(-1), jnp.full_like(draft.count_B, 99)

    strategy = SelfSpeculative(1, 3, accept=too_many)
    (done,) = Engine(model, tokenizer, strategy, ignore_end=True).generate([[1]], max_new_tokens=9)
    assert done.accepted == done.drafted > 0 and done.num_new_tokens == 9
    for result in (lambda logits_BTV, draft: draft.count_B, lambda *_: (0, 1)):
        engine = Engine(model, tokenizer, SelfSpeculative(1, 3, accept=result))
        with pytest.raises(ConfigError, match="the acceptance rule returned .* instead of tokens"):
            engine.generate([[1]], max_new_tokens=9)
