"""Exported exit blocks: their weights and their base are checked before they draft."""

import json
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import lsjax
from lsjax.checkpoints.exit_blocks import (
    BASE,
    DTYPES,
    ExitBlocksRun,
    base_fingerprint,
    check_base,
)
from lsjax.checkpoints.exported_blocks import SETTINGS, save_exit_blocks
from lsjax.checkpoints.huggingface import SINGLE
from lsjax.checkpoints.run import METRICS
from lsjax.cli import engines
from lsjax.cli.flags.shared import ModelFlags
from lsjax.config import ExitBlocksConfig, LlamaConfig
from lsjax.config.checked import VERSION
from lsjax.data.token_counts import COUNTS
from lsjax.data.tokenizer_backends import ByteTokenizer
from lsjax.model.exit_blocks import with_exit_blocks
from lsjax.model.llama import Llama
from lsjax.model.parameters import named_leaves

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base and its exported blocks."""
    folder = tmp_path_factory.mktemp("blocks")
    config = LlamaConfig.tiny(num_layers=3)
    base = jax.jit(lambda: Llama(config, rngs=nnx.Rngs(0)))()
    lsjax.save(base, folder / "base", tokenizer=ByteTokenizer())
    run = object.__new__(ExitBlocksRun)  # without steps: an export reads its files only
    run.path = folder / "run"
    run.path.mkdir()
    settings = (VERSION, asdict(config), asdict(ExitBlocksConfig(exits=(1,))), "base")
    (run.path / "config.json").write_text(json.dumps(dict(zip(SETTINGS, settings, strict=True))))
    prints = {name: base_fingerprint(base, jnp.dtype(name)) for name in DTYPES}
    (run.path / BASE).write_text(json.dumps({"path": str(folder / "base"), **prints}))
    (run.path / COUNTS).write_text("{}")
    row = {"kind": "evaluation", "step": 1, "loss_E": [3, 2, 1], "agreement_E": [0.4, 0.5, 1.0]}
    (run.path / METRICS).write_text(json.dumps(row) + "\n")
    run.step = 1
    blocks = with_exit_blocks(base, (1,))
    save_exit_blocks(blocks, run, folder / "blocks", ByteTokenizer(), "a card")
    return folder


@pytest.fixture
def blocks(folder, tmp_path):
    """A copy of the blocks, to damage."""
    (tmp_path / "blocks").mkdir()
    for file in (folder / "blocks").iterdir():
        (tmp_path / "blocks" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "blocks"


def test_blocks_know_how_often_they_were_right(folder, blocks):
    """`auto` begins with that, not with what the base says of its exits."""
    generation = lsjax.GenerationDefaults(agreement_E=(0.1, 0.2, 1.0))
    base = folder / "measured"
    lsjax.save(lsjax.load(folder / "base"), base, tokenizer=ByteTokenizer(), generation=generation)
    opened = engines.open_model(ModelFlags(model=base, exit_blocks=blocks))
    assert engines.measured_agreement(opened, (1,)) == (0.4,)
    opened = engines.open_model(ModelFlags(model=base))
    assert engines.measured_agreement(opened, (1, 2)) == (0.1, 0.2)


def test_whole_blocks_are_read(folder, blocks):
    found = lsjax.load(folder / "base", exit_blocks=blocks)
    tensor = load_file(blocks / SINGLE)[NAME]
    np.testing.assert_array_equal(
        np.moveaxis(named_leaves(found)["exit_blocks.1.feed_forward.gate_up.kernel"][:, 1], 0, -1),
        tensor,
    )


@pytest.mark.parametrize("dtype, said", [(np.int32, "I32"), (np.bool_, "BOOL")])
def test_weights_that_are_no_floats_are_refused(folder, blocks, dtype, said):
    tensors = load_file(blocks / SINGLE)
    save_file(tensors | {NAME: tensors[NAME].astype(dtype)}, blocks / SINGLE)
    with pytest.raises(lsjax.CheckpointError, match=f"tensor '{NAME}' has the dtype {said}, not"):
        lsjax.load(folder / "base", exit_blocks=blocks)


@pytest.mark.parametrize("content", [{}, {"path": "base"}])
def test_a_missing_fingerprint_is_refused(folder, blocks, content):
    (blocks / BASE).write_text(json.dumps(content))
    with pytest.raises(lsjax.CheckpointError, match=r"base.json: has no .*: restore the file"):
        lsjax.load(folder / "base", exit_blocks=blocks)
    model = lsjax.load(folder / "base")
    with pytest.raises(lsjax.CheckpointError, match=r"base.json: has no .*: restore the file"):
        check_base(blocks, str(folder / "base"), model, may_write=True)
