"""Compiles the programs of decoding (programs.py), each once for every kind of state."""

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import jax
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh
from jax.stages import Lowered

from lsjax.config import Kernels, check
from lsjax.decoding.programs import (
    decode,
    fill,
    grow,
    insert,
    keep_rows,
    pause,
    prefill,
    read_exits,
)
from lsjax.decoding.state import DecodeState
from lsjax.kernels.decoding import lays_out_weights
from lsjax.model.parameters import shardings
from lsjax.model.protocol import DecoderModel, for_decoding
from lsjax.platforms import with_kernels

CODE_LINES = "jax_traceback_in_locations_limit"  # of JAX: lines kept for each operation
Call = tuple[Any, ...]  # a partial function, its state, and the rest of its arguments
NAMES = {
    prefill: "prompts",
    insert: "new rows",
    fill: "prompts of new rows",
    grow: "a larger cache",
    keep_rows: "fewer rows",
    decode: "rounds",
    pause: "rounds without drafts",
    read_exits: "outputs of exits",
}


class Programs:
    """Compiles `function(model, state, *rest)` of programs.py, once for each kind of state.

    lay_out: let the compiler choose layouts of the weights, where that has a benefit. The first
    program decides for all: otherwise every call would convert some weights.
    kernels: as in `StepConfig`; "reference" chooses no layouts.
    compiling: entered with a line that says what is compiled, while it is.
    """

    def __init__(
        self,
        model: DecoderModel,
        mesh: Mesh | None = None,
        *,
        lay_out: bool = True,
        kernels: Kernels = "auto",
        compiling: Callable[[str], AbstractContextManager] = nullcontext,
    ):
        self.model = model  # its arrays have the programs' layouts
        # A flat list is faster to pass than a module.
        self._leaves, self._structure = jax.tree.flatten(model)
        self._formats: list[Format] | None = None  # layouts of the leaves in the programs
        self.mesh, self._kernels, self.compiling = mesh, kernels, compiling
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
        """The program for arguments of these shapes. All but `grow`, `keep_rows` and `read_exits`
        consume the state: its buffers are donated. Strategies are equal keywords of the function if
        their `program` is equal."""
        self.prepare((function, state, *rest))
        return partial(self._compiled[_key(function, state, *rest)], self._leaves)

    def prepare(self, *calls: Call) -> None:
        """Compiles the programs of these calls that are missing, side by side. Shapes suffice."""
        missing = {_key(*call): call for call in calls}
        missing = {key: call for key, call in missing.items() if key not in self._compiled}
        if not missing:
            return
        begin, names = time.perf_counter(), ", ".join(_name(call[0]) for call in missing.values())
        several = f"{len(missing)} programs" if len(missing) > 1 else "a program"
        with self.compiling(f"compiling {several}, once for this machine: {names}"):
            if self._formats is None and self.lays_out:
                key = next(iter(missing))
                self._compiled[key] = self.lower(*missing.pop(key)).compile()
                formats = self._compiled[key].input_formats[0][0]
                # A weight that the program does not read has no layout.
                pairs = zip(self._leaves, formats, strict=True)
                self._formats = [new if new.layout else old.format for old, new in pairs]
                self._lay_out()
            lowered = [self.lower(*call) for call in missing.values()]
            pool = ThreadPoolExecutor()
            try:
                compiled = pool.map(Lowered.compile, lowered)
                self._compiled |= zip(missing, compiled, strict=True)
            finally:
                pool.shutdown(wait=False)  # after Ctrl-C nobody waits for the others
        self.compile_seconds += time.perf_counter() - begin

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
            if mesh is None:  # placed or not: the cache on disk would take them for two programs
                state, *rest = jax.tree.map(_shape, (state, *rest))
            program = jax.jit(
                run,
                donate_argnums=() if called in (grow, keep_rows, read_exits) else 1,
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


def _key(function: partial, state: DecodeState, *rest: Any) -> Hashable:
    static = (getattr(value, "program", value) for value in function.keywords.values())
    leaves, structure = jax.tree.flatten((state, rest))
    return (function.func, *static, _shapes(leaves), structure)


def _name(function: partial) -> str:
    """What a program does, for people."""
    strategy = function.keywords.get("strategy")
    return NAMES[function.func] + (f" of {strategy.name}" if strategy else "")


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _shapes(leaves: Sequence[Any]) -> tuple[tuple, ...]:
    return tuple((leaf.shape, leaf.dtype) for leaf in leaves)
