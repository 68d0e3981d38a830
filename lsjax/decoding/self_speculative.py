"""Self-speculative decoding (the paper's section 4.3): draft with the first layers, verify with
the rest, on one cache.

One round for one row, exit E = 2 of L = 4 layers, d = 3 drafts. The pending token is p:

    layers 2..3                        v v v v     verification: all four positions at once,
    layers 0..1   p   a   b   c        ^ ^ ^ ^     from the exit hidden states kept below
                  |   |   |   |        h h h h  <- (the paper's "KVQ" cache)
    draft head    a   b   c   -
    full head                          a b x y     the full model's tokens after p, a, b, c
                                       = = !
    committed     a   b   x                        two accepted drafts and one correction;
                                                   c is dropped: its slots get overwritten

Layers 0..E-1 never run twice on a token: the verification reads the draft's keys and values, too.
The last draft token passes the first layers without a head, as nothing is drafted after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax.numpy as jnp

from lsjax.config import LlamaConfig, check
from lsjax.decoding.draft import AcceptanceRule, DraftVocabulary
from lsjax.decoding.rounds import Drafting, RoundSettings
from lsjax.decoding.state import DecodeState
from lsjax.decoding.strategy import Strategy
from lsjax.model.llama import Llama


@dataclass(frozen=True)
class SelfSpeculative(Drafting):
    """Same greedy tokens as Autoregressive in fewer passes. Sampling keeps the distribution.

    exit_layer: E, layers of the draft. num_draft_tokens: d, drafts per round and row; 0 makes each
    round one autoregressive step. vocabulary: tokens that may be drafted, all by default.
    draft_confidence: stops drafting when the product of the exit's top-token probabilities falls
    below this value. accept: acceptance rule (draft.py); by default the lossless rule.
    shared_exits, shared_lengths: other exits and lengths that share the compiled program
    (`sharing_programs`).
    """

    name = "self_speculative"
    exit_layer: int = field()
    num_draft_tokens: int = field()
    vocabulary: DraftVocabulary | None = None
    draft_confidence: float | None = None
    accept: AcceptanceRule | None = None
    shared_exits: tuple[int, ...] = ()
    shared_lengths: tuple[int, ...] = ()

    @property
    def exits(self) -> tuple[int, ...]:
        """Exits that the program serves."""
        return tuple(sorted({self.exit_layer, *self.shared_exits}))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Draft lengths that the program serves; if drafts may end early, with quarters of d."""
        quarters = (4,) if self.draft_confidence is None else range(5)
        own = {self.num_draft_tokens * quarter // 4 for quarter in quarters}
        return tuple(sorted(own | {*self.shared_lengths}))

    def validate(self, config: LlamaConfig) -> None:
        """Raises ConfigError if a number is out of range or the vocabulary does not match."""
        super().validate(config)
        check(
            self.draft_confidence is None or 0 <= self.draft_confidence <= 1,
            f"draft_confidence {self.draft_confidence} is out of range: use a value from 0 to 1",
        )
        for drafts in self.lengths:
            check(
                0 <= drafts <= config.max_context,
                f"num_draft_tokens {drafts} is out of range: use 0..{config.max_context}",
            )

    def arguments(self, model: Llama) -> RoundSettings:
        """Exit, length and confidence as numbers, and the rows of the head that the draft uses."""
        confidence, shape = self.draft_confidence, (1, 1 + self.lengths[-1])
        return RoundSettings(
            jnp.int32(self.exit_layer),
            jnp.int32(self.num_draft_tokens),
            None if self.vocabulary is None else self.vocabulary.head(model),
            None if confidence is None else jnp.full(shape, confidence, jnp.float32),
        )

    def step(self, model: Llama, state: DecodeState, arguments: RoundSettings) -> DecodeState:
        """One round: draft, verify, and commit the accepted tokens plus one."""
        return self.verify(model, self.draft(model, state, arguments), arguments)[0]


def sharing_programs(strategies: Sequence[Strategy]) -> list[Strategy]:
    """The same strategies. Self-speculative ones share a compiled program, with a confidence only
    those of one length: more lengths would let them verify fewer positions than alone."""
    drafting = [one for one in strategies if isinstance(one, SelfSpeculative)]
    exits = tuple(sorted({one.exit_layer for one in drafting}))
    lengths = tuple(one.num_draft_tokens for one in drafting if one.draft_confidence is None)
    shared = {None: tuple(sorted({*lengths}))}
    return [
        replace(one, shared_exits=exits, shared_lengths=shared.get(one.draft_confidence, ()))
        if one in drafting
        else one
        for one in strategies
    ]
