"""Weights that are rounded while they are read: no model is in memory twice."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from lsjax.config import Weights
from lsjax.model.int8 import Int8Rows, rounded
from lsjax.model.llama import Llama
from lsjax.model.matrices import with_int8
from lsjax.model.parameters import named_leaves

# (path of a parameter, its array) -> the leaves that stand for it, by path
Change = Callable[[str, Array], dict[str, Array]]


def change_of(weights: Weights, tied: bool) -> Change:
    """What becomes of a parameter that was read. tied: whether the embedding is the head too."""
    return _int8(tied) if weights == "int8" else lambda path, array: {path: array}


def _int8(tied: bool) -> Change:
    def change(path: str, array: Array) -> dict[str, Array]:
        if path.endswith("kernel"):
            integers, scale = jax.jit(rounded)(array)
            return {path: integers, f"{path}_scale": scale}
        kept = {} if path == "head" else {path: array}
        if path == ("embedding" if tied else "head"):
            rows = jax.jit(Int8Rows.of)(array)
            kept |= {f"head.{name}": leaf for name, leaf in named_leaves(rows).items()}
        return kept

    return change


def built(shape: Llama, leaves: dict[str, Array], weights: Weights) -> Any:
    """The model of these leaves. shape: its shapes before rounding."""
    if weights == "int8":
        shape = jax.eval_shape(with_int8, shape)
    ordered = [leaves[name] for name in named_leaves(shape)]
    return jax.tree.unflatten(jax.tree.structure(shape), ordered)
