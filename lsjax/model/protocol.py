"""What decoding needs of a model: `DecoderModel`, and defaults for what a model may leave out.

A model is a pytree of arrays. Layers are numbered from 0, and exit E means that layers 0..E-1 have
run. T new tokens of each of B rows have consecutive positions. Slot s of a cache holds position s.
It may be written twice: rejected drafts are overwritten.

A model may also have these methods. The functions below call them, or do what is said here.

    prepare(positions_BT)     what layers need for positions, such as angles; `run_layers` then
                              takes it as `prepared`. Its arrays are [B, T, ...]. Default: nothing.
    draft_state(exit_layer, x_BTD, positions_BT, cache)
                              the state that exit drafts from, and the cache. May be None.
                              Default: x_BTD.
    grow_cache(cache, capacity)
                              the cache with more slots. Default: zeros are appended to the axis in
                              which caches of two capacities differ.
    for_decoding()            the same model in the form that decodes fastest. Default: itself.
    bytes_per_token()         bytes of weights that a token reads. Default: those of the model.
    shardings(mesh)           NamedShardings of the model. Default: by the names of the weights, as
                              for Llama; unknown names are replicated.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from lsjax.model.parameters import shardings as by_name

Cache = Any  # a pytree of arrays [B, ...]


@runtime_checkable
class Sizes(Protocol):
    """The numbers that settings are checked against: a model or its configuration."""

    @property
    def num_layers(self) -> int:
        """L."""

    @property
    def vocab_size(self) -> int:
        """V."""

    @property
    def max_context(self) -> int:
        """Most tokens of a text."""


@runtime_checkable
class DecoderModel(Sizes, Protocol):
    """A decoder whose layers can run in parts, with one head for every exit."""

    @property
    def dtype(self) -> DTypeLike:
        """dtype of the parameters."""

    def new_cache(self, batch: int, capacity: int, depth: int) -> Cache:
        """An empty cache of the first `depth` layers, with `capacity` slots for each row."""

    def embed(
        self, tokens_BT: Int[Array, "B T"], positions_BT: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """The input of layer 0."""

    def run_layers(
        self,
        x_BTD: Float[Array, "B T D"],
        lo: int,
        hi: int,
        positions_BT: Int[Array, "B T"],
        cache: Cache,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Runs layers lo..hi-1 on new tokens: writes their slots, and attends to those at or before
        each token's own."""

    def unembed(self, x: Float[Array, "*batch D"], rows: Any = None) -> Float[Array, "*batch W"]:
        """Final norm and head: logits in float32 or wider. rows: those of `head_rows`, by default
        all."""

    def head_rows(self, ids_W: ArrayLike) -> Any:
        """The head's rows of some tokens, for `unembed`."""


def prepare(model: DecoderModel, positions_BT: Int[Array, "B T"]) -> Any:
    """What layers need for these positions; None if the model prepares nothing."""
    return model.prepare(positions_BT) if hasattr(model, "prepare") else None


def run_layers(
    model: DecoderModel,
    x_BTD: Float[Array, "B T D"],
    lo: int,
    hi: int,
    positions_BT: Int[Array, "B T"],
    cache: Cache,
    prepared: Any = None,
) -> tuple[Float[Array, "B T D"], Cache]:
    """`model.run_layers`, with what was prepared for the positions."""
    options = {} if prepared is None else {"prepared": prepared}
    return model.run_layers(x_BTD, lo, hi, positions_BT, cache, **options)


def run_through(
    model: DecoderModel,
    bounds: Sequence[int],
    x_BTD: Float[Array, "B T D"],
    positions_BT: Int[Array, "B T"],
    prepared: Any,
    cache: Cache,
) -> tuple[tuple[Float[Array, "B T D"], ...], Cache]:
    """Runs the layers between adjacent bounds. Returns the states at each, and the cache."""
    states = []
    for lo, hi in pairwise(bounds):
        x_BTD, cache = run_layers(model, x_BTD, lo, hi, positions_BT, cache, prepared)
        states.append(x_BTD)
    return tuple(states), cache


def draft_state(
    model: DecoderModel,
    exit_layer: int,
    x_BTD: Float[Array, "B T D"],
    positions_BT: Int[Array, "B T"],
    cache: Cache,
) -> tuple[Float[Array, "B T D"], Cache]:
    """The states that an exit drafts from, for new tokens whose states after it are x_BTD."""
    if has_draft_state(model):
        return model.draft_state(exit_layer, x_BTD, positions_BT, cache)
    return x_BTD, cache


def has_draft_state(model: DecoderModel) -> bool:
    """Whether exits draft from other states than those after their layers."""
    return getattr(model, "draft_state", None) is not None


def run_past_exits(
    model: DecoderModel,
    exits: Sequence[int],
    depth: int,
    x_BTD: Float[Array, "B T D"],
    positions_BT: Int[Array, "B T"],
    cache: Cache,
) -> tuple[Float[Array, "B T D"], Cache]:
    """Runs the first `depth` layers, and what each exit drafts from, for its part of the cache."""
    lo = 0
    for exit_layer in exits if has_draft_state(model) else ():
        x_BTD, cache = model.run_layers(x_BTD, lo, exit_layer, positions_BT, cache)
        _, cache = draft_state(model, exit_layer, x_BTD, positions_BT, cache)
        lo = exit_layer
    return model.run_layers(x_BTD, lo, depth, positions_BT, cache)


def grow_cache(model: DecoderModel, cache: Cache, capacity: int, depth: int) -> Cache:
    """The cache of the first `depth` layers with `capacity` slots. New slots are empty."""
    if hasattr(model, "grow_cache"):
        return model.grow_cache(cache, capacity)
    batch = len(jax.tree.leaves(cache)[0])
    larger = jax.eval_shape(lambda: model.new_cache(batch, capacity, depth))

    def padded(old: Array, new: jax.ShapeDtypeStruct) -> Array:
        sizes = zip(old.shape, new.shape, strict=True)
        return jnp.pad(old, [(0, after - before) for before, after in sizes])

    return jax.tree.map(padded, cache, larger)


def for_decoding(model: DecoderModel) -> DecoderModel:
    """The model in the form that decodes fastest."""
    return model.for_decoding() if hasattr(model, "for_decoding") else model


def bytes_per_token(model: DecoderModel) -> int:
    """Bytes of weights that a token of all layers reads."""
    return model.bytes_per_token() if hasattr(model, "bytes_per_token") else num_bytes(model)


def shardings(model: DecoderModel, mesh: Mesh) -> Any:
    """Shardings of the model's arrays."""
    return model.shardings(mesh) if hasattr(model, "shardings") else by_name(model, mesh)


def num_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays, or of its shapes."""
    leaves = jax.tree.leaves(tree)
    return sum(int(np.prod(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)
