"""Which drafts of each exit would have passed, in a round that any of them drafted."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lsjax.decoding.auto.learned import Counts, by_level
from lsjax.decoding.draft import Draft, of_tokens, top_probability
from lsjax.decoding.sampling import argmax
from lsjax.model.protocol import DecoderModel


def scores(
    model: DecoderModel,
    exits: tuple[int, ...],
    draft: Draft,
    exit_layer: Int[Array, ""],
    due: Bool[Array, ""],
    drafting_states: Callable[[], list[Float[Array, "B T D"]]],
    logits_BTV: Float[Array, "B T V"],
    tokens_BT: Int[Array, "B T"],
    accepted_B: Int[Array, " B"],
) -> Counts:
    """Counts of passed and tried drafts, if each exit had drafted the new tokens.

    A draft passes if its argmax is the token; in sampling with min(1, q / p) of exit and full
    model. `exit_layer`, which drafted, is always scored, also where it stopped; others if due.
    drafting_states: returns what each exit drafts from. logits_BTV: the full model's, after
    penalties.
    """
    state, head = draft.state, draft.head
    none = jnp.zeros_like(state.learned.passed_BEZ)
    if not exits:
        return Counts(none, none)
    rows, places_V = (None, None) if head is None else (head.rows, head.places_V)
    index_BT = tokens_BT if head is None else places_V[tokens_BT]
    is_new_BT = jnp.arange(tokens_BT.shape[1]) <= accepted_B[:, None]
    if state.sampling is not None:
        log_p_BT = of_tokens(state.sampling.log_distribution(logits_BTV), tokens_BT)

    def passed(log_q_BTW):
        # NaN: not in the vocabulary, or beyond the new tokens.
        log_q_BT = of_tokens(log_q_BTW, index_BT)
        return jnp.nan_to_num(jnp.exp(jnp.minimum(0, log_q_BT - log_p_BT)))

    def score(x_BTD):
        logits_BTW = state.penalised(model.unembed(x_BTD, rows), 0, tokens_BT, places_V)
        top_BT = top_probability(logits_BTW)
        if state.sampling is None:
            return by_level(top_BT, is_new_BT, argmax(logits_BTW) == index_BT)
        return by_level(top_BT, is_new_BT, passed(state.sampling.log_distribution(logits_BTW)))

    def every():
        found = map(score, drafting_states())
        return jax.tree.map(lambda *ns_BZ: jnp.stack(ns_BZ, axis=1), *found)

    greedy = state.sampling is None
    right_BT = draft.tokens_BT == tokens_BT if greedy else passed(draft.log_q_BTW)
    own = by_level(draft.top_BT, is_new_BT & (draft.top_BT > 0), right_BT)
    found = lax.cond(due, every, lambda: Counts(none, none))
    is_own_E1 = (jnp.array(exits) == exit_layer)[:, None]
    return jax.tree.map(lambda n_BZ, n_BEZ: jnp.where(is_own_E1, n_BZ[:, None], n_BEZ), own, found)
