"""Compiled programs of decoding: read prompts, put a row into a batch, run rounds, read exits."""

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh
from jax.stages import Lowered
from jaxtyping import Array, Float, Int

from lsjax.config import Kernels, check
from lsjax.decoding.scopes import PROMPT_CHUNKS, ROUNDS
from lsjax.decoding.state import DecodeState
from lsjax.decoding.strategy import Strategy
from lsjax.kernels.decoding import lays_out_weights
from lsjax.model.parameters import shardings
from lsjax.model.protocol import (
    DecoderModel,
    draft_state,
    for_decoding,
    grow_cache,
    prepare,
    run_through,
)
from lsjax.platforms import with_kernels

CODE_LINES = "jax_traceback_in_locations_limit"  # of JAX: lines kept for each operation
# A prompt is read in one chunk of the smallest size that fits, or in several of the largest.
PREFILL_CHUNKS = (32, 64, 128, 256, 512)


def prefill(
    model: DecoderModel,
    state: DecodeState,
    start: Int[Array, ""],
    *,
    chunk: int,
    depth: int,
    exits: tuple[int, ...] = (),
) -> DecodeState:
    """Runs the prompts through the first `depth` layers, and appends each row's first new token.
    Starts at position `start`, after the cached ones, and reads `chunk` positions at a time. exits:
    those that draft from states of their own (`draft_state`)."""
    batch, capacity = state.tokens_BS.shape

    def read(index, carry):
        cache, last_BD = carry
        # At the end of the cache a few positions are read again, to stay inside the cache.
        begin = jnp.minimum(start + index * chunk, capacity - chunk)
        tokens_BT = lax.dynamic_slice_in_dim(state.tokens_BS, begin, chunk, axis=1)
        positions_BT = jnp.broadcast_to(begin + jnp.arange(chunk), (batch, chunk))
        x_BTD, lo = model.embed(tokens_BT, positions_BT), 0
        for exit_layer in exits:
            x_BTD, cache = model.run_layers(x_BTD, lo, exit_layer, positions_BT, cache)
            _, cache = draft_state(model, exit_layer, x_BTD, positions_BT, cache)
            lo = exit_layer
        x_BTD, cache = model.run_layers(x_BTD, lo, depth, positions_BT, cache)
        offset_B = state.length_B - 1 - begin  # of the prompt's last token in this chunk
        x_BD = jnp.take_along_axis(x_BTD, jnp.clip(offset_B, 0, chunk - 1)[:, None, None], 1)[:, 0]
        here_B = (offset_B >= 0) & (offset_B < chunk)
        return cache, jnp.where(here_B[:, None], x_BD, last_BD)

    none_B1 = jnp.zeros((batch, 1), jnp.int32)
    like = jax.eval_shape(model.embed, none_B1, none_B1)
    last_BD = jnp.zeros((batch, like.shape[-1]), like.dtype)
    chunks = (state.length_B.max() - start + chunk - 1) // chunk
    with jax.named_scope(PROMPT_CHUNKS):
        cache, last_BD = lax.fori_loop(0, chunks, read, (state.cache, last_BD))
    return state.with_cache(cache).append(model.unembed(last_BD))


def chunk_size(unread: int, capacity: int) -> int:
    """Chunk size for reading `unread` tokens into a cache of `capacity` slots."""
    sizes = [size for size in PREFILL_CHUNKS if size <= capacity]
    return next((size for size in sizes if size >= unread), sizes[-1])


def insert(
    model: DecoderModel, state: DecodeState, single: DecodeState, row: Int[Array, ""]
) -> DecodeState:
    """The batch with its row `row` replaced by the one row of `single`."""
    return jax.tree.map(
        lambda batch, one: lax.dynamic_update_slice_in_dim(batch, one, row, axis=0), state, single
    )


def grow(model: DecoderModel, state: DecodeState, *, capacity: int, depth: int) -> DecodeState:
    """The rows with more slots."""
    return state.grown(capacity, grow_cache(model, state.cache, capacity, depth))


def decode(
    model: DecoderModel,
    state: DecodeState,
    rounds: Int[Array, ""],
    arguments: Any,
    *,
    strategy: Strategy,
) -> DecodeState:
    """Runs at most `rounds` rounds of the strategy. Stops when a row has ended: the host notes its
    time. Stops before a round that the cache has no room for: the host grows it. Stops if the
    strategy does."""

    def more(carry):
        done, current = carry
        goes_on = current.goes_on(running_B, strategy.slack) & current.running_B.any()
        return (done < rounds) & goes_on & strategy.goes_on(current)

    def step(carry):
        done, current = carry
        return done + 1, strategy.step(model, current, arguments)

    running_B = state.running_B
    with jax.named_scope(ROUNDS):
        return lax.while_loop(more, step, (0, state))[1]


def pause(model: DecoderModel, state: DecodeState, *, strategy: Strategy) -> DecodeState:
    """The strategy's pause between two calls of `decode`. It is a program of its own: in a larger
    one, XLA:TPU loads fewer weights ahead."""
    return strategy.pause(model, state)


def read_exits(
    model: DecoderModel,
    state: DecodeState,
    row: Int[Array, ""],
    start: Int[Array, ""],
    *,
    exits: tuple[int, ...],
    chunk: int,
) -> tuple[tuple[Float[Array, "T D"], Float[Array, " T"], Float[Array, " T"]], ...]:
    """Fields of `ExitOutputs` for each exit, at `chunk` positions of a row from `start` on. The
    row's keys and values are in the cache."""

    def of_row(leaf: Array) -> Array:
        return lax.dynamic_slice_in_dim(leaf, row, 1)

    positions_1T = start + jnp.arange(chunk)[None]
    tokens_1S, cache = of_row(state.tokens_BS), jax.tree.map(of_row, state.cache)
    tokens_1T = lax.dynamic_slice_in_dim(tokens_1S, start, chunk, axis=1)
    next_1T = jnp.take(tokens_1S, positions_1T[0] + 1, axis=1, mode="clip")
    x_1TD = model.embed(tokens_1T, positions_1T)
    places = positions_1T, prepare(model, positions_1T)
    states, cache = run_through(model, (0, *exits), x_1TD, *places, cache)
    found = []
    for exit_layer, hidden_1TD in zip(exits, states, strict=True):
        x_1TD = hidden_1TD
        if exit_layer < model.num_layers:
            x_1TD, cache = draft_state(model, exit_layer, hidden_1TD, positions_1T, cache)
        logits_TV = model.unembed(x_1TD[0])
        log_z_T = jax.nn.logsumexp(logits_TV, axis=-1)
        chosen_T = jnp.take_along_axis(logits_TV, next_1T[0, :, None], axis=1)[:, 0]
        top_probs_T = jnp.exp(logits_TV.max(-1) - log_z_T)
        found.append((hidden_1TD[0], top_probs_T, chosen_T - log_z_T))
    return tuple(found)


class Programs:
    """Compiles `function(model, state, *rest)`, one of the above, once for each kind of state.

    lay_out: let the compiler choose layouts of the weights, where that has a benefit. The first
    program decides for all: otherwise every call would convert some weights.
    kernels: as in `StepConfig`; "reference" chooses no layouts.
    """

    def __init__(
        self,
        model: DecoderModel,
        mesh: Mesh | None = None,
        *,
        lay_out: bool = True,
        kernels: Kernels = "auto",
    ):
        self.model = model  # its arrays have the programs' layouts
        # A flat list is faster to pass than a module.
        self._leaves, self._structure = jax.tree.flatten(model)
        self._formats: list[Format] | None = None  # layouts of the leaves in the programs
        self.mesh, self._kernels = mesh, kernels
        self._compiled: dict[Hashable, Callable] = {}
        with self.context():
            self.lays_out = lay_out and lays_out_weights()
        self.compile_seconds = 0.0

    def __len__(self) -> int:
        return len(self._compiled)

    def use(self, model: DecoderModel) -> None:
        """Runs the programs on another model. Raises ConfigError if its form differs."""
        leaves, structure = jax.tree.flatten(model)
        check(
            structure == self._structure and _shapes(leaves) == _shapes(self._leaves),
            "the model differs in form from the one that the programs were compiled for: make a "
            "new Engine",
        )
        self.model, self._leaves = model, leaves
        if self._formats is not None:
            self._lay_out()

    def get(self, function: partial, state: DecodeState, *rest: Any) -> Callable:
        """The program for arguments of these shapes. All but `grow` and `read_exits` consume the
        state: its buffers are donated. Strategies are equal keywords of the function if their
        `program` is equal."""
        static = (getattr(value, "program", value) for value in function.keywords.values())
        leaves, structure = jax.tree.flatten((state, rest))
        key = (function.func, *static, _shapes(leaves), structure)
        if key not in self._compiled:
            begin = time.perf_counter()
            compiled = self.lower(function, state, *rest).compile()
            if self._formats is None and self.lays_out:
                formats = zip(self._leaves, compiled.input_formats[0][0], strict=True)
                # A weight that the program does not read has no layout.
                self._formats = [new if new.layout else old.format for old, new in formats]
                self._lay_out()
            self._compiled[key] = compiled
            self.compile_seconds += time.perf_counter() - begin
        return partial(self._compiled[key], self._leaves)

    def lower(self, function: partial, state: DecodeState, *rest: Any) -> Lowered:
        """The program before compilation; shapes suffice, also for the model. Stacked layers are
        unstacked inside the program, so that no copy of them stays."""

        def run(leaves, state, *rest):
            model = jax.tree.unflatten(self._structure, leaves)
            return function(for_decoding(model), state, *rest)

        mesh, formats, called = self.mesh, self._formats, function.func
        with self.context():
            if formats is None and self.lays_out:
                formats = [Format(Layout.AUTO, leaf.sharding) for leaf in self._leaves]
            places = None if mesh is None or called is read_exits else shardings(state, mesh)
            program = jax.jit(
                run,
                donate_argnums=() if called in (grow, read_exits) else 1,
                in_shardings=None if formats is None else (formats, *[None] * (1 + len(rest))),
                out_shardings=places,
            )
            # With Python lines, TPUs' compiler (libtpu 0.0.42) may never end. Named scopes stay.
            lines = getattr(jax.config, CODE_LINES)
            jax.config.update(CODE_LINES, 0)
            try:
                return program.lower(self._leaves, state, *rest)
            finally:
                jax.config.update(CODE_LINES, lines)

    @contextmanager
    def context(self) -> Iterator[None]:
        """In which programs are traced."""
        on_mesh = nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)
        with on_mesh, with_kernels(self._kernels):
            yield

    def _lay_out(self) -> None:
        """Converts the model's arrays to the programs' layouts, one after the other. The old ones
        are freed, unless the caller holds them."""
        self.model = None
        for index, (leaf, format_) in enumerate(zip(self._leaves, self._formats, strict=True)):
            if leaf.format.layout != format_.layout:
                self._leaves[index] = jax.device_put(leaf, format_)
        self.model = jax.tree.unflatten(self._structure, self._leaves)


def _shapes(leaves: Sequence[Any]) -> tuple[tuple, ...]:
    return tuple((leaf.shape, leaf.dtype) for leaf in leaves)
