"""Low-rank adapters for the matrices of a Llama (LoRA; Hu et al., 2021).

    y = x W + scale (x A) B      A [inputs, r] random, B [r, *outputs] zero at the start

Letters: r rank.
"""

from typing import get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from lsjax.config import LlamaConfig, LoraConfig, LoraTarget
from lsjax.kernels.matmuls import linear
from lsjax.model.block import Linear
from lsjax.model.llama import Llama, stacked, with_parts
from lsjax.model.matrices import map_matrices
from lsjax.model.parameters import map_named


class Adapter(nnx.Module):
    """A and B of one matrix, or of the same matrix in each of L layers."""

    def __init__(self, a: Float[Array, "... r"], b: Float[Array, "..."], scale: float):
        self.a, self.b = nnx.Param(a), nnx.Param(b)
        self.scale = scale

    def __call__(self, x: Float[Array, "B T I"]) -> Float[Array, "B T ..."]:
        x_BTr = linear(x, self.a[...].astype(x.dtype)) * self.scale
        return linear(x_BTr, self.b[...].astype(x.dtype))


def with_adapters(model: Llama, config: LoraConfig, seed: int) -> Llama:
    """The stacked model with new adapters, which change nothing yet."""

    def adapted(name: str, matrix: Linear) -> Linear:
        if name not in config.targets:
            return matrix
        layers, inputs, *outputs = matrix.kernel.shape
        key = jax.random.fold_in(jax.random.key(seed), get_args(LoraTarget).index(name))
        dtype = matrix.kernel[...].dtype
        a = jax.random.normal(key, (layers, inputs, config.rank), dtype) * inputs**-0.5
        b = jnp.zeros((layers, config.rank, *outputs), dtype)
        return with_parts(matrix, adapter=Adapter(a, b, config.scale))

    return map_matrices(adapted, model)


def merged(
    kernel: Float[Array, "L I *O"],
    a: Float[Array, "L I r"],
    b: Float[Array, "L r *O"],
    scale: float,
) -> Float[Array, "L I *O"]:
    """W + scale A B of each layer, in the memory of W; holds one layer's A B at a time."""
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    exact = dict(precision=lax.Precision.HIGHEST, preferred_element_type=wide)

    def merge_layer(kernel, a, b):
        return (kernel + scale * jnp.tensordot(a, b, axes=1, **exact)).astype(kernel.dtype)

    def merge(*arrays):
        return lax.map(lambda layer: merge_layer(*layer), arrays)

    return jax.jit(merge, donate_argnums=0, out_shardings=kernel.sharding)(kernel, a, b)


def split(model: Llama) -> tuple[Llama, Llama]:
    """The trained part and the frozen rest: adapters or exit blocks are trained, or else all
    parameters. Each part has None in place of the other's parameters."""
    found = map_named(lambda name, _: ".adapter." in name or name.startswith("exit_blocks."), model)
    if not any(jax.tree.leaves(found)):
        found = jax.tree.map(lambda _: True, model)
    trained = jax.tree.map(lambda leaf, on: leaf if on else None, model, found)
    frozen = jax.tree.map(lambda leaf, on: None if on else leaf, model, found)
    return trained, frozen


def num_adapter_params(config: LlamaConfig, lora: LoraConfig) -> int:
    """Number of parameters of the adapters, which are the trained ones."""

    def adapters():
        return split(with_adapters(stacked(Llama(config, rngs=nnx.Rngs(0))), lora, 0))[0]

    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(adapters)))


def joined(trained: Llama, frozen: Llama) -> Llama:
    """Inverse of `split`."""

    def either(one, other):
        return other if one is None else one

    return jax.tree.map(either, trained, frozen, is_leaf=lambda leaf: leaf is None)
