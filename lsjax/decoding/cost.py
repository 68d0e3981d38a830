"""What a round of decoding costs, and what self-speculation can gain.

Two views of the same round of exit E and d drafts, on L layers and a head as dear as k layers:

    d (E + k_d)          d draft steps; k_d = k N / V with a draft vocabulary of N, else k
    u k_d                the head once more in the share u of rounds whose draft ends unsure
    E                    the last draft token passes the first layers without a head
    (L - E) and k        the verification of d + 1 positions

The ideal counts bytes: d + 1 positions cost what one does, and the last draft token's layers
belong to the verification. The prediction takes the measured seconds of each part (calibration.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lsjax.config import LlamaConfig


def tokens_per_round(acceptance: float, drafts: float) -> float:
    """New tokens of a round: the accepted drafts and one of the verification."""
    return 1 + acceptance * drafts


def unsure_share(drafted_by_position: Sequence[int], num_draft_tokens: int, rounds: int) -> float:
    """Share of the rounds whose draft ended by its confidence, before its last position; none where
    nothing is to be drafted.

    The end of a text and a stop token end a few drafts too.
    """
    if num_draft_tokens == 0:
        return 0.0
    return 1 - sum(drafted_by_position[num_draft_tokens - 1 : num_draft_tokens]) / rounds


def ideal_speedup(
    config: LlamaConfig,
    exit_layer: int,
    drafts: float,
    acceptance: float,
    draft_vocab: int | None = None,
    unsure: float = 0.0,
) -> float:
    """Speedup over autoregressive decoding if time were bytes of weights.

    unsure: share of rounds whose draft ends by its confidence, after the head has given its next
    token.
    """
    head = config.head_params / config.layer_params
    draft_head = head * (draft_vocab or config.vocab_size) / config.vocab_size
    whole = config.num_layers + head
    tokens = tokens_per_round(acceptance, drafts)
    return tokens * whole / (drafts * (exit_layer + draft_head) + unsure * draft_head + whole)


def weight_bytes(config: LlamaConfig, itemsize: int) -> int:
    """Bytes of weights that one token reads: all layers and the head."""
    return (config.num_layers * config.layer_params + config.head_params) * itemsize


@dataclass(frozen=True)
class Costs:
    """Measured seconds.

    token: a round of autoregressive decoding. layer: one layer, by the number of positions that
    pass at once. head: the head and its likeliest tokens, likewise, without 1, which `token` has.
    draft: a draft step but for its layers, by the size of the draft's vocabulary.
    """

    token: float
    layer: Mapping[int, float]
    head: Mapping[int, float]
    draft: Mapping[int, float]

    def pass_seconds(self, num_layers: int, width: int) -> float:
        """Seconds of `width` positions through all layers and the head."""
        return self.token if width == 1 else num_layers * self.layer[width] + self.head[width]

    def round(
        self,
        num_layers: int,
        exit_layer: int,
        drafts: float,
        *,
        widths: Mapping[int, float],
        draft_vocab: int,
        unsure: float = 0.0,
    ) -> float:
        """Seconds of a round of self-speculation with `drafts` draft steps (on average).

        widths: by the number of positions, the share of rounds that verify so many. unsure: share
        of rounds whose draft ends by its confidence.
        """
        return (
            (drafts + 1) * exit_layer * self.layer[1]
            + (drafts + unsure) * self.draft[draft_vocab]
            + sum(
                share * (self.pass_seconds(num_layers, width) - exit_layer * self.layer[width])
                for width, share in widths.items()
            )
        )

    def speedup(
        self,
        num_layers: int,
        exit_layer: int,
        drafts: float,
        acceptance: float,
        *,
        widths: Mapping[int, float],
        draft_vocab: int,
        unsure: float = 0.0,
    ) -> float:
        """Predicted speedup over autoregressive decoding."""
        cost = self.round(
            num_layers,
            exit_layer,
            drafts,
            widths=widths,
            draft_vocab=draft_vocab,
            unsure=unsure,
        )
        return tokens_per_round(acceptance, drafts) * self.token / cost
