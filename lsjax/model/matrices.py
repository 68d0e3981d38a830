"""A model with other matrices: in another dtype, split into parts, or changed one by one."""

from collections.abc import Callable
from functools import partial
from typing import Any

from flax import nnx

from lsjax.config import ComputeDtype
from lsjax.kernels.matmuls import default_dtype
from lsjax.model.block import Linear
from lsjax.model.int8 import Int8Linear, Int8Rows, rounded
from lsjax.model.llama import Llama, unstacked, with_parts
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


def with_int8(model: Llama) -> Llama:
    """The model with matrices and a head of int8 (int8.py). Embedding, norms and biases stay as
    they are: a tied head gets rows of its own."""

    def changed(name: str, matrix: Linear) -> Int8Linear:
        return Int8Linear(rounded(matrix.kernel[...]), matrix.bias)

    model = unstacked(model)
    head = nnx.data(Int8Rows.of(model.head_table))  # a tied head was no data
    return with_parts(map_matrices(changed, model), head=head)


def map_matrices(change: Callable[[str, Linear], Any], model: Llama) -> Llama:
    """The model with `change(name, matrix)` for qkv, out, gate_up and down."""

    def changed(path, part):
        return change(path.rpartition(".")[2], part) if isinstance(part, Linear) else part

    return map_named(changed, model, lambda part: isinstance(part, Linear))
