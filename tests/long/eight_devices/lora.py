"""Finetuning of adapters on a mesh; run by test_eight_devices.py."""

import jax
import numpy as np
import pytest
from flax import nnx

import lsjax
from lsjax.checkpoints.run import begin_run
from lsjax.checkpoints.saving import Checkpoints
from lsjax.config import EarlyExitConfig, LlamaConfig, LoraConfig, MeshConfig, TrainConfig
from lsjax.data.tokenizer_backends import ByteTokenizer
from lsjax.model.llama import Llama, stacked
from lsjax.model.lora import split
from lsjax.model.parameters import placed, shardings
from lsjax.sharding import make_mesh
from lsjax.training.step import init_state, make_train_step
from tests.long.batches import whole_rows

CONFIG = TrainConfig(
    model=LlamaConfig.tiny(num_layers=2, vocab_size=260),
    init_from="base",
    num_steps=4,
    batch_size=8,
    seq_len=8,
    lora=LoraConfig(rank=4),
    early_exit=EarlyExitConfig(curriculum="all"),
)
TOKENS = np.random.default_rng(0).integers(0, 260, (8, 9), dtype=np.int32)
BATCH = whole_rows(TOKENS)
SIZES = MeshConfig(data=2, fsdp=2, tensor=2)


def make():
    return init_state(CONFIG, stacked(Llama(CONFIG.model, rngs=nnx.Rngs(0))))


@pytest.fixture(scope="module")
def one_device():
    """The state after a step, and its metrics."""
    return make_train_step(CONFIG)(jax.jit(make)(), BATCH)


def test_a_step_is_that_of_one_device_and_loads_merged(one_device, tmp_path):
    mesh = make_mesh(SIZES)
    with jax.set_mesh(mesh):
        before = placed(jax.jit(make)(), mesh)
        state, metrics = make_train_step(CONFIG)(before, placed(BATCH, mesh))
    expected, expected_metrics = one_device
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], expected_metrics["grad_norm"], rtol=1e-5)
    adapters, frozen = split(state.model)
    same = [jax.tree.leaves(part) for part in split(expected.model)]
    for one, other in zip(jax.tree.leaves(frozen), same[1], strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(jax.tree.leaves(adapters), same[0], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
        assert one.addressable_shards[0].data.size == one.size // 2  # along one axis
        assert one.size > 0

    begin_run(tmp_path, CONFIG, ByteTokenizer(add_bos=False))
    with Checkpoints(tmp_path / "checkpoints", CONFIG.checkpoints) as checkpoints:
        checkpoints.save(state, step=1, data={})
    model, plain = lsjax.load(tmp_path, mesh=mesh), lsjax.load(tmp_path)
    assert [leaf.sharding for leaf in jax.tree.leaves(model)] == jax.tree.leaves(
        shardings(model, mesh)
    )
    for one, other in zip(jax.tree.leaves(model), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-7)
