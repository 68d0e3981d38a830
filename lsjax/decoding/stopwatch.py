"""Seconds of a round, measured with the compiled program that decodes.

Those of each choice of `Adaptive` are measured once for each model, cache size and machine.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.decoding.programs import Programs, decode, pause
from lsjax.decoding.request import Request
from lsjax.decoding.state import DecodeState
from lsjax.decoding.strategy import Strategy
from lsjax.io.files import local_cache, write_whole
from lsjax.model.parameters import placed
from lsjax.sharding import machine

if TYPE_CHECKING:
    from lsjax.decoding.engine import Engine

MEASURING = 20.0  # seconds; compiling comes before
REPEATS = 15
CALL, MOST_ROUNDS = 0.05, 6  # seconds of a call with short rounds, and its most rounds


class Rounds:
    """Rounds of a strategy on rows that have filled half of their slots.

    Each call starts from the same state in the same cache, as the program consumes its state.
    """

    def __init__(self, programs: Programs, strategy: Strategy, rows: int, capacity: int):
        model, mesh = programs.model, programs.mesh
        half = min(capacity // 2, capacity - strategy.slack)
        self.arguments = placed(strategy.arguments(model), mesh)
        self._state = DecodeState.create(
            model.config,
            [Request(prompt=(1,) * half, max_new_tokens=half)] * rows,
            capacity=capacity,
            num_layers=strategy.depth(model.config),
            dtype=model.dtype,
            learned=strategy.first_guess(rows),
            mesh=mesh,
        )
        loop = partial(decode, strategy=strategy)
        self._decode = programs.get(loop, self._state, np.int32(0), self.arguments)
        self._pause = None
        if strategy.pauses(programs.tuning):
            self._pause = programs.get(partial(pause, strategy=strategy), self._state)
        changed = ("length_B", "finish_B", "round_BS", "learned")
        start = {name: getattr(self._state, name) for name in changed}
        self._start = jax.tree.map(jnp.copy, start)

    def run(self, rounds: int, arguments: Any) -> tuple[float, int]:
        """Seconds of a call, and how many rounds it ran: a full cache ends it early. A pause
        follows if the strategy has one. Each of its tokens is a round."""
        self._state = dataclasses.replace(self._state, **jax.tree.map(jnp.copy, self._start))
        jax.block_until_ready(self._state)
        begin = time.perf_counter()
        self._state = self._decode(self._state, np.int32(rounds), arguments)
        if self._pause is not None:
            self._state = self._pause(self._state)
        jax.block_until_ready(self._state)
        spent = time.perf_counter() - begin
        return spent, int((np.array(self._state.round_BS) > 0).sum(1).max())

    def per_call(self, arguments: Any) -> float:
        """Seconds of a call without rounds."""
        return min(self.run(0, arguments)[0] for _ in range(REPEATS))


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
    identity = [4, *model, kinds, layout, machine(), *own, engine.kernels, jax.__version__]
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
    """Seconds [S, D] of a round with each source and length, by the engine's own program. Rounds
    without drafts come first, then medium lengths. Choices that were not reached within `budget`
    seconds are infinite."""
    rounds = Rounds(engine.programs, engine.strategy, engine.batch_size, capacity)
    any_SD, head = rounds.arguments

    def only(choice: tuple[int, int]) -> Any:
        only_SD = jnp.full_like(any_SD, jnp.inf).at[choice].set(1.0)
        return placed(only_SD, engine.mesh), head

    sources, lengths = any_SD.shape
    choices = sorted(np.ndindex(any_SD.shape), key=lambda at: (at[1] > 0, abs(2 * at[1] - lengths)))
    rounds.run(1, only((0, 0)))  # the first call is slower
    begin = time.perf_counter()
    call = rounds.per_call(only((0, 0)))
    # A small model's first round is slower: its weights are not in the processor's cache yet.
    most = max(1, min(MOST_ROUNDS, round(CALL / rounds.run(1, only((0, 0)))[0])))
    found_RSD = np.full((REPEATS, sources, lengths), math.inf)
    for repeat, choice in engine.track([(r, choice) for r in range(REPEATS) for choice in choices]):
        if time.perf_counter() - begin < budget or np.isinf(found_RSD).all():
            whole, done = rounds.run(most, only(choice))
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
