"""Measures what the parts of a round cost on this machine (`cost.Costs`)."""

import dataclasses
import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lsjax.decoding.acceptance import Draft, Proposals
from lsjax.decoding.autoregressive import Autoregressive
from lsjax.decoding.cost import Costs
from lsjax.decoding.draft_vocabulary import DraftVocabulary
from lsjax.decoding.sampling import GREEDY, Sampling, likeliest
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.state import DecodeState, Strategy
from lsjax.model.cache import KVCache
from lsjax.model.llama import Llama

LENGTH = 128  # tokens in the cache while the parts are timed
TIMED_SECONDS = 0.1  # of one timing, so that calling the program is a small part of it
REPEATS = 7
DRAFTS = 8  # of the round whose draft steps are timed

Loop = Callable[[int], None]  # runs a part that often, and waits for it


def memory_bandwidth(num_bytes: int = 1 << 30) -> float:
    """Bytes per second: median of sums over float32 numbers, with all threads that XLA has."""
    x = jnp.ones((1 << 10, num_bytes >> 12), jnp.float32)
    total = jax.jit(lambda x: x.sum(1)).lower(x).compile()

    def run(times: int) -> None:
        for _ in range(times):
            jax.block_until_ready(total(x))

    return num_bytes / median_seconds([run])[0]


def calibrated(
    cache: Path,
    machine: str,
    model: Llama,
    lengths: Sequence[int],
    vocabularies: Sequence[int],
    *,
    again: bool = False,
) -> Costs:
    """`calibrate`, kept in the directory `cache` under the machine's name, the version of jax and
    the model's shape, form and dtype. Measures where something asked for is not known yet, or
    `again`."""
    form = "stacked" if model.is_stacked else "separate"
    kind = jax.devices()[0].device_kind
    key = f"{machine} {jax.__version__} {kind} {model.config} {model.dtype} {form}"
    file = cache / "costs" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    known = _read(file)
    if known is not None:
        enough = {d + 1 for d in lengths} <= known.head.keys()
        enough = enough and {*vocabularies} <= known.draft.keys()
        if enough and not again:
            return known
        lengths = sorted({*lengths, *(width - 1 for width in known.head)})
        vocabularies = sorted({*vocabularies, *known.draft})
    costs = calibrate(model, lengths, vocabularies)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(asdict(costs)))
    partial.replace(file)
    return costs


def calibrate(model: Llama, lengths: Sequence[int], vocabularies: Sequence[int]) -> Costs:
    """Times the parts in turns: one row, LENGTH tokens in the cache. Compiles a program a part.

    lengths: draft lengths d above 0, for verifications of d + 1 positions. vocabularies: sizes of
    what drafts are chosen from.
    """
    widths = sorted({length + 1 for length in lengths})
    parts = [
        rounds_loop(model, Autoregressive()),
        *(layers_loop(model, width) for width in (1, *widths)),
        *(head_loop(model, width) for width in widths),
        *(draft_loop(model, _drafting(model, size)) for size in vocabularies),
    ]
    # Products of one position are timed where they stand: alone they may take longer.
    seconds = iter(median_seconds(parts))
    token = next(seconds)
    layer = {width: next(seconds) / model.config.num_layers for width in (1, *widths)}
    head = {width: next(seconds) for width in widths}
    draft = {size: (next(seconds) - (DRAFTS + 1) * layer[1]) / DRAFTS for size in vocabularies}
    return Costs(token, layer, head, draft)


def _drafting(model: Llama, size: int) -> SelfSpeculative:
    """Drafts of one layer from a vocabulary of that size."""
    whole = size == model.config.vocab_size
    return SelfSpeculative(1, DRAFTS, None if whole else DraftVocabulary(np.arange(size)))


def layers_loop(model: Llama, width: int) -> Loop:
    """All layers on `width` positions."""
    start = jnp.ones((1, width, model.config.hidden_size), model.dtype)
    capacity = 2 * LENGTH + width
    cache = KVCache.create(model.config, 1, capacity, model.dtype, stacked=model.is_stacked)
    # In the carry: where the compiler knows the positions, it makes other programs of the layers.
    positions_BT = jnp.arange(LENGTH, LENGTH + width)[None]

    def body(model, carry):
        x_BTD, cache, positions_BT = carry
        # What comes in depends on what came out, or the compiler would run the layers once.
        x_BTD = start + 1e-6 * x_BTD
        x_BTD, cache = model.run_layers(x_BTD, 0, model.config.num_layers, positions_BT, cache)
        return x_BTD, cache, positions_BT

    return compiled_loop(model, body, (start, cache, positions_BT))


def head_loop(model: Llama, width: int) -> Loop:
    """The head and its likeliest token at `width` positions."""
    start = jnp.ones((width, model.config.hidden_size), model.dtype)

    def body(model, x_TD):
        return start + 1e-9 * likeliest(model.unembed(x_TD))[:, None].astype(start.dtype)

    return compiled_loop(model, body, start)


def rounds_loop(
    model: Llama,
    strategy: Strategy,
    *,
    length: int = LENGTH,
    capacity: int = 0,
    sampling: Sampling = GREEDY,
) -> Loop:
    """Whole rounds, always at the same place: the row is shortened again after each."""
    state = _state(model, strategy, length, capacity, sampling)

    def body(pair, state):
        done = strategy.step(pair[0], state, pair[1])
        return dataclasses.replace(done, length_B=state.length_B, finish_B=state.finish_B)

    return compiled_loop((model, strategy.arguments(model)), body, state)


def draft_loop(model: Llama, strategy: SelfSpeculative) -> Loop:
    """The drafts of a round."""

    def body(pair, state):
        draft = strategy.draft(pair[0], state, pair[1])
        # The drafts decide the pending token, or the compiler would leave out the head.
        pending_BT = draft.tokens_BT[:, :1]
        tokens_BS = lax.dynamic_update_slice(draft.state.tokens_BS, pending_BT, (0, LENGTH - 1))
        return dataclasses.replace(draft.state, tokens_BS=tokens_BS)

    constants = (model, strategy.arguments(model))
    return compiled_loop(constants, body, _state(model, strategy, LENGTH))


def verify_loop(model: Llama, strategy: SelfSpeculative) -> Loop:
    """The verification of a round, of full drafts."""
    state = _state(model, strategy, LENGTH)
    steps = 1 + strategy.num_draft_tokens
    hidden_BTD = jnp.ones((1, steps, model.config.hidden_size), model.dtype)

    def body(pair, state):
        tokens_BT = jnp.broadcast_to(state.pending_B[:, None], (1, steps))
        count_B = jnp.full(1, strategy.num_draft_tokens, jnp.int32)
        hidden_now_BTD = hidden_BTD + 1e-9 * tokens_BT[..., None]
        draft = Draft(state, hidden_now_BTD, tokens_BT, count_B, Proposals(tokens_BT, None))
        done = strategy.verify(pair[0], draft, pair[1])
        return dataclasses.replace(done, length_B=state.length_B, finish_B=state.finish_B)

    return compiled_loop((model, strategy.arguments(model)), body, state)


def compiled_loop(
    constants: Any,
    body: Callable[[Any, Any], Any],
    start: Any,
    compiler_options: dict[str, Any] | None = None,
) -> Loop:
    """A loop of `body(constants, carry)` on the device; the carry goes from call to call."""
    leaves, structure = jax.tree.flatten(constants)
    start = jax.tree.map(jnp.copy, start)  # it is donated

    def program(leaves, carry, times):
        constants = jax.tree.unflatten(structure, leaves)
        return lax.fori_loop(0, times, lambda _, carry: body(constants, carry), carry)

    lowered = jax.jit(program, donate_argnums=1).lower(leaves, start, np.int32(1))
    compiled = lowered.compile(compiler_options=compiler_options)
    held = [start]

    def run(times: int) -> None:
        held[0] = jax.block_until_ready(compiled(leaves, held[0], np.int32(times)))

    return run


def median_seconds(loops: Sequence[Loop]) -> list[float]:
    """Seconds of one turn of each loop, the median of repeats in which the loops take turns."""
    times = []
    for loop in loops:
        loop(1)
        times.append(max(1, int(TIMED_SECONDS / _seconds(loop, 2) * 2)))
    measured = [
        [_seconds(loop, n) / n for loop, n in zip(loops, times, strict=True)]
        for _ in range(REPEATS)
    ]
    return [statistics.median(column) for column in zip(*measured, strict=True)]


def _state(
    model: Llama,
    strategy: Strategy,
    length: int,
    capacity: int = 0,
    sampling: Sampling = GREEDY,
) -> DecodeState:
    return DecodeState.create(
        model.config,
        [[1] * length],
        [LENGTH],
        [[-1]],
        capacity=max(capacity, length + LENGTH + strategy.slack),
        num_layers=strategy.depth(model.config),
        dtype=model.dtype,
        stacked=model.is_stacked,
        sampling=[sampling],
    )


def _seconds(loop: Loop, times: int) -> float:
    begin = time.perf_counter()
    loop(times)
    return time.perf_counter() - begin


def _read(file: Path) -> Costs | None:
    """Costs from a file, None where there is none, or none that this version wrote."""
    try:
        raw = json.loads(file.read_text())
        for name in ("layer", "head", "draft"):
            raw[name] = {int(count): seconds for count, seconds in raw[name].items()}
        return Costs(**raw)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
