"""Self-speculative decoding (the paper's section 4.3): draft with the first layers, verify with
the rest, on one cache.

One round for one row, exit E = 2 of L = 4 layers, d = 3 drafts. The pending token is p:

    layers 2..3                        v v v v     verification: all four positions at once,
    layers 0..1   p   a   b   c        ^ ^ ^ ^     from the exit hidden states kept below
                  |   |   |   |        h h h h  <- (the paper's "KVQ" cache)
    draft head    a   b   c   -
    full head                          a b x y     what the whole model says after p, a, b, c
                                       = = !
    committed     a   b   x                        two accepted drafts and one correction;
                                                   c is dropped: its slots get overwritten

Layers 0..E-1 never run twice on a token: the verification starts from the draft's exit hidden
states and reads the draft's keys and values. The last draft token passes the first layers
without a head, because nothing is drafted after it.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lsjax.config import LlamaConfig, check
from lsjax.decoding.state import DecodeState, Strategy
from lsjax.model.llama import Llama


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Draft:
    """What the first E layers leave for the verification.

    state: with the draft's keys and values in the cache. hidden_BTD: the exit hidden states of
    the pending token and the d drafts, T = d + 1. tokens_BT: the drafts, d of T columns in use;
    of row b the first count_B[b].
    """

    state: DecodeState
    hidden_BTD: Float[Array, "B T D"]
    tokens_BT: Int[Array, "B T"]
    count_B: Int[Array, " B"]


@dataclass(frozen=True)
class SelfSpeculative(Strategy):
    """Greedy self-speculation: the same tokens as Autoregressive, in fewer passes of the model.

    exit_layer: E, layers of the draft. num_draft_tokens: d, drafts per round and row.
    """

    name = "self_speculative"
    exit_layer: int = field()
    num_draft_tokens: int = field()

    def validate(self, config: LlamaConfig) -> None:
        """Raises ConfigError unless 1 <= exit_layer < L and num_draft_tokens >= 1."""
        check(
            1 <= self.exit_layer < config.num_layers,
            f"exit layer {self.exit_layer} is not in 1..{config.num_layers - 1}: the draft must "
            f"run some and not all of the {config.num_layers} layers; choose --exit-layer there",
        )
        check(
            self.num_draft_tokens >= 1,
            f"num_draft_tokens {self.num_draft_tokens} is below 1: choose --num-draft-tokens 1 "
            "or more",
        )

    def depth(self, config: LlamaConfig) -> int:
        """All layers: the verification decides every token."""
        return config.num_layers

    def step(self, model: Llama, state: DecodeState) -> DecodeState:
        """One round: draft, verify, commit what agrees and one token more."""
        draft = self.draft(model, state)
        return self.verify(model, draft)

    def draft(self, model: Llama, state: DecodeState) -> Draft:
        """Up to d tokens per row from the exit.

        A row drafts no further than its end (the verification adds one token of its own) and
        not beyond a stop token; the loop ends when no row drafts.
        """
        batch = state.length_B.shape[0]
        d = self.num_draft_tokens
        room_B = jnp.where(state.running_B, state.end_B - state.length_B - 1, 0)
        limit_B = jnp.minimum(room_B, d)

        def more(carry):
            return carry[0]

        def step(carry):
            _, i, cache, token_B, hidden_BTD, draft_BT, drafted_B, active_B = carry
            positions_BT = state.length_B[:, None] - 1 + i
            x_BTD = model.embed(token_B[:, None])
            x_BTD, cache = model.run_layers(x_BTD, 0, self.exit_layer, positions_BT, cache)
            hidden_BTD = lax.dynamic_update_slice_in_dim(hidden_BTD, x_BTD, i, axis=1)
            active_B &= i < limit_B
            token_B = lax.cond(
                active_B.any(),
                lambda x_BTD: model.unembed(x_BTD[:, 0]).argmax(-1).astype(token_B.dtype),
                lambda x_BTD: token_B,
                x_BTD,
            )
            # Column d is a spare: the last pass drafts nothing.
            draft_BT = lax.dynamic_update_slice_in_dim(draft_BT, token_B[:, None], i, axis=1)
            drafted_B += active_B
            active_B &= ~state.is_stop(token_B)
            going = active_B.any()  # then the new token must pass the first layers too
            return going, i + 1, cache, token_B, hidden_BTD, draft_BT, drafted_B, active_B

        start = (
            True,
            0,
            state.cache,
            state.pending_B,
            jnp.zeros((batch, d + 1, model.config.hidden_size), model.dtype),
            jnp.zeros((batch, d + 1), state.tokens_BS.dtype),
            jnp.zeros(batch, jnp.int32),
            state.running_B,
        )
        _, _, cache, _, hidden_BTD, draft_BT, drafted_B, _ = lax.while_loop(more, step, start)
        return Draft(state.with_cache(cache), hidden_BTD, draft_BT, drafted_B)

    def verify(self, model: Llama, draft: Draft) -> DecodeState:
        """The remaining layers on the pending token and the drafts, all at once; then the
        longest prefix of the draft that the whole model agrees with, and its next token."""
        state, steps = draft.state, draft.tokens_BT.shape[1]
        positions_BT = state.length_B[:, None] - 1 + jnp.arange(steps)
        x_BTD, cache = model.run_layers(
            draft.hidden_BTD, self.exit_layer, model.config.num_layers, positions_BT, state.cache
        )
        target_BT = model.unembed(x_BTD).argmax(-1).astype(draft.tokens_BT.dtype)
        agrees_BT = (draft.tokens_BT == target_BT) & (jnp.arange(steps) < draft.count_B[:, None])
        accepted_B = jnp.cumprod(agrees_BT, axis=1).sum(1)
        return state.with_cache(cache).commit(
            target_BT,
            accepted_B + 1,
            accepted_B=accepted_B,
            drafted_B=draft.count_B,
            draft_BT=draft.tokens_BT,
        )
