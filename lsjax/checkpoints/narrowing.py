"""Weights that are rounded while they are read: no model is in memory twice."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.typing import DTypeLike
from jaxtyping import Array

from lsjax.config import Weights
from lsjax.model.int8 import Int8Rows, Rounded, rounded
from lsjax.model.llama import Llama
from lsjax.model.matrices import with_int8
from lsjax.model.parameters import named_leaves

# (path of a parameter, its array, or integers and scales of the file) -> the leaves that stand for
# it, by path
Change = Callable[[str, Array | Rounded], dict[str, Array]]


def change_of(weights: Weights, tied: bool, dtype: DTypeLike) -> Change:
    """What becomes of a parameter that was read. tied: whether the embedding is the head too.
    dtype: of widened integers."""
    return partial(_to_int8, tied) if weights == "int8" else partial(to_float, dtype)


def to_float(dtype: DTypeLike, path: str, array: Array | Rounded) -> dict[str, Array]:
    """The array, or what the integers stand for."""
    if isinstance(array, Rounded):
        integers, scale = array
        scale = scale[:, None] if path == "head" else scale
        array = (integers * scale).astype(dtype)
    return {path: array}


def _to_int8(tied: bool, path: str, array: Array | Rounded) -> dict[str, Array]:
    if path.endswith("kernel"):
        integers, scale = array if isinstance(array, Rounded) else jax.jit(rounded)(array)
        return {path: integers, f"{path}_scale": scale}
    kept = {} if path == "head" else {path: array}
    if path == ("embedding" if tied else "head"):
        rows = Int8Rows(*array) if isinstance(array, Rounded) else jax.jit(Int8Rows.of)(array)
        kept |= {f"head.{name}": leaf for name, leaf in named_leaves(rows).items()}
    return kept


def built(shape: Llama, leaves: dict[str, Array], weights: Weights) -> Any:
    """The model of these leaves. shape: its shapes before rounding."""
    if weights == "int8":
        shape = jax.eval_shape(with_int8, shape)
    ordered = [leaves[name] for name in named_leaves(shape)]
    return jax.tree.unflatten(jax.tree.structure(shape), ordered)
