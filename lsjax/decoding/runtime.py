"""What strategies run on: a model on its devices, compiled programs, and room for rows."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from lsjax.config import GREEDY, Kernels, check
from lsjax.decoding.auto.adaptive import Adaptive
from lsjax.decoding.auto.measure import kept_seconds
from lsjax.decoding.compiler import Programs
from lsjax.decoding.programs import decode, pause
from lsjax.decoding.request import Request
from lsjax.decoding.state import DecodeState
from lsjax.decoding.stopwatch import Stopwatch
from lsjax.decoding.strategy import Strategy
from lsjax.model.parameters import placed, shardings
from lsjax.model.protocol import Cache, DecoderModel, num_bytes, shardings as model_shardings
from lsjax.sharding import machine

MIN_CAPACITY = 256  # slots of a row's cache: this, or a larger power of two
# Plus a multiple of this for drafts, so that strategies share programs and GPUs need no padding.
SLACK = 64


class Runtime:
    """A model on a mesh with its programs, for batches of `batch_size` rows.

    min_length: tokens that a row's cache has room for from the start. lay_out, kernels, compiling:
    as for `Programs`. track: wraps the timings of an adaptive strategy, for a progress bar.
    """

    def __init__(
        self,
        model: DecoderModel,
        mesh: Mesh | None = None,
        *,
        batch_size: int = 1,
        min_length: int = 1,
        lay_out: bool = True,
        kernels: Kernels = "auto",
        track: Callable[[Sequence], Iterable] = iter,
        compiling: Callable[[str], AbstractContextManager] = nullcontext,
    ):
        self.mesh, self.batch_size, self.track = mesh, batch_size, track
        self.kernels = kernels
        options = dict(lay_out=lay_out, kernels=kernels, compiling=compiling)
        self.programs = Programs(self._placed(model), mesh, **options)
        self.decode_seconds = 0.0  # of all rounds so far
        self._min_length = min_length
        self._seconds: dict[tuple[Any, ...], jax.Array] = {}  # of rounds, by slots and requests
        self.lessons: dict[Strategy, Any] = {}  # of the last text of each strategy
        self._last: tuple[Strategy, Any] | None = None  # arguments of a strategy
        self._shapes: dict[tuple[int, int, int], Cache] = {}  # of caches

    @property
    def model(self) -> DecoderModel:
        """The model that decodes, on the mesh and laid out for its programs."""
        return self.programs.model

    def use_model(self, model: DecoderModel) -> None:
        """Decodes with another model from now on. Raises ConfigError if its form differs."""
        self.programs.use(self._placed(model))
        self._last = None
        self.lessons.clear()

    def _placed(self, model: DecoderModel) -> DecoderModel:
        """The model on the mesh, or on the default device."""
        return jax.device_put(
            model, None if self.mesh is None else model_shardings(model, self.mesh)
        )

    def capacity(self, length: int, strategy: Strategy, most: int | None = None) -> int:
        """Slots of a row's cache for `length` tokens. most: as for `cache_slots`."""
        return cache_slots(max(length, self._min_length), strategy, most)

    def new_cache(self, rows: int, capacity: int, depth: int) -> Cache:
        """An empty cache of the first `depth` layers, sharded over the mesh."""
        create = partial(self.model.new_cache, rows, capacity, depth)
        if self.mesh is None:
            return _without_shared(create())
        places = jax.tree.map(lambda leaf: leaf.sharding, self.cache_shapes(rows, capacity, depth))
        return jax.jit(create, out_shardings=places)()

    def cache_shapes(self, rows: int, capacity: int, depth: int) -> Cache:
        """Shapes of such a cache, and their shardings if there is a mesh."""
        key = rows, capacity, depth
        if key not in self._shapes:  # tracing takes milliseconds
            shapes = jax.eval_shape(partial(self.model.new_cache, *key))
            if self.mesh is not None:
                places = shardings({"cache": shapes}, self.mesh)["cache"]
                shapes = jax.tree.map(_placed_shape, shapes, places)
            self._shapes[key] = shapes
        return self._shapes[key]

    def arguments(
        self,
        strategy: Strategy,
        capacity: int,
        budget: float,
        serves: Sequence[Request] = (),
        rows: int | None = None,
    ) -> Any:
        """Arguments of the strategy's program for rows of `capacity` slots. Those of an adaptive
        strategy include the seconds of its rounds. If these are neither given nor stored, they are
        measured in `budget` seconds. serves: requests that the program can decode. rows: of the
        batch; all of them by default."""
        arguments = self.plain_arguments(strategy)
        if not isinstance(strategy, Adaptive) or strategy.seconds is not None:
            return arguments
        rows = rows or self.batch_size
        key = strategy, rows, capacity, kind_of(serves)
        if key not in self._seconds:
            seconds_QJ = kept_seconds(
                partial(self.stopwatch, strategy, rows, capacity, serves),
                self._identity(*key),
                arguments,
                strategy,
                budget,
                self.track,
            )
            self._seconds[key] = jnp.asarray(seconds_QJ, jnp.float32)
        return arguments.with_seconds(self._seconds[key])

    def learn(self, strategy: Strategy, state: DecodeState, row: int) -> None:
        """Keeps what a row that ends teaches about the next texts."""
        lesson = strategy.lesson(state, row)
        if lesson is not None:
            self.lessons[strategy] = lesson

    def plain_arguments(self, strategy: Strategy) -> Any:
        """Arguments without measured seconds, kept until another strategy is asked for."""
        if self._last is None or self._last[0] is not strategy:
            self._last = strategy, placed(strategy.arguments(self.model), self.mesh)
        return self._last[1]

    def stopwatch(
        self, strategy: Strategy, rows: int, capacity: int, serves: Sequence[Request] = ()
    ) -> Stopwatch:
        """Times rounds of a strategy on rows that have filled half of their slots. serves: requests
        that the timed program can decode."""
        half, depth = min(capacity // 2, capacity - strategy.slack), strategy.depth(self.model)
        sampling = serves[0].sampling if serves else GREEDY
        # In sampling, a lookup ends before a token that may not be drafted.
        token = 1 if strategy.vocabulary is None else int(strategy.vocabulary.ids_W[0])
        own = Request(prompt=(token,) * half, max_new_tokens=half, sampling=sampling)
        state = DecodeState.create(
            [own] * rows,
            cache=self.new_cache(rows, capacity, depth),
            capacity=capacity,
            all_requests=serves,
            learned=strategy.first_guess(rows),
            mesh=self.mesh,
        )
        arguments = self.plain_arguments(strategy)
        loop = self.programs.get(partial(decode, strategy=strategy), state, np.int32(0), arguments)
        waiting = None
        if strategy.pauses:
            waiting = self.programs.get(partial(pause, strategy=strategy), state, np.int32(0))
        return Stopwatch(loop, waiting, state, arguments)

    def _identity(self, strategy: Adaptive, rows: int, capacity: int, kind: str) -> list[Any]:
        """All that the seconds of rounds depend on."""
        model, mesh = self.model, self.mesh
        sizes = [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(model)]
        devices = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
        kinds = [device.device_kind for device in devices]
        layout = None if mesh is None else dict(mesh.shape)
        own = strategy.exits, strategy.lengths, strategy.draft_vocab, rows, capacity
        if strategy.vocabulary is not None and strategy.vocabulary.is_int8:
            own = *own, "int8 head"
        form = str(getattr(model, "config", type(model).__name__)), sizes
        lays_out = self.programs.lays_out
        here = kinds, layout, machine(), lays_out
        return [*form, *here, *own, kind, self.kernels, jax.__version__]

    def memory_bytes(self, total: int, strategy: Strategy) -> tuple[int, int]:
        """Bytes of the model and of the cache for rows of `total` tokens, on all devices."""
        slots = self.capacity(total, strategy)
        return num_bytes(self.model), self._cache_bytes(slots, strategy, None)

    def check_memory(
        self, first: int, total: int, strategy: Strategy, held: int = 0, beside: int = 1
    ) -> None:
        """Raises ConfigError if the devices can't hold the cache for rows that begin with `first`
        tokens and end with `total`: the last one, and the one before it, while it grows. held:
        bytes in use on each device that are freed first. beside: tokens of prompts that are read
        side by side; at least a row is read beside a batch."""
        free, last = free_memory() + held, self.capacity(total, strategy)
        slots = last
        if self.capacity(first, strategy) < last:
            slots += self.capacity(last // 2 - strategy.slack, strategy)
        needed = self._cache_bytes(slots, strategy, self.mesh, beside)
        check(
            needed <= free,
            f"the cache for texts of {total} tokens needs {needed / 1e6:,.0f} MB on each device, "
            f"but {free / 1e6:,.0f} MB are free: lower --max-new-tokens or --batch-size, "
            "or shorten the prompts",
        )

    def _cache_bytes(
        self, slots: int, strategy: Strategy, mesh: Mesh | None, beside: int = 1
    ) -> int:
        """On each device of a mesh. A batch has extra rows, which read the next prompts."""
        rows = self.batch_size + (-(-beside // slots) if self.batch_size > 1 else 0)
        cache = self.cache_shapes(rows, slots, strategy.depth(self.model))
        if mesh is None:
            return num_bytes(cache)
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(cache)
        )


def kind_of(serves: Sequence[Request]) -> str:
    """What differs between programs for the same rows: sampling, penalties, log-probabilities."""
    one = Request(prompt=(1,), max_new_tokens=1)
    state = DecodeState.create([one], cache=None, capacity=1, all_requests=serves)
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    shapes = [(jax.tree_util.keystr(path), leaf.shape) for path, leaf in leaves]
    return f"{shapes} {sorted(state.sampling.filters) if state.sampling else ()}"


def _placed_shape(leaf: jax.ShapeDtypeStruct, place: Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _without_shared(cache: Cache) -> Cache:
    """The cache, whose arrays are all different ones: programs consume each of them."""
    leaves, structure = jax.tree.flatten(cache)
    known: set[int] = set()
    for index, leaf in enumerate(leaves):
        if id(leaf) in known:
            leaves[index] = jnp.copy(leaf)
        known.add(id(leaf))
    return jax.tree.unflatten(structure, leaves)


def cache_slots(length: int, strategy: Strategy, most: int | None = None) -> int:
    """Slots of a cache in which rows of `length` tokens have room for another round. Sizes double,
    so that few programs are needed and less than half of the slots stay empty for long. most:
    tokens of the longest text, if fewer slots may do for it."""
    slots, more = MIN_CAPACITY, -(-strategy.slack // SLACK) * SLACK
    while most is not None and slots // 2 >= max(most, SLACK):
        slots //= 2
    while slots + more < length + strategy.slack:
        slots *= 2
    return slots + more


def free_memory() -> float:
    """Free bytes of the first device; infinite if the device does not report them."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", math.inf) - stats.get("bytes_in_use", 0)
