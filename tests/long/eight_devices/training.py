"""A training step on meshes: the same gradients, and what its program sends."""

import math
import re
from functools import cache

import jax
import numpy as np
import pytest
from flax import nnx

from lsjax.config import EarlyExitConfig, LayerDropoutConfig, LlamaConfig, MeshConfig, StepConfig
from lsjax.model.llama import Llama
from lsjax.model.parameters import named_leaves, placed
from lsjax.sharding import make_mesh
from lsjax.training.step import init_state, make_train_step
from tests.tunings import tune

CONFIG = StepConfig(
    num_steps=4,
    layer_dropout=LayerDropoutConfig(p_max=0.5, distribution="linear"),
    early_exit=EarlyExitConfig(curriculum="all"),
    remat="nothing_saveable",
)
SHAPE = LlamaConfig.tiny(num_layers=3, vocab_size=260)
ROWS, STEPS = 16, 24
TOKENS = np.random.default_rng(0).integers(0, 260, (ROWS, STEPS + 1), dtype=np.int32)
BATCH = dict(
    tokens_BT=TOKENS[:, :-1],
    labels_BT=np.where(np.arange(STEPS) < 3 + np.arange(ROWS)[:, None], TOKENS[:, 1:], -1),
    segments_BT=np.ones((ROWS, STEPS), np.int32),
    positions_BT=np.broadcast_to(np.arange(STEPS, dtype=np.int32), (ROWS, STEPS)),
)


@pytest.fixture(scope="module", autouse=True)
def several_chunks():
    """Makes the loss take several chunks."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        tune(monkeypatch, chunk_logits=SHAPE.vocab_size * 32)
        yield


@pytest.fixture(scope="module")
def step_on():
    """The compiled step on a mesh, and the gradient of each parameter."""

    def step(sizes):
        mesh = make_mesh(sizes)
        make = jax.jit(lambda: init_state(CONFIG, Llama(SHAPE, rngs=nnx.Rngs(0))))
        with jax.set_mesh(mesh):
            state, batch = placed(make(), mesh), placed(BATCH, mesh)
            program = make_train_step(CONFIG).lower(state, batch).compile()
            state, _ = program(state, batch)
        # The first moments of AdamW, which are (1 - b1) of the clipped gradient.
        leaves = named_leaves(state).items()
        return program.as_text(), {name: np.asarray(x) for name, x in leaves if ".mu." in name}

    return cache(step)


@pytest.mark.parametrize(
    "sizes",
    [
        MeshConfig(data=2, fsdp=2),
        MeshConfig(data=2, fsdp=4),
        MeshConfig(data=2, fsdp=2, tensor=2),
        MeshConfig(tensor=8),  # neither the K/V heads nor the vocabulary divide
    ],
)
def test_the_same_gradients_on_any_mesh(step_on, sizes):
    _, expected = step_on(MeshConfig())
    _, found = step_on(sizes)
    assert found.keys() == expected.keys() and len(found) == 9
    for name, gradient in expected.items():
        difference = np.linalg.norm(found[name] - gradient) / np.linalg.norm(gradient)
        assert difference < 1e-5, name


def test_slices_train_as_data_does(step_on):
    _, expected = step_on(MeshConfig(data=2, fsdp=4))
    _, found = step_on(MeshConfig(slices=2, fsdp=4))
    for name, gradient in expected.items():
        np.testing.assert_array_equal(found[name], gradient, name)


def test_slices_are_outermost():
    """CPUs are in no slice: the first half of them stands for the first one."""
    mesh = make_mesh(MeshConfig(slices=2, data=-1, tensor=2))
    assert mesh.shape == dict(data=4, fsdp=1, context=1, tensor=2)
    first = {device.id for device in mesh.devices[:2].flat}
    assert first == {device.id for device in jax.devices()[:4]}


def test_what_a_step_sends(step_on):
    """Weights are gathered layer by layer, and the head's table once for all exits. Nothing is
    sent in the loops of the loss, and no rows but those of the embedding."""
    text, _ = step_on(MeshConfig(data=2, fsdp=4))
    d, f, v, h = SHAPE.hidden_size, SHAPE.intermediate_size, SHAPE.vocab_size, SHAPE.head_dim
    k, group = SHAPE.num_kv_heads, SHAPE.num_heads // SHAPE.num_kv_heads
    layer = {(d, k, group + 2, h), (k * group * h, d), (d, 2, f), (f, d)}
    sent = collectives(text)
    gathered = {squeezed(shape) for kind, shape, _ in sent if kind == "all-gather"}
    tokens = (ROWS // 2, STEPS)
    assert {tuple(sorted(shape)) for shape in gathered} == {
        tuple(sorted(shape)) for shape in layer | {(v, d), tokens}
    }
    assert not [path for _, _, path in sent if "shard_map/while" in path]
    exchanged = [math.prod(shape) for kind, shape, _ in sent if kind == "all-to-all"]
    assert len(exchanged) > 0 and sum(exchanged) == 2 * ROWS * STEPS * d // 8
    assert not {kind for kind, *_ in sent} - {"all-gather", "all-to-all", "all-reduce"}


def collectives(text: str) -> list[tuple[str, tuple[int, ...], str]]:
    """Kinds of communication, shapes of their results, and the path of the operation."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    found = []
    for line in text.splitlines():
        match = re.search(rf"= (.*?) ({kinds})(?:-start)?\(", line)
        if match:
            path = re.search(r'op_name="([^"]*)"', line)
            for shape in re.findall(r"\w+\[([\d,]*)\]", match[1]):
                sizes = tuple(int(size) for size in shape.split(",") if size)
                found.append((match[2], sizes, path[1] if path else ""))
    return found


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without axes of one."""
    return tuple(size for size in shape if size != 1)
