"""Layers computed only for the rows that keep them, on a mesh; run by test_eight_devices.py."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from flax import nnx

from lsjax.config import EarlyExitConfig, LayerDropoutConfig, LlamaConfig, MeshConfig, StepConfig
from lsjax.model.llama import Llama, stacked
from lsjax.model.parameters import placed
from lsjax.sharding import make_mesh
from lsjax.training import forward
from lsjax.training.kept_rows import keep_counted
from lsjax.training.step import init_state, make_train_step
from tests.long.batches import whole_rows

GATHER = StepConfig(
    num_steps=4,
    layer_dropout=LayerDropoutConfig(p_max=0.8, distribution="linear", skip="gather"),
    early_exit=EarlyExitConfig(curriculum="all"),
)
MASK = dataclasses.replace(
    GATHER, layer_dropout=dataclasses.replace(GATHER.layer_dropout, skip="mask")
)
SHAPE = LlamaConfig.tiny(num_layers=2)
TOKENS = np.random.default_rng(0).integers(0, 258, (32, 9), dtype=np.int32)
BATCH = whole_rows(TOKENS)


def step_on(mesh, config):
    """The compiled step, and what it makes of a first state."""
    make = jax.jit(lambda: init_state(config, stacked(Llama(SHAPE, rngs=nnx.Rngs(0)))))
    with jax.set_mesh(mesh):
        state, batch = placed(make(), mesh), placed(BATCH, mesh)
        program = make_train_step(config).lower(state, batch).compile()
        return program, program(state, batch)


@pytest.mark.parametrize("sizes", [MeshConfig(data=8), MeshConfig(data=2, fsdp=2, tensor=2)])
def test_a_step_is_that_of_the_same_masks_and_moves_no_rows(sizes, monkeypatch):
    program, (state, metrics) = step_on(make_mesh(sizes), GATHER)

    def counted_mask(rates_L, seed, step, rows_B):
        keep_LSR, _ = keep_counted(rates_L, seed, step, rows_B.reshape(sizes.data * sizes.fsdp, -1))
        return keep_LSR.reshape(len(rates_L), -1)

    monkeypatch.setattr(forward, "keep_mask", counted_mask)
    masked, (expected, expected_metrics) = step_on(make_mesh(sizes), MASK)
    np.testing.assert_allclose(metrics["exit_loss_L"], expected_metrics["exit_loss_L"], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], expected_metrics["grad_norm"], rtol=1e-4)
    if sizes == MeshConfig(data=8):  # sums of gradients and losses, none of rows
        found, allowed = collectives(program), collectives(masked)
        assert found <= allowed
        assert {kind for kind, _ in found} == {"all-reduce"}


def collectives(program) -> set[tuple[str, str]]:
    """Kinds of communication, and shapes of their results."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    lines = re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", program.as_text())
    return {(kind, shape) for text, kind in lines for shape in re.findall(r"\w+\[[\d,]*\]", text)}
