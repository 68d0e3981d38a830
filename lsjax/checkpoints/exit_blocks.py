"""Runs of exit blocks: their steps hold the blocks, and base.json says which model these belong to.

A base is known by its values, not by its path: it may move, and change its file format. Decoding in
a narrower dtype rounds the values, so base.json has a fingerprint for each dtype.
"""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from lsjax.checkpoints.run import RunSource
from lsjax.checkpoints.steps import EXIT_BLOCKS, PARAMS, SavedStep, fingerprints
from lsjax.checkpoints.tensors import CheckpointError, Track
from lsjax.config import AnyPath, ConfigError, ExitBlocksConfig, check
from lsjax.config.checked import from_json
from lsjax.io.files import read_json, write_json
from lsjax.model.exit_blocks import with_exit_blocks, without_exit_blocks
from lsjax.model.llama import Llama, unstacked
from lsjax.model.parameters import named_leaves, sharding_of

BASE = "base.json"
DTYPES = ("float32", "bfloat16", "float16")


class ExitBlocksSource(RunSource):
    """A run of exit blocks, opened with the model that they hang off."""

    def __init__(self, directory: AnyPath, step: int | str | None, base: Any):
        super().__init__(directory, step)
        check(
            base.config.num_layers == self.config.num_layers,
            f"{base.path} has {base.config.num_layers} layers, but the exit blocks of {directory} "
            f"belong to a model with {self.config.num_layers}: name their base",
        )
        self.base = base
        where = f"{directory}: exit_blocks"
        self.blocks = from_json(ExitBlocksConfig, self.settings["exit_blocks"], where)
        self.early_exit = {"curriculum": "subset", "exits": self.blocks.exits}

    def _read(self, step: SavedStep, dtype: jnp.dtype, track: Track, mesh: Mesh | None) -> Llama:
        """The base with the blocks of a step."""
        model = self.base.assemble(dtype=dtype, track=track, mesh=mesh)
        known = read_json(self.path / BASE, CheckpointError)
        if known.get(dtype.name) != base_fingerprint(model, dtype):
            raise CheckpointError(
                f"{self.base.path} is not the model that the exit blocks of {self.path} were "
                f"trained for ({known['path']}): name that one"
            )
        own = self.blocks
        like = jax.eval_shape(
            lambda: with_exit_blocks(model, own.exits, feed_forward=own.feed_forward)
        )
        saved = step.meta["arrays"][PARAMS]
        wanted = {
            name: jax.ShapeDtypeStruct(
                leaf.shape,
                saved[name]["dtype"] if name in saved else dtype,
                sharding=sharding_of(name, leaf.shape, mesh),
            )
            for name, leaf in named_leaves(like).items()
            if name.startswith(EXIT_BLOCKS)
        }
        step.check(PARAMS, wanted)
        arrays = step.read(PARAMS, wanted)
        leaves = [arrays[name].astype(dtype) for name in wanted]
        blocks = jax.tree.unflatten(jax.tree.structure(like.exit_blocks), leaves)
        self.step = step.number
        model.exit_blocks = nnx.Dict(blocks)
        return model


def base_fingerprint(model: Llama, dtype: Any) -> str:
    """Hash of the model's parameters in a dtype, without exit blocks."""
    leaves = named_leaves(unstacked(without_exit_blocks(model)))
    found = fingerprints({name: leaf.astype(dtype) for name, leaf in leaves.items()})
    text = "\n".join(f"{name} {found[name]}" for name in sorted(found))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def check_base(directory: AnyPath, path: str, model: Llama, may_write: bool) -> None:
    """Notes the base of a new run. may_write: on one host. Raises ConfigError if the run began with
    another base."""
    now, file = base_fingerprint(model, jnp.float32), directory / BASE
    if file.exists():
        before = read_json(file, ConfigError)
        check(
            before["float32"] == now,
            f"init_from {path} is not the model that the exit blocks of {directory} hang off "
            f"({before['path']}): give that one, or begin a new run",
        )
    elif may_write:
        others = {name: base_fingerprint(model, jnp.dtype(name)) for name in DTYPES[1:]}
        write_json(file, {"path": path, "float32": now, **others})
