"""Rules by which the full model accepts drafts.

`SelfSpeculative(..., accept=rule)` uses a rule (docs/extending.md has an example). Column t belongs
to the t-th new token of a row. `draft.tokens_BT[:, t]` is the draft. `logits_BTV[:, t]` are the
full model's logits, given the earlier drafts and after penalties. `rule(logits_BTV, draft)` returns

    tokens_BT    the accepted drafts, and one more token; later columns are not read
    accepted_B   number of accepted drafts of each row, counted from the first
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lsjax.config import check
from lsjax.decoding.draft import Draft, of_tokens
from lsjax.decoding.sampling import Purpose, argmax
from lsjax.decoding.state import DecodeState
from lsjax.model.protocol import Cache, DecoderModel

Accepted = tuple[Int[Array, "B T"], Int[Array, " B"]]
AcceptanceRule = Callable[[Float[Array, "B T V"], Draft], Accepted]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Verified:
    """Tokens of a round. Row b gets the first accepted_B[b] + 1 of them."""

    cache: Cache
    tokens_BT: Int[Array, "B T"]
    accepted_B: Int[Array, " B"]
    log_probs_BT: Float[Array, "B T"] | None
    seen: Any = None  # what a strategy reads off the verification

    def commit(self, draft: Draft, source: Int[Array, ""] | int) -> DecodeState:
        """The rows with their new tokens. source: layers that drafted."""
        return draft.state.with_cache(self.cache).commit(
            self.tokens_BT,
            self.accepted_B,
            drafted_B=draft.count_B,
            draft_BT=draft.tokens_BT,
            log_probs_BT=self.log_probs_BT,
            source=source,
        )


def judge(
    model: DecoderModel,
    draft: Draft,
    x_BTD: Float[Array, "B T D"],
    cache: Cache,
    rule: AcceptanceRule | None,
) -> tuple[Verified, Float[Array, "B T V"]]:
    """Accepts drafts by the full model's states. Also returns its logits, after penalties. rule: by
    default the lossless one."""
    state = draft.state
    logits_BTV = model.unembed(x_BTD)
    changed_BTV = state.penalised(logits_BTV, 0, draft.tokens_BT)
    if rule is None:
        lossless = accept_equal if state.sampling is None else accept_block
        tokens_BT, accepted_B = lossless(changed_BTV, draft)
    else:
        tokens_BT, accepted_B = checked(rule, changed_BTV, draft)
    log_probs_BT = state.log_probs(logits_BTV, changed_BTV, tokens_BT)
    return Verified(cache, tokens_BT, accepted_B, log_probs_BT), changed_BTV


def checked(rule: AcceptanceRule, logits_BTV: Float[Array, "B T V"], draft: Draft) -> Accepted:
    """The result of a rule, which accepts at most the drafts that there are. Raises ConfigError for
    a result of another form."""
    result, expected = rule(logits_BTV, draft), [draft.tokens_BT.shape, draft.count_B.shape]
    parts = result if isinstance(result, tuple | list) else [result]
    found = [jnp.shape(part) for part in parts]
    check(
        found == expected,
        f"the acceptance rule returned arrays of the shapes {found}, instead of tokens and counts "
        f"of the shapes {expected}",
    )
    tokens_BT, accepted_B = result
    return tokens_BT, jnp.clip(accepted_B, 0, draft.count_B)


def accept_equal(logits_BTV: Float[Array, "B T V"], draft: Draft) -> Accepted:
    """Greedy: a draft is accepted if it is the full model's argmax."""
    best_BT = argmax(logits_BTV)
    return best_BT, draft.leading(draft.tokens_BT == best_BT)


def accept_block(logits_BTV: Float[Array, "B T V"], draft: Draft) -> Accepted:
    """Block verification (Sun et al., 2024): the tokens have the full model's distribution p,
    whatever the draft's distribution q. On average, tests of each draft in turn accept no more.

    Accepts the first t drafts, for the largest t whose random number is below `block_chances`. The
    next token comes from max(0, w_t p - q), normalised, with q = 0 after the last draft.

    A draft may end early, if its end depends on its own tokens only. Imagine that it goes on with
    q = p. There w is constant, and the excess is 0 until the end. So all imagined tokens are
    accepted, with chance w, or none. They are samples of p: the next rounds may draw them.
    """
    state, sampling, head = draft.state, draft.state.sampling, draft.head
    log_p_BTV = sampling.log_distribution(logits_BTV)
    weight_BT, chance_BT = block_chances(log_p_BTV, draft)
    index_T = jnp.arange(chance_BT.shape[1])
    # All tests count, so every round needs fresh numbers: they depend on where it starts.
    passes_BT = sampling.uniform(state.length_B, index_T, Purpose.ACCEPT) < chance_BT
    accepted_B = jnp.where(passes_BT & (index_T <= draft.count_B[:, None]), index_T, 0).max(1)

    def here(values_BTn):
        return jnp.take_along_axis(values_BTn, accepted_B[:, None, None], axis=1)[:, 0]

    p_BV, q_BW = jnp.exp(here(log_p_BTV)), jnp.exp(here(draft.log_q_BTW))
    q_BW = jnp.where((accepted_B < draft.count_B)[:, None], q_BW, 0)  # no draft: all of p
    rest_BV = here(weight_BT[..., None]) * p_BV
    rest_BV = rest_BV - q_BW if head is None else rest_BV.at[:, head.ids_W].add(-q_BW)
    rest_BV = jnp.maximum(rest_BV, 0)
    # If rounding leaves nothing, p and q are equal.
    rest_BV = jnp.where(rest_BV.sum(1, keepdims=True) > 0, rest_BV, p_BV)
    token_B = sampling.token(rest_BV, state.length_B + accepted_B, Purpose.TOKEN)
    own_BT = jnp.broadcast_to(token_B[:, None], draft.tokens_BT.shape)
    return draft.followed_by(own_BT, accepted_B), accepted_B


def block_chances(
    log_p_BTV: Float[Array, "B T V"], draft: Draft
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Weights w_t of the first t drafts x, and the chances h_t that their test passes:

        w_0 = 1    w_t = min(1, w_{t-1} p(x_t) / q(x_t))
        h_t = e_t / (e_t + 1 - w_t)    with the excess e_t = sum of max(0, w_t p - q) over tokens

    x_t is `draft.tokens_BT[:, t - 1]`, and column t of p and q is the distribution after it.
    Columns beyond the draft are undefined.
    """
    head = draft.head
    index_BT, log_p_BTW = draft.tokens_BT, log_p_BTV
    if head is not None:
        index_BT, log_p_BTW = head.places_V[index_BT], log_p_BTV[..., head.ids_W]
    log_ratio_BT = of_tokens(log_p_BTW, index_BT) - of_tokens(draft.log_q_BTW, index_BT)
    log_w_B = jnp.zeros_like(log_ratio_BT[:, 0])
    log_weights = [log_w_B]
    for t in range(log_ratio_BT.shape[1] - 1):
        log_w_B = jnp.minimum(0, log_w_B + log_ratio_BT[:, t])
        log_weights.append(log_w_B)
    log_w_BT = jnp.stack(log_weights, axis=1)
    # max(0, a - b) = a - min(a, b): tokens that may not be drafted need no pass.
    shared_BTW = jnp.minimum(log_w_BT[..., None] + log_p_BTW, draft.log_q_BTW)
    shared_BT = jnp.where(draft.exists_BT, jnp.exp(shared_BTW).sum(-1), 0)
    weight_BT = jnp.exp(log_w_BT)
    excess_BT = jnp.maximum(weight_BT - shared_BT, 0)
    # Without excess, p and q are equal or the weight is 0: longer drafts decide.
    total_BT = jnp.where(excess_BT > 0, excess_BT + (1 - weight_BT), 1)
    return weight_BT, excess_BT / total_BT
