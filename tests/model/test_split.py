"""Projections apart and joined are the same model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from lsjax.config import LlamaConfig, LoraConfig, StepConfig
from lsjax.model.llama import Llama, stacked
from lsjax.model.lora import with_adapters
from lsjax.model.matrices import split_matrices
from lsjax.training.loss import objective

SHAPE = LlamaConfig.tiny(num_layers=2, num_kv_heads=2, attention_bias=True, mlp_bias=True)
TOKENS = jax.random.randint(jax.random.key(1), (2, 9), 0, 250)


def filled(model: Llama) -> Llama:
    """Biases and adapters begin at zero: here all leaves are random."""
    leaves, structure = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    pairs = zip(leaves, keys, strict=True)
    noise = [leaf + 0.05 * jax.random.normal(key, leaf.shape, leaf.dtype) for leaf, key in pairs]
    return jax.tree.unflatten(structure, noise)


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 3])
def test_the_same_values_and_gradients(rank):
    model = stacked(Llama(SHAPE, rngs=nnx.Rngs(0)))
    model = filled(with_adapters(model, LoraConfig(rank=rank), 0) if rank else model)

    def run(form):
        def loss(model):
            x_LBTD = form(model).exits(TOKENS)
            return (x_LBTD * jnp.cos(jnp.arange(x_LBTD.size)).reshape(x_LBTD.shape)).sum(), x_LBTD

        (_, x_LBTD), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(model)
        return x_LBTD, gradients

    (joined, joined_gradients), (split, split_gradients) = map(
        run, (lambda model: model, split_matrices)
    )
    np.testing.assert_allclose(split, joined, rtol=0, atol=1e-6 * np.abs(joined).max())
    pairs = zip(jax.tree.leaves(joined_gradients), jax.tree.leaves(split_gradients), strict=True)
    for one, other in pairs:
        assert np.linalg.norm(one - other) <= 1e-6 * np.linalg.norm(one)


@pytest.mark.parametrize(
    "kind, platform, apart",
    [("cpu", "cpu", False), ("NVIDIA H100", "gpu", False), ("TPU v6 lite", "tpu", True)],
)
def test_training_on_tpus_takes_them_apart(kind, platform, apart):
    """And turns queries and keys by a product. The tiny program is traced, not compiled."""
    names = ("data", "fsdp", "context", "tensor")
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    types = (AxisType.Auto,) * len(names)
    mesh = AbstractMesh((1,) * len(names), names, axis_types=types, abstract_device=device)
    model = jax.eval_shape(lambda: stacked(Llama(SHAPE, rngs=nnx.Rngs(0))))
    row = jax.ShapeDtypeStruct((2, 9), jnp.int32)
    batch = {f"{name}_BT": row for name in ("tokens", "labels", "segments", "positions")}
    number = jax.ShapeDtypeStruct((), jnp.int32)
    rows = jax.ShapeDtypeStruct((2,), jnp.int32)
    config = StepConfig(num_steps=1, attention="xla", dtype="float32")
    with jax.sharding.use_abstract_mesh(mesh):
        program = str(
            jax.make_jaxpr(lambda *arguments: objective(config, *arguments))(
                model, batch, number, rows, number
            )
        )
    heads, size = SHAPE.num_heads, SHAPE.head_dim
    assert (f"f32[2,{size},{size}]" in program) == apart
    assert (f"f32[2,9,2,{heads // 2 + 2},{size}]" in program) != apart
