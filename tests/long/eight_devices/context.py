"""Rows whose positions are sharded; run by test_eight_devices.py."""

import dataclasses
import math
import re
from functools import cache, partial
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lsjax.config import (
    ConfigError,
    EarlyExitConfig,
    LayerDropoutConfig,
    LlamaConfig,
    MeshConfig,
    StepConfig,
)
from lsjax.evaluation.exits import exit_sums
from lsjax.kernels import flash
from lsjax.model.attention import self_attention
from lsjax.model.llama import Llama
from lsjax.model.parameters import named_leaves, placed
from lsjax.sharding import in_context_order, make_mesh, over_context
from lsjax.training.step import init_state, make_train_step
from tests.tunings import tune

EXITS = EarlyExitConfig(curriculum="all", token_share=0.4)
CONFIG = StepConfig(
    num_steps=4,
    layer_dropout=LayerDropoutConfig(p_max=0.5, distribution="uniform"),
    early_exit=EXITS,
    remat="dots_with_no_batch_dims_saveable",
    z_loss=1e-3,
)
SHAPE = LlamaConfig.tiny(num_layers=2, sliding_window=7, full_attention_layers=(1,))
ROWS, STEPS = 8, 48
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 258, (ROWS, STEPS + 1), dtype=np.int32)
# Documents of other lengths in each row, of which few tokens are labelled in some.
SEGMENTS = np.sort(RNG.integers(0, 4, (ROWS, STEPS), dtype=np.int32), axis=1)
PLACES = np.arange(STEPS, dtype=np.int32)
BATCH = dict(
    tokens_BT=TOKENS[:, :-1],
    labels_BT=np.where(RNG.random((ROWS, STEPS)) < np.arange(1, 9)[:, None] / 8, TOKENS[:, 1:], -1),
    segments_BT=SEGMENTS,
    positions_BT=np.stack([PLACES - np.searchsorted(row, row) for row in SEGMENTS]),
)


def first_state(config, shape=SHAPE):
    return init_state(config, Llama(shape, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def step_on():
    """The compiled step on a mesh, the gradient of each parameter, and the metrics."""

    def step(sizes, config, shape=SHAPE):
        mesh = make_mesh(sizes)
        with jax.set_mesh(mesh), pytest.MonkeyPatch.context() as monkeypatch:
            tune(monkeypatch, chunk_logits=SHAPE.vocab_size * 32)
            state, batch = (
                placed(jax.jit(partial(first_state, config, shape))(), mesh),
                placed(BATCH, mesh),
            )
            program = make_train_step(config).lower(state, batch).compile()
            state, metrics = program(state, batch)
        leaves = named_leaves(state).items()
        gradients = {name: np.asarray(x) for name, x in leaves if ".mu." in name}
        return program.as_text(), gradients, jax.device_get(metrics)

    return cache(step)


@pytest.mark.parametrize(
    "sizes, changes",
    [
        (MeshConfig(data=2, context=4), {}),
        (MeshConfig(fsdp=2, context=2, tensor=2), {}),
        (MeshConfig(fsdp=2, context=4), dict(micro_batches=2)),
        (MeshConfig(context=4), dict(attention="splash")),
    ],
)
def test_the_same_gradients_with_any_context(step_on, sizes, changes):
    _, expected, metrics = step_on(MeshConfig(), CONFIG)
    _, found, others = step_on(sizes, dataclasses.replace(CONFIG, **changes))
    assert found.keys() == expected.keys() and len(found) == 9
    for name, gradient in expected.items():
        difference = np.linalg.norm(found[name] - gradient) / np.linalg.norm(gradient)
        assert difference < 1e-5, name
    for name, value in metrics.items():
        np.testing.assert_allclose(others[name], value, rtol=1e-5, err_msg=name)


def test_the_same_gradients_with_gathered_rows(step_on):
    """Rows that share a shard stay together: context does not change the draws. Two layers."""
    skip = dataclasses.replace(CONFIG.layer_dropout, skip="gather")
    config = StepConfig(num_steps=4, layer_dropout=skip, early_exit=EXITS)
    shape = LlamaConfig.tiny(num_layers=2)
    _, expected, _ = step_on(MeshConfig(data=2), config, shape)
    _, found, _ = step_on(MeshConfig(data=2, context=4), config, shape)
    for name, gradient in expected.items():
        difference = np.linalg.norm(found[name] - gradient) / np.linalg.norm(gradient)
        assert difference < 1e-5, name


def test_what_a_step_sends(step_on):
    """Keys and values are gathered, and their gradients summed. Hidden states stay, also in the
    loops of the loss."""
    text, *_ = step_on(MeshConfig(data=2, context=4), CONFIG)
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    lines = re.findall(rf'= (.*?) ({kinds})(?:-start)?\(.*?op_name="([^"]*)"', text)
    assert not [name for _, _, name in lines if "shard_map/while" in name]
    keys = ROWS // 2 * STEPS * SHAPE.num_kv_heads * SHAPE.head_dim
    largest = {
        kind: max(
            math.prod(map(int, sizes.split(",")))
            for shape, other, _ in lines
            for sizes in re.findall(r"\w+\[([\d,]+)\]", shape)
            if other == kind
        )
        for kind in {kind for _, kind, _ in lines}
    }
    assert largest["all-gather"] == keys, largest
    assert largest["reduce-scatter"] == keys // 4
    assert largest.keys() == {"all-gather", "reduce-scatter", "all-reduce"}


@pytest.mark.parametrize("window, packed", [(None, True), (None, False), (7, True), (200, False)])
def test_splash_on_shards_of_queries(window, packed):
    """Forward and backward, where blocks do and do not divide the shards."""
    steps = 8 * 160
    rng = np.random.default_rng(1)
    q, k, v, dy = (rng.normal(size=(2, steps, n, 16)).astype(np.float32) for n in (4, 2, 2, 4))
    segments = np.repeat([[1, 2, 2, 3, 3, 3, 4, 0]], 160, axis=1).repeat(2, 0) if packed else None

    @partial(jax.jit, static_argnums=0)
    def with_gradients(kernel, q, k, v, dy):
        ordered = in_context_order(jnp.asarray(segments)) if packed else None
        run = partial(self_attention, segments_BT=ordered, kernel=kernel, window=window)
        y, pullback = jax.vjp(run, *map(in_context_order, (q, k, v)))
        return [in_context_order(x, back=True) for x in (y, *pullback(in_context_order(dy)))]

    expected = with_gradients("xla", q, k, v, dy)
    with jax.set_mesh(make_mesh(MeshConfig(context=4, tensor=2))):
        found = with_gradients("splash", q, k, v, dy)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-5)


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_shards_have_equally_many_blocks(shards):
    steps = 128 * 2 * shards * 2
    with jax.set_mesh(make_mesh(MeshConfig(context=shards))):
        places = in_context_order(np.arange(steps)[None]).reshape(shards, -1)
    assert (np.sort(places.ravel()) == np.arange(steps)).all()
    with patch.object(flash, "SPLASH_BLOCKS", (128,)):
        kernel = flash.shard_kernels(places)
    for info in (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info):
        visited = np.asarray(info.block_mask > 0).reshape(shards, -1).sum(1)
        assert (visited == 8 * shards + 2).all()


def test_scores_of_all_exits_are_those_of_one_device():
    options = dict(dtype="float32", micro_batches=2, attention="auto", kernels="auto")
    model = first_state(CONFIG).model
    expected = exit_sums(model, BATCH, **options)
    mesh = make_mesh(MeshConfig(data=2, context=4))
    with jax.set_mesh(mesh):
        found = exit_sums(placed(model, mesh), placed(BATCH, mesh), **options)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    assert (found[1] == expected[1]).all() and found[2] == expected[2]


@pytest.mark.parametrize("kernel", ["flash", "cudnn"])
def test_kernels_of_gpus_are_refused(kernel):
    q = jnp.zeros((1, 256, 2, 16), jnp.bfloat16)
    with (
        jax.set_mesh(make_mesh(MeshConfig(context=2))),
        pytest.raises(ConfigError, match="can't shard positions over mesh.context 2: use auto"),
    ):
        self_attention(q, q, q, kernel=kernel)


def test_a_batch_in_context_order():
    with jax.set_mesh(make_mesh(MeshConfig(context=2))):
        found = jax.jit(over_context)({"tokens_BT": np.arange(8, dtype=np.int32)[None]})
    assert found["tokens_BT"].tolist() == [[0, 1, 6, 7, 2, 3, 4, 5]]
