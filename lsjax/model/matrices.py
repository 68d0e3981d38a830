"""A model with other matrices: in another dtype, split into parts, or changed one by one."""

from collections.abc import Callable
from functools import partial
from typing import Any

from flax import nnx

from lsjax.config import ComputeDtype
from lsjax.kernels.matmuls import default_dtype
from lsjax.model.block import Linear
from lsjax.model.llama import Llama
from lsjax.model.parameters import SLOTS, map_named


def cast_matrices(model: Llama, dtype: ComputeDtype) -> Llama:
    """Casts the matrices to the dtype of a computation; auto is bfloat16 on accelerators and the
    model's own on CPUs. Embedding, norm scales and biases keep their dtype: their gradients are
    sums over all tokens, which bfloat16 would round too coarsely."""
    if dtype == "auto":
        dtype = default_dtype(model.dtype)

    def cast(name, leaf):
        return leaf if name.endswith(("embedding", "scale", "bias")) else leaf.astype(dtype)

    return map_named(cast, model)


def split_matrices(model: Llama) -> Llama:
    """The same model, stacked, with a Linear for each part of qkv and gate_up. Autodiff joins the
    gradients."""

    def taken(slot, name, leaf):  # A of an adapter, [L, D, r], has no slots
        return leaf if name == "adapter.a" else leaf[..., slot, :]

    def parts(name, matrix):
        if name not in SLOTS:
            return matrix
        return nnx.List(map_named(partial(taken, slot), matrix) for slot in SLOTS[name])

    return map_matrices(parts, model)


def map_matrices(change: Callable[[str, Linear], Any], model: Llama) -> Llama:
    """The model with `change(name, matrix)` for qkv, out, gate_up and down."""

    def changed(path, part):
        return change(path.rpartition(".")[2], part) if isinstance(part, Linear) else part

    return map_named(changed, model, lambda part: isinstance(part, Linear))
