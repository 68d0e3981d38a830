"""The compiled programs of a model."""

import time
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh
from jax.stages import Lowered

from lsjax.config import check
from lsjax.decoding.state import DecodeState
from lsjax.model.llama import Llama
from lsjax.model.parameters import shardings
from lsjax.sharding import platform


class Programs:
    """Compiles `function(model, state, *rest)` once for each kind of state."""

    def __init__(self, model: Llama, mesh: Mesh | None = None, *, lay_out: bool = True):
        """lay_out: let the compiler choose layouts of the weights, on accelerators."""
        self.model = model  # its arrays laid out as the programs want them
        # A flat list is quicker to hand over than a module (70 us against 0.5 ms).
        self._leaves, self._structure = jax.tree.flatten(model)
        self._formats: list[Format] | None = None  # in which the programs want the leaves
        self._mesh, self._lays_out = mesh, lay_out
        self._compiled: dict[Hashable, Callable] = {}
        self.compile_seconds = 0.0

    def use(self, model: Llama) -> None:
        """Runs the programs on another model. Raises ConfigError unless it has the same form."""
        leaves, structure = jax.tree.flatten(model)
        before = [(leaf.shape, leaf.dtype) for leaf in self._leaves]
        check(
            structure == self._structure
            and [(leaf.shape, leaf.dtype) for leaf in leaves] == before,
            "the model differs in form from the one that the programs were compiled for: make a "
            "new Engine",
        )
        self.model, self._leaves = model, leaves
        self._lay_out()

    def __len__(self) -> int:
        return len(self._compiled)

    def get(
        self, function: partial, state: DecodeState, *rest: Any, donate: bool = True
    ) -> Callable:
        """The program for arguments of these shapes. It consumes the state (its buffers are
        donated) unless told otherwise. Strategies among the function's keywords are told apart by
        what they compile."""
        static = (getattr(value, "program", value) for value in function.keywords.values())
        leaves, structure = jax.tree.flatten((state, rest))
        shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
        key = (function.func, *static, shapes, structure)
        if key not in self._compiled:
            begin = time.perf_counter()
            compiled = self.lower(function, state, *rest, donate=donate).compile()
            if self._formats is None and self._lays_out and chooses_layouts():
                formats = zip(self._leaves, compiled.input_formats[0][0], strict=True)
                # A weight that the program does not read has no layout.
                self._formats = [new if new.layout else old.format for old, new in formats]
                self._lay_out()
            self._compiled[key] = compiled
            self.compile_seconds += time.perf_counter() - begin
        return partial(self._compiled[key], self._leaves)

    def lower(
        self, function: partial, state: DecodeState, *rest: Any, donate: bool = True
    ) -> Lowered:
        """The program before it is compiled; shapes suffice for it, of the model too.

        On accelerators the compiler chooses the layouts of the weights for the first program, and
        the others use the same. Otherwise every call would convert some weights.
        """

        def run(leaves, state, *rest):
            return function(jax.tree.unflatten(self._structure, leaves), state, *rest)

        mesh, formats = self._mesh, self._formats
        places = None if mesh is None else shardings(state, mesh)
        with nullcontext() if mesh is None else jax.set_mesh(mesh):
            if formats is None and self._lays_out and chooses_layouts():
                formats = [Format(Layout.AUTO, leaf.sharding) for leaf in self._leaves]
            program = jax.jit(
                run,
                donate_argnums=1 if donate else (),
                in_shardings=None if formats is None else (formats, *[None] * (1 + len(rest))),
                out_shardings=places,
            )
            return program.lower(self._leaves, state, *rest)

    def _lay_out(self) -> None:
        """Lays out the model's arrays as the programs want them, one after the other."""
        if self._formats is None:
            return
        for index, (leaf, format_) in enumerate(zip(self._leaves, self._formats, strict=True)):
            if leaf.format.layout != format_.layout:
                self._leaves[index] = jax.device_put(leaf, format_)
        self.model = jax.tree.unflatten(self._structure, self._leaves)


def chooses_layouts() -> bool:
    """Whether the compiler may choose layouts: on CPUs it would gain nothing."""
    return platform() != "cpu"
