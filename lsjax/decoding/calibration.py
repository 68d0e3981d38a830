"""Seconds of a round with each choice of `Adaptive`: measured once for each model and machine."""

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.config import Path
from lsjax.data.files import local_cache, write_whole
from lsjax.decoding.programs import decode
from lsjax.decoding.request import Request
from lsjax.decoding.state import DecodeState
from lsjax.model.parameters import placed
from lsjax.sharding import machine

if TYPE_CHECKING:
    from lsjax.decoding.adaptive import Adaptive
    from lsjax.decoding.engine import Engine

Track = Callable[[Sequence], Iterable]
LENGTH = 128  # tokens in the cache while rounds are measured
BUDGET = 20.0  # seconds of measuring; compiling comes before
REPEATS = 15
CALL, MOST_ROUNDS = 0.05, 6  # seconds of a call with short rounds, and its most rounds


def calibrated(engine: "Engine", strategy: "Adaptive", track: Track) -> "Adaptive":
    """The strategy with its measured seconds: those of the cache, or new ones.

    track: wraps the sequence of timings, for a progress bar.
    """
    file, shape = _file(engine, strategy), (1 + len(strategy.exits), len(strategy.lengths))
    try:
        seconds_SD = np.array(json.loads(file.read_text()), np.float64)
        known = seconds_SD.shape == shape and (seconds_SD > 0).all()
    except (OSError, ValueError):
        known = False
    if not known:
        seconds_SD = measure(engine, strategy, track)
        with contextlib.suppress(OSError):  # a cache that can't be written
            write_whole(file, json.dumps(seconds_SD.tolist()).encode())
    return dataclasses.replace(strategy, seconds=tuple(map(tuple, seconds_SD.tolist())))


def _file(engine: "Engine", strategy: "Adaptive") -> Path:
    """The file of these measurements: its name has all that they depend on."""
    sizes = [leaf.shape for leaf in jax.tree.leaves(engine.model)]
    devices = jax.devices()[:1] if engine.mesh is None else list(engine.mesh.devices.flat)
    kinds = [device.device_kind for device in devices]
    own = strategy.exits, strategy.lengths, strategy.draft_vocab, engine.batch_size
    known = [sizes, str(engine.model.dtype), kinds, machine(), *own, jax.__version__]
    name = hashlib.sha256(repr(known).encode()).hexdigest()[:32]
    return local_cache() / "round_seconds" / f"{name}.json"


def measure(engine: "Engine", strategy: "Adaptive", track: Track) -> np.ndarray:
    """Seconds [S, D] of a round with each source and length, by the engine's own program.

    Rounds without drafts come first, then medium lengths. Choices that are not measured within the
    budget are infinite: they are never taken.
    """
    arguments = placed(strategy.arguments(engine.model), engine.mesh)
    request = Request(prompt=(1,) * LENGTH, max_new_tokens=LENGTH)
    state = DecodeState.create(
        engine.model.config,
        [request] * engine.batch_size,
        capacity=engine.capacity(LENGTH + 1),
        num_layers=engine.model.config.num_layers,
        dtype=engine.model.dtype,
        learned=strategy.first_guess(engine.batch_size),
        mesh=engine.mesh,
    )
    program = engine.programs.get(partial(decode, strategy=strategy), state, np.int32(0), arguments)
    shape = arguments.seconds_SD.shape

    def seconds(choice: tuple[int, int], rounds: int) -> tuple[float, int]:
        """Seconds of a call, and its rounds: a full cache ends it early."""
        only_SD = jnp.full(shape, jnp.inf).at[choice].set(1.0)
        pinned = placed(dataclasses.replace(arguments, seconds_SD=only_SD), engine.mesh)
        copy = jax.block_until_ready(jax.tree.map(jnp.copy, state))  # the program consumes it
        begin = time.perf_counter()
        done = jax.block_until_ready(program(copy, np.int32(rounds), pinned))
        return time.perf_counter() - begin, int(done.learned.rounds_B.max())

    sources, lengths = shape
    order = sorted(range(1, lengths), key=lambda index: abs(index - lengths // 2))
    choices = [(0, 0), *((source, index) for index in order for source in range(sources))]
    seconds((0, 0), 1)  # the first call is slower
    begin = time.perf_counter()
    call = min(seconds((0, 0), 0)[0] for _ in range(REPEATS))
    # A small model's first round is slower: its weights are not in the processor's cache yet.
    rounds = max(1, min(MOST_ROUNDS, round(CALL / seconds((0, 0), 1)[0])))
    found_RSD = np.full((REPEATS, *shape), math.inf)
    for repeat, choice in track([(r, choice) for r in range(REPEATS) for choice in choices]):
        if time.perf_counter() - begin < BUDGET or np.isinf(found_RSD).all():
            whole, done = seconds(choice, rounds)
            found_RSD[repeat, *choice] = max(whole - call, 1e-9) / done
    # The lower quartile: other programs make some rounds slower. Minima vary twice as much.
    quarter_SD = np.isfinite(found_RSD).sum(0) // 4
    return np.take_along_axis(np.sort(found_RSD, axis=0), quarter_SD[None], axis=0)[0]
