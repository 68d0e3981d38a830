"""Programs that all engines of a test session share, so that each is traced and compiled once."""

from collections.abc import Hashable
from typing import ClassVar

import jax
from jax.stages import Lowered

from lsjax.decoding.compiler import Programs
from lsjax.platforms import platform, tuning

# Kept programs, the newest. A process may have 65,530 mappings of memory on Linux, and a program of
# `auto` has hundreds.
MOST = 40


class SharedPrograms(Programs):
    """A test that replaces code of a program needs `Programs` itself: here it would get the program
    of an earlier test."""

    lowered: ClassVar[dict[Hashable, Lowered]] = {}

    def lower(self, function, state, *rest):
        """The one that was lowered for an equal model, function and state, if there is one."""
        static = tuple(getattr(value, "program", value) for value in function.keywords.values())
        weights = tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in self._leaves)
        leaves, structure = jax.tree.flatten((state, rest))
        arguments = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        with self.context():
            tuned = tuning()
        settings = self.mesh, tuned, self.lays_out, platform(), jax.config.jax_enable_x64
        key = function.func, static, self._structure, weights, structure, arguments, settings
        program = self.lowered.pop(key, None) or super().lower(function, state, *rest)
        if len(self.lowered) == MOST:
            del self.lowered[next(iter(self.lowered))]
        self.lowered[key] = program
        return program
