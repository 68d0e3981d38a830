"""Runs of exit blocks: their steps hold the blocks, and base.json says which model these belong to.

A base is known by its values, not by its path: it may move, and change its file format. Decoding in
a narrower dtype rounds the values, so base.json has a fingerprint for each dtype.
"""

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array

from lsjax.checkpoints.narrowing import Change, to_float
from lsjax.checkpoints.run import RunSource, is_finite
from lsjax.checkpoints.steps import EXIT_BLOCKS, PARAMS, SavedStep, fingerprints, first_whole
from lsjax.checkpoints.tensors import NOT_FINITE, CheckpointError, Track
from lsjax.config import AnyPath, ExitBlocksConfig, LlamaConfig, as_path, check
from lsjax.config.checked import from_json
from lsjax.io.files import read_json, write_json
from lsjax.model.exit_blocks import with_exit_blocks, without_exit_blocks
from lsjax.model.int8 import Rounded
from lsjax.model.llama import Llama
from lsjax.model.parameters import named_leaves, sharding_of

BASE = "base.json"
DTYPES = ("float32", "bfloat16", "float16")


class BlocksSource:
    """Exit blocks that are opened with the model that they hang off."""

    path: AnyPath
    settings: dict[str, Any]  # of the run that trained them
    config: LlamaConfig

    def hang_off(self, base: Any) -> None:
        """Takes the base, an opened checkpoint. Raises ConfigError if it has other layers."""
        check(
            base.config.num_layers == self.config.num_layers,
            f"{base.path} has {base.config.num_layers} layers, but the exit blocks of {self.path} "
            f"belong to a model with {self.config.num_layers}: name their base",
        )
        self.base = base
        where = f"{self.path}: exit_blocks"
        self.blocks = from_json(ExitBlocksConfig, self.settings.get("exit_blocks"), where)
        self.early_exit = {"curriculum": "subset", "exits": self.blocks.exits}

    def shape(self, dtype: DTypeLike) -> Llama:
        """The shapes of the base with its blocks."""
        own = self.blocks
        make = partial(with_exit_blocks, exits=own.exits, feed_forward=own.feed_forward)
        return jax.eval_shape(make, without_exit_blocks(self.base.shape(dtype)))

    def leaves(
        self, *, dtype: jnp.dtype, track: Track, mesh: Mesh | None, change: Change
    ) -> dict[str, Array]:
        """The parameters of the base and of the blocks by path, each changed at once. Raises
        CheckpointError."""
        seen: dict[str, str] = {}

        def noted(path: str, array: Array | Rounded) -> dict[str, Array]:
            if path.startswith(EXIT_BLOCKS):  # of a base that has its own
                return {}
            seen.update(fingerprints(to_float(dtype, path, array)))
            return change(path, array)

        found = self.base.leaves(dtype=dtype, track=track, mesh=mesh, change=noted)
        known = read_base(self.path, dtype.name)
        if known[dtype.name] != joined_fingerprint(seen):
            raise CheckpointError(
                f"{self.base.path} is not the model that the exit blocks of {self.path} were "
                f"trained for ({known['path']}): name that one, and --exit-blocks {self.path}"
            )
        shapes = {
            name: leaf.shape
            for name, leaf in named_leaves(self.shape(dtype)).items()
            if name.startswith(EXIT_BLOCKS)
        }
        for path, array in self.read_blocks(shapes, dtype, mesh).items():
            found |= change(path, array)
        return found

    def read_blocks(
        self, shapes: Mapping[str, tuple[int, ...]], dtype: jnp.dtype, mesh: Mesh | None
    ) -> dict[str, Array]:
        """The parameters of the blocks by path. Raises CheckpointError."""
        raise NotImplementedError


class ExitBlocksRun(BlocksSource, RunSource):
    """A run of exit blocks."""

    def __init__(self, directory: AnyPath, step: int | str | None, base: Any):
        super().__init__(directory, step)
        self.hang_off(base)

    def read_blocks(
        self, shapes: Mapping[str, tuple[int, ...]], dtype: jnp.dtype, mesh: Mesh | None
    ) -> dict[str, Array]:
        """Those of the first undamaged step."""
        return first_whole(self._steps, lambda step: self._of_step(step, shapes, dtype, mesh))[0]

    def _of_step(
        self,
        step: SavedStep,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: jnp.dtype,
        mesh: Mesh | None,
    ) -> dict[str, Array]:
        saved, wanted = step.meta["arrays"][PARAMS], {}
        for name, shape in shapes.items():
            stored = saved[name]["dtype"] if name in saved else dtype
            place = sharding_of(name, shape, mesh)
            wanted[name] = jax.ShapeDtypeStruct(shape, stored, sharding=place)
        step.check(PARAMS, wanted)
        arrays = step.read(PARAMS, wanted)
        for name in wanted:
            if not is_finite(arrays[name], dtype):
                where = f"{step.directory / PARAMS}: {name} has values that are "
                raise CheckpointError(where + NOT_FINITE.format(dtype.name))
        self.step = step.number
        return {name: arrays[name].astype(dtype) for name in wanted}


def base_fingerprint(model: Llama, dtype: Any) -> str:
    """Hash of the model's parameters in a dtype, without exit blocks. Takes one array, or one layer
    of it, at a time. On several hosts, all call it."""
    found = {}
    for path, leaf in named_leaves(without_exit_blocks(model)).items():
        parts = {path: leaf}
        if model.is_stacked and path.startswith("layers."):
            rest = path.removeprefix("layers.")
            parts = {f"layers.{index}.{rest}": leaf[index] for index in range(len(leaf))}
        for name, part in parts.items():
            found |= fingerprints({name: part.astype(dtype)})
    return joined_fingerprint(found)


def joined_fingerprint(found: Mapping[str, str]) -> str:
    """One hash of the fingerprints of all parameters, by path."""
    text = "\n".join(f"{name} {found[name]}" for name in sorted(found))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def read_base(directory: AnyPath, dtype: str) -> dict[str, str]:
    """The path of the base, and its fingerprint in a dtype. Raises CheckpointError if one is
    missing."""
    return read_json(directory / BASE, CheckpointError, needs=("path", dtype))


def check_base(directory: AnyPath, path: str, model: Llama, may_write: bool) -> None:
    """Notes the base of a new run. may_write: on one host. Raises ConfigError if the run began with
    another base, and CheckpointError if base.json is damaged."""
    check(
        as_path(path).resolve() != directory.resolve(),
        f"init_from {path} is the run itself: name the model that its blocks hang off",
    )
    file = directory / BASE
    before = read_base(directory, "float32") if file.exists() else {}
    now = {name: base_fingerprint(model, jnp.dtype(name)) for name in DTYPES}
    check(
        before.get("float32", now["float32"]) == now["float32"],
        f"init_from {path} is not the model that the exit blocks of {directory} hang off "
        f"({before.get('path')}): give that one, or begin a new run",
    )
    if may_write and not before:
        write_json(file, {"path": path, **now})
