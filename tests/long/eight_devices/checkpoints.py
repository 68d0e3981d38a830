"""Saving from one mesh and resuming with another of eight devices."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import lsjax
from lsjax.checkpoints.run import begin_run
from lsjax.checkpoints.saving import Checkpoints
from lsjax.checkpoints.steps import fingerprints
from lsjax.config import LlamaConfig, MeshConfig, TrainConfig
from lsjax.data.tokenizer_backends import ByteTokenizer
from lsjax.model.llama import Llama
from lsjax.model.parameters import named_leaves, placed, placed_shapes, shardings
from lsjax.sharding import make_mesh
from lsjax.training.step import init_state

CONFIG = TrainConfig(
    num_steps=9,
    batch_size=8,
    seq_len=8,
    model=LlamaConfig.tiny(num_layers=2, vocab_size=260, attention_bias=True),
)
FROM = MeshConfig(slices=2, fsdp=2, context=2)


@pytest.fixture(scope="module")
def whole():
    """A state on one device, every number of it different."""
    make = jax.jit(lambda: init_state(CONFIG, Llama(CONFIG.model, rngs=nnx.Rngs(0))))
    state = make()
    numbered = [
        np.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape) + index
        for index, leaf in enumerate(jax.tree.leaves(state))
    ]
    return jax.device_put(jax.tree.unflatten(jax.tree.structure(state), numbered))


@pytest.fixture(scope="module")
def run(whole, tmp_path_factory):
    """A run whose only step was saved from eight devices in two slices."""
    directory = tmp_path_factory.mktemp("run")
    begin_run(directory, CONFIG, ByteTokenizer(add_bos=False))
    with Checkpoints(directory / "checkpoints", CONFIG.checkpoints) as checkpoints:
        state = placed(whole, make_mesh(FROM))
        checkpoints.save(state, step=3, data={"rows_taken": 24})
    return directory


def equal(one, other) -> bool:
    return all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


def test_fingerprints_do_not_depend_on_the_mesh(whole):
    expected = fingerprints(named_leaves(whole))
    for sizes in (FROM, MeshConfig(fsdp=8), MeshConfig(tensor=4), MeshConfig(slices=4, data=2)):
        assert fingerprints(named_leaves(placed(whole, make_mesh(sizes)))) == expected


@pytest.mark.parametrize(
    "sizes",
    [
        None,
        MeshConfig(fsdp=2, context=4),
        MeshConfig(data=4, tensor=2),
        MeshConfig(slices=4, fsdp=2),
    ],
)
def test_restored_onto_another_mesh(run, whole, sizes):
    like = jax.eval_shape(lambda: whole)
    if sizes is not None:
        like = placed_shapes(like, make_mesh(sizes))
    restored = Checkpoints(run / "checkpoints", CONFIG.checkpoints).restore(like).state
    assert equal(restored, whole)
    if sizes is not None:
        found = [leaf.sharding for leaf in jax.tree.leaves(restored)]
        assert found == [leaf.sharding for leaf in jax.tree.leaves(like)]


@pytest.mark.parametrize("sizes", [None, MeshConfig(data=2, fsdp=2, tensor=2)])
def test_loaded_onto_a_mesh(run, whole, sizes):
    mesh = None if sizes is None else make_mesh(sizes)
    model = lsjax.load(run, mesh=mesh)
    assert equal(lsjax.stacked(model), whole.model)
    if mesh is not None:
        expected = jax.tree.leaves(shardings(model, mesh))
        assert [leaf.sharding for leaf in jax.tree.leaves(model)] == expected


def test_a_step_saved_from_a_mesh_is_checked_on_one_device(run, whole, tmp_path):
    config = dataclasses.replace(CONFIG.checkpoints, keep_last=2)
    lines: list[str] = []
    with Checkpoints(tmp_path, config, lines.append) as checkpoints:
        for step in (1, 2):
            state = placed(whole, make_mesh(FROM))
            checkpoints.save(state, step=step, data={})
    (file, *_) = sorted(
        (tmp_path / "2" / "train").glob("ocdbt*/d/*"), key=lambda file: -file.stat().st_size
    )
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        stream.write(bytes(64))
    restored = Checkpoints(tmp_path, config, lines.append).restore(jax.eval_shape(lambda: whole))
    assert restored.step == 1 and len(lines) == 1 and equal(restored.state, whole)
