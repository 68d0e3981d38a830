"""Costs of a round: bytes of weights that it reads, with the gain that they allow, and seconds.

With L layers, and a head that is as large as k of them, an autoregressive round reads L + k layers.
A round of exit E and d drafts reads

    d (E + k_d)          in d draft steps; k_d is the head with the draft's vocabulary
    E                    when the last draft token passes the first layers
    L - E + k            in the verification of d + 1 positions

Seconds of a round with each choice of `Adaptive` are measured once for each model, cache size and
machine.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.config import LlamaConfig
from lsjax.data.files import local_cache, write_whole
from lsjax.decoding.programs import decode, pause
from lsjax.decoding.request import Request
from lsjax.decoding.state import DecodeState
from lsjax.model.parameters import placed
from lsjax.sharding import machine

if TYPE_CHECKING:
    from lsjax.decoding.engine import Engine

DRAFTS = 8  # of the round for which a draft vocabulary is chosen
PASSES = 0.8  # share of drafts that pass, for that choice
MEASURING = 20.0  # seconds; compiling comes before
REPEATS = 15
CALL, MOST_ROUNDS = 0.05, 6  # seconds of a call with short rounds, and its most rounds


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


def round_seconds(engine: "Engine", capacity: int, budget: float) -> np.ndarray:
    """Seconds [S, D] of a round with each source and length of the engine's adaptive strategy, for
    rows of `capacity` slots. A file keeps them with their budget. If some choices were not reached,
    a larger budget measures all of them again."""
    strategy, mesh = engine.strategy, engine.mesh
    # The name of the file has all that the seconds depend on, after the version of `measure`.
    sizes = [leaf.shape for leaf in jax.tree.leaves(engine.model)]
    devices = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
    kinds = [device.device_kind for device in devices]
    layout = None if mesh is None else dict(mesh.shape)
    own = strategy.exits, strategy.lengths, strategy.draft_vocab, engine.batch_size, capacity
    model = engine.model.config, sizes, str(engine.model.dtype)
    identity = [3, *model, kinds, layout, machine(), *own, engine.kernels, jax.__version__]
    name = hashlib.sha256(repr(identity).encode()).hexdigest()[:32]
    file = local_cache() / "round_seconds" / f"{name}.json"
    try:
        seconds_SD, spent = map(np.array, json.loads(file.read_text()))
        good = seconds_SD.shape == (len(strategy.sources), len(strategy.lengths))
        good &= (seconds_SD > 0).all()
        good &= np.isfinite(seconds_SD).all() or spent >= budget
    except Exception:  # no file, or it may hold anything
        good = False
    if not good:
        seconds_SD = measure(engine, capacity, budget)
        with contextlib.suppress(OSError):  # a cache that can't be written
            write_whole(file, json.dumps([seconds_SD.tolist(), budget]).encode())
    return seconds_SD


def measure(engine: "Engine", capacity: int, budget: float) -> np.ndarray:
    """Seconds [S, D] of a round with each source and length, by the engine's own program. Rows have
    filled half of their slots. Rounds without drafts come first, then medium lengths. Choices that
    were not reached within `budget` seconds are infinite."""
    config, mesh, strategy = engine.model.config, engine.mesh, engine.strategy
    any_SD, head = engine.arguments
    half = min(capacity // 2, capacity - strategy.slack)
    state = DecodeState.create(
        config,
        [Request(prompt=(1,) * half, max_new_tokens=half)] * engine.batch_size,
        capacity=capacity,
        num_layers=config.num_layers,
        dtype=engine.model.dtype,
        learned=strategy.first_guess(engine.batch_size),
        mesh=mesh,
    )
    loop = partial(decode, strategy=strategy)
    program = engine.programs.get(loop, state, np.int32(0), (any_SD, head))
    pausing = None
    if strategy.pauses(engine.programs.tuned_for):
        pausing = engine.programs.get(partial(pause, strategy=strategy), state)
    changed = {name: getattr(state, name) for name in ("length_B", "finish_B", "learned")}
    changed = jax.tree.map(jnp.copy, changed)

    def seconds(choice: tuple[int, int], rounds: int) -> tuple[float, int]:
        """Seconds of a call, and how many rounds it ran: a full cache ends it early. Without
        drafts, a pause may follow, so the second value is the number of tokens."""
        nonlocal state
        only_SD = placed(jnp.full_like(any_SD, jnp.inf).at[choice].set(1.0), mesh)
        # From the start again, in the same cache: the program consumes its state.
        state = dataclasses.replace(state, **jax.tree.map(jnp.copy, changed))
        jax.block_until_ready(state)
        begin = time.perf_counter()
        state = program(state, np.int32(rounds), (only_SD, head))
        if pausing is not None:
            state = pausing(state)
        jax.block_until_ready(state)
        spent = time.perf_counter() - begin
        made = state.learned.rounds_B if any(choice) else state.length_B - changed["length_B"]
        return spent, int(made.max())

    sources, lengths = any_SD.shape
    choices = sorted(np.ndindex(any_SD.shape), key=lambda at: (at[1] > 0, abs(2 * at[1] - lengths)))
    seconds((0, 0), 1)  # the first call is slower
    begin = time.perf_counter()
    call = min(seconds((0, 0), 0)[0] for _ in range(REPEATS))
    # A small model's first round is slower: its weights are not in the processor's cache yet.
    rounds = max(1, min(MOST_ROUNDS, round(CALL / seconds((0, 0), 1)[0])))
    found_RSD = np.full((REPEATS, sources, lengths), math.inf)
    for repeat, choice in engine.track([(r, choice) for r in range(REPEATS) for choice in choices]):
        if time.perf_counter() - begin < budget or np.isinf(found_RSD).all():
            whole, done = seconds(choice, rounds)
            found_RSD[repeat, *choice] = max(whole - call, 1e-9) / done
    return typical(found_RSD)


def typical(found_RSD: np.ndarray) -> np.ndarray:
    """Medians of the repeats. A machine has slow phases, which affect all choices of a repeat. So
    repeats are compared by the ratios of their seconds."""
    known_SD = np.isfinite(found_RSD[0])
    whole_R = np.isfinite(found_RSD[:, known_SD]).all(1)
    log_RSD = np.log(found_RSD[whole_R])
    level_R = log_RSD[:, known_SD].mean(1)
    return np.exp(np.median(log_RSD - level_R[:, None, None], axis=0) + np.median(level_R))
