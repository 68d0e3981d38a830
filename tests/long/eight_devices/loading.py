"""Loading onto a mesh; run by test_eight_devices.py in a process that has eight devices."""

import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lsjax.checkpoints import load, open_checkpoint, tensors
from lsjax.checkpoints.huggingface import save
from lsjax.checkpoints.tensors import CheckpointError, TensorSource, parameter_reader
from lsjax.config import LlamaConfig, MeshConfig
from lsjax.model.llama import Llama
from lsjax.model.parameters import shardings
from lsjax.sharding import make_mesh
from tests.checkpoints.test_gguf import Kind, from_golden, metadata, write

DATA_AND_TENSOR = MeshConfig(data=4, tensor=2)
ALL_AXES = MeshConfig(data=2, fsdp=2, tensor=2)


class Counted:
    """A tensor of a file that counts how often each of its numbers is read."""

    def __init__(self, tensor, counts):
        self.tensor, self.counts = tensor, counts

    def __getitem__(self, index):
        self.counts[index] += 1
        return self.tensor[index]


class CountingSource(TensorSource):
    """A source that counts how often each number of each tensor is read."""

    def __init__(self, source):
        self.path, self.config, self.shapes = source.path, source.config, source.shapes
        self.names, self._source = source.names, source
        self.counts = {name: np.zeros(shape, np.int64) for name, shape in source.shapes.items()}

    def where(self, name: str) -> str:
        return self._source.where(name)

    def read(self, name: str) -> Counted:
        return Counted(self._source.read(name), self.counts[name])


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A checkpoint whose largest tensor is its embedding."""
    config = LlamaConfig.tiny(num_layers=2, vocab_size=4096, attention_bias=True, mlp_bias=True)
    path = tmp_path_factory.mktemp("saved") / "model"
    save(jax.jit(lambda: Llama(config, rngs=nnx.Rngs(1)))(), path)
    return path


@pytest.mark.parametrize(
    "mesh, dtype",
    [
        (MeshConfig(data=8), jnp.float32),
        (DATA_AND_TENSOR, jnp.bfloat16),
        (ALL_AXES, jnp.float32),
        (MeshConfig(tensor=8), jnp.bfloat16),
    ],
)
def test_each_shard_is_read_once(saved, mesh, dtype, monkeypatch):
    """Every number once, whether devices share it or not; a shard and a tensor's share are held."""
    held, largest = [], 4096 * 64 * (jnp.dtype(dtype).itemsize + 4 + 1)  # float32, and is it finite

    def measured(*arguments):
        read = parameter_reader(*arguments)

        def measure(index):
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            shard = read(index)
            held.append(tracemalloc.get_traced_memory()[1] - before)
            return shard

        return measure

    monkeypatch.setattr(tensors, "parameter_reader", measured)
    source, mesh = CountingSource(open_checkpoint(saved)), make_mesh(mesh)
    tracemalloc.start()
    model = load(source, dtype=dtype, mesh=mesh)
    tracemalloc.stop()
    assert all((counts == 1).all() for counts in source.counts.values())
    smallest_part = 1 if mesh.shape["tensor"] * mesh.shape["fsdp"] == 1 else 2
    assert max(held) <= largest / smallest_part + 20_000  # and the objects of Python
    for placed_, whole in zip(
        jax.tree.leaves(model), jax.tree.leaves(load(saved, dtype=dtype)), strict=True
    ):
        np.testing.assert_array_equal(placed_, whole)
    expected = jax.tree.leaves(shardings(model, mesh))
    assert [leaf.sharding for leaf in jax.tree.leaves(model)] == expected


def test_gguf(tmp_path):
    """Quantised tensors are read whole, once for all their shards."""
    config, tensors = from_golden("gqa_tied", Kind.Q8_0)
    path = write(tmp_path / "model.gguf", metadata(config), tensors)
    on_mesh = load(path, mesh=make_mesh(MeshConfig(fsdp=2, tensor=2)))
    for array, whole in zip(jax.tree.leaves(on_mesh), jax.tree.leaves(load(path)), strict=True):
        np.testing.assert_array_equal(array, whole)


def test_damage_in_any_shard_is_found(saved, tmp_path):
    model = load(saved)
    gate_up = model.layers[1].feed_forward.gate_up.kernel
    gate_up[...] = gate_up[...].at[63, 1, 127].set(jnp.nan)
    save(model, tmp_path / "damaged")
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.up_proj.weight': 1 of \d+ values are"):
        load(tmp_path / "damaged", mesh=make_mesh(DATA_AND_TENSOR))
