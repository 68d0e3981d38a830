"""Costs of a round in bytes of weights that it reads, with the gain that they allow.

With L layers, and a head that is as large as k of them, an autoregressive round reads L + k layers.
A round of exit E and d drafts reads

    d (E + k_d)          in d draft steps; k_d is the head with the draft's vocabulary
    E                    when the last draft token passes the first layers
    L - E + k            in the verification of d + 1 positions

stopwatch.py measures seconds.
"""

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np

from lsjax.config import LlamaConfig

DRAFTS = 8  # of the round for which a draft vocabulary is chosen
MOST_DRAFTS = 8  # that are chosen beside an exit
PASSES = 0.8  # share of drafts that pass, for that choice


def ideal_speedup(
    config: LlamaConfig,
    exit_layer: int,
    drafts: float,
    acceptance: float,
    draft_vocab: int | None = None,
) -> float:
    """Speedup over autoregressive decoding if time depended only on bytes of weights, and not on
    the number of positions. drafts: of a round, on average."""
    head = config.head_params / config.layer_params
    draft_head = head * (draft_vocab or config.vocab_size) / config.vocab_size
    token = config.num_layers + head
    return (1 + acceptance * drafts) * token / (drafts * (exit_layer + draft_head) + token)


def best_exit(
    config: LlamaConfig, agreement_E: Sequence[float], exits: Sequence[int] | None = None
) -> tuple[int, int] | None:
    """Exit and draft length with the best ideal speedup; None if no exit is faster.

    agreement_E: probability that a draft of exit E, at index E - 1, passes after others that did.
    exits: that are considered; all by default.
    """

    def speedup(choice: tuple[int, int]) -> float:
        exit_layer, drafts = choice
        passes = agreement_E[exit_layer - 1]
        acceptance = sum(passes**n for n in range(1, drafts + 1)) / drafts
        return ideal_speedup(config, exit_layer, drafts, acceptance)

    exits = range(1, config.num_layers) if exits is None else exits
    choices = product(exits, range(1, MOST_DRAFTS + 1))
    best = max(choices, key=speedup, default=None)
    return best if best is not None and speedup(best) > 1 else None


def best_draft_vocab(config: LlamaConfig, exit_layer: int, counts: Mapping[int, int]) -> int | None:
    """Draft vocabulary with the best ideal speedup: a power of two, or None for all tokens.

    counts: of each token. The share of those seen once estimates that of new ones (Good, 1953).
    """
    total = sum(counts.values())
    covered = np.cumsum(sorted(counts.values(), reverse=True)) / total
    known = 1 - sum(count == 1 for count in counts.values()) / total

    def speedup(size: int) -> float:
        share = PASSES if size == config.vocab_size else PASSES * known * covered[:size][-1]
        acceptance = sum(share**n for n in range(1, DRAFTS + 1)) / DRAFTS
        return ideal_speedup(config, exit_layer, DRAFTS, acceptance, size)

    sizes = [2**n for n in range(8, 20) if 2**n <= config.vocab_size // 2]
    best = max((config.vocab_size, *sizes), key=speedup)
    return None if best == config.vocab_size else best
