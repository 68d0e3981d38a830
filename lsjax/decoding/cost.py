"""Cost of a round of decoding, and the possible gain of self-speculation.

A round of exit E and d drafts, on L layers:

    d (E + h_d)          d draft steps; h_d is the head with the draft's vocabulary
    u h_d                the head once more in the share u of rounds that stop by confidence
    E                    the last draft token passes the first layers without a head
    (L - E) and h        the verification of d + 1 positions

The ideal counts bytes of weights: d + 1 positions cost as much as one. The prediction uses the
seconds of each part. `calibrate` measures each part as a loop on the device.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lsjax.config import LlamaConfig
from lsjax.decoding.autoregressive import Autoregressive
from lsjax.decoding.draft import DraftVocabulary
from lsjax.decoding.request import Request
from lsjax.decoding.sampling import argmax
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.state import DecodeState, Strategy
from lsjax.model.cache import KVCache
from lsjax.model.llama import Llama

LENGTH = 128  # tokens in the cache while the parts are timed
TIMED_SECONDS = 0.1  # of one timing, so that the call overhead is small
REPEATS = 7
DRAFTS = 8  # of the round whose draft steps are timed, and of a draft vocabulary's choice
PASSES = 0.8  # share of drafts that pass, for that choice

Loop = Callable[[int], None]  # runs a part this many times, and waits for it


@dataclass(frozen=True)
class RoundCosts:
    """Costs of the parts of a round, in seconds or any other unit.

    token: a round of autoregressive decoding. layer: one layer, keyed by the number of positions
    in a pass. head: the head and its argmax, keyed likewise; one position is part of `token`.
    draft: a draft step without its layers, keyed by the size of the draft's vocabulary.
    """

    token: float
    layer: Mapping[int, float]
    head: Mapping[int, float]
    draft: Mapping[int, float]

    def pass_seconds(self, num_layers: int, width: int) -> float:
        """Cost of `width` positions through all layers and the head."""
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
        """Cost of a round of self-speculation with `drafts` draft steps (on average).

        widths: share of rounds that verify each number of positions. unsure: share of rounds whose
        draft stops by confidence, after the head has computed its next token.
        """
        verification = sum(
            share * (self.pass_seconds(num_layers, width) - exit_layer * self.layer[width])
            for width, share in widths.items()
        )
        draft = (drafts + unsure) * self.draft[draft_vocab]
        return (drafts + 1) * exit_layer * self.layer[1] + draft + verification

    def speedup(
        self, num_layers: int, exit_layer: int, drafts: float, acceptance: float, **options: Any
    ) -> float:
        """Predicted speedup over autoregressive decoding; options as for `round`."""
        tokens = 1 + acceptance * drafts
        return tokens * self.token / self.round(num_layers, exit_layer, drafts, **options)


def unsure_share(drafted_by_position: Sequence[int], num_draft_tokens: int, rounds: int) -> float:
    """Share of the rounds whose draft ended before its last position. Confidence ends most of them;
    the end of a text ends a few."""
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
    """Speedup over autoregressive decoding if time depended only on bytes of weights, and not on
    the number of positions."""
    layers, vocab = config.num_layers, draft_vocab or config.vocab_size
    head = config.head_params / config.layer_params
    draft = {vocab: head * vocab / config.vocab_size}
    costs = RoundCosts(layers + head, {1: 1.0}, {}, draft)
    cell = (layers, exit_layer, drafts, acceptance)
    return costs.speedup(*cell, widths={1: 1.0}, draft_vocab=vocab, unsure=unsure)


def best_draft_vocab(config: LlamaConfig, exit_layer: int, counts: Mapping[int, int]) -> int | None:
    """Draft vocabulary with the best ideal speedup: a power of two, or None for all tokens.

    counts: occurrences of each token. The share of new tokens is estimated by the share of those
    seen once (Good, 1953).
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


def weight_bytes(config: LlamaConfig, itemsize: int) -> int:
    """Bytes of weights that one token reads: all layers and the head."""
    return (config.num_layers * config.layer_params + config.head_params) * itemsize


def calibrate(model: Llama, lengths: Sequence[int], vocabularies: Sequence[int]) -> RoundCosts:
    """Times the parts in turns: one row, LENGTH tokens in the cache. Compiles a program per part.

    lengths: draft lengths d above 0, for verifications of d + 1 positions. vocabularies: sizes of
    the draft vocabularies.
    """
    config, widths = model.config, sorted({length + 1 for length in lengths})
    drafting = [
        SelfSpeculative(1, DRAFTS, DraftVocabulary(np.arange(n)) if n < config.vocab_size else None)
        for n in vocabularies
    ]
    parts = [
        rounds_loop(model, Autoregressive()),
        *(layers_loop(model, width) for width in (1, *widths)),
        *(head_loop(model, width) for width in widths),
        *(draft_loop(model, strategy) for strategy in drafting),
    ]
    # Matmuls of one position are timed within a round: alone they may take longer.
    seconds = iter(median_seconds(parts))
    token = next(seconds)
    layer = {width: next(seconds) / config.num_layers for width in (1, *widths)}
    head = {width: next(seconds) for width in widths}
    draft = {size: (next(seconds) - (DRAFTS + 1) * layer[1]) / DRAFTS for size in vocabularies}
    return RoundCosts(token, layer, head, draft)


def layers_loop(model: Llama, width: int) -> Loop:
    """All layers on `width` positions."""
    start = jnp.ones((1, width, model.config.hidden_size), model.dtype)
    cache = KVCache.create(model.config, 1, 2 * LENGTH + width, model.dtype)
    # In the carry: if the compiler knew the positions, it would compile other programs.
    positions_BT = jnp.arange(LENGTH, LENGTH + width)[None]

    def body(model, carry):
        x_BTD, cache, positions_BT = carry
        # The input depends on the last output, or the compiler would run the layers once.
        x_BTD = start + 1e-6 * x_BTD
        x_BTD, cache = model.run_layers(x_BTD, 0, model.config.num_layers, positions_BT, cache)
        return x_BTD, cache, positions_BT

    return compiled_loop(model, body, (start, cache, positions_BT))


def head_loop(model: Llama, width: int) -> Loop:
    """The head and its argmax at `width` positions."""
    start = jnp.ones((width, model.config.hidden_size), model.dtype)

    def body(model, x_TD):
        return start + 1e-9 * argmax(model.unembed(x_TD))[:, None].astype(start.dtype)

    return compiled_loop(model, body, start)


def rounds_loop(
    model: Llama,
    strategy: Strategy,
    step: Callable[[Llama, DecodeState, Any], DecodeState] | None = None,
    *,
    length: int = LENGTH,
    capacity: int = 0,
) -> Loop:
    """Rounds of the strategy, or of another `step`, for a row with `length` tokens. After each
    round the row gets its old length back."""
    step = step or strategy.step
    start = DecodeState.create(
        model.config,
        [Request(prompt=[1] * length, max_new_tokens=LENGTH)],
        capacity=max(capacity, length + LENGTH + strategy.slack),
        num_layers=strategy.depth(model.config),
        dtype=model.dtype,
    )

    def body(constants, state):
        done = step(constants[0], state, constants[1])
        return dataclasses.replace(done, length_B=state.length_B, finish_B=state.finish_B)

    return compiled_loop((model, strategy.arguments(model)), body, start)


def draft_loop(model: Llama, strategy: SelfSpeculative) -> Loop:
    """The drafts of a round."""

    def step(model, state, arguments):
        draft = strategy.rounds.draft(model, state, arguments)
        # The drafts decide the pending token, or the compiler would remove the head.
        pending_BT = draft.tokens_BT[:, :1]
        tokens_BS = lax.dynamic_update_slice(draft.state.tokens_BS, pending_BT, (0, LENGTH - 1))
        return dataclasses.replace(draft.state, tokens_BS=tokens_BS)

    return rounds_loop(model, strategy, step)


def compiled_loop(constants: Any, body: Callable[[Any, Any], Any], start: Any) -> Loop:
    """A loop of `body(constants, carry)` on the device; calls share the carry."""
    leaves, structure = jax.tree.flatten(constants)
    start = jax.tree.map(jnp.copy, start)  # it is donated

    def program(leaves, carry, times):
        constants = jax.tree.unflatten(structure, leaves)
        return lax.fori_loop(0, times, lambda _, carry: body(constants, carry), carry)

    compiled = jax.jit(program, donate_argnums=1).lower(leaves, start, np.int32(1)).compile()
    held = [start]

    def run(times: int) -> None:
        held[0] = jax.block_until_ready(compiled(leaves, held[0], np.int32(times)))

    return run


def median_seconds(loops: Sequence[Loop]) -> list[float]:
    """Median seconds of one iteration of each loop; in every repeat the loops take turns."""
    times = []
    for loop in loops:
        loop(1)
        times.append(max(1, int(TIMED_SECONDS / _seconds(loop, 2) * 2)))
    measured = [
        [_seconds(loop, n) / n for loop, n in zip(loops, times, strict=True)]
        for _ in range(REPEATS)
    ]
    return [statistics.median(column) for column in zip(*measured, strict=True)]


def memory_bandwidth(num_bytes: int = 1 << 30) -> float:
    """Bytes per second of a sum over float32 numbers, with all of XLA's threads."""
    x = jnp.ones((1 << 10, num_bytes >> 12), jnp.float32)
    total = jax.jit(lambda x: x.sum(1)).lower(x).compile()

    def run(times: int) -> None:
        for _ in range(times):
            jax.block_until_ready(total(x))

    return num_bytes / median_seconds([run])[0]


def _seconds(loop: Loop, times: int) -> float:
    begin = time.perf_counter()
    loop(times)
    return time.perf_counter() - begin
