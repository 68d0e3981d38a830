"""The state that a run begins with, and what may change where it resumes."""

import dataclasses
import math
from functools import partial

import jax
from flax import nnx
from jax.sharding import Mesh

from lsjax.checkpoints import load
from lsjax.config import TrainConfig, check
from lsjax.config.checked import differences
from lsjax.model.llama import Llama, stacked
from lsjax.model.parameters import placed_shapes, shardings
from lsjax.sharding import ROWS
from lsjax.training.step import TrainState, init_state

# Fields that a run may change: how steps are computed, saved and shown, not their results.
FREE = frozenset(
    {
        "mesh",
        "checkpoints",
        "evaluation",
        "tensorboard",
        "max_skipped",
        "micro_batches",
        "remat",
        "attention",
        "dtype",
        "init_from",
        # Where the data and the tokenizer lie. Their contents are compared by their fingerprints.
        "data.paths",
        "data.validation_paths",
        "data.tfds_data_dir",
        "data.tokenizer",
        # Of a model that has begun to learn:
        "model.init_std",
        "model.scaled_init",
        "model.max_context",
    }
)


def check_rows(config: TrainConfig, mesh: Mesh | None) -> None:
    """Raises ConfigError where the devices that shard rows do not divide a micro-batch."""
    if mesh is None:
        return
    rows = config.batch_size // config.micro_batches
    shards = math.prod(mesh.shape[name] for name in ROWS)
    check(
        rows % shards == 0,
        f"{rows} rows (batch_size / micro_batches) can't be sharded over {shards} devices "
        f"(mesh.data x mesh.fsdp): choose a multiple of {shards}",
    )


def abstract_state(config: TrainConfig, mesh: Mesh | None) -> TrainState:
    """Shapes of the state, with shardings on a mesh."""
    like = jax.eval_shape(partial(_fresh_state, config), jax.random.key(0))
    return like if mesh is None else placed_shapes(like, mesh)


def initial_state(config: TrainConfig, mesh: Mesh | None, like: TrainState) -> TrainState:
    """The state before the first step: of the checkpoint in `init_from`, or random.

    It is made sharded. like: its `abstract_state`. Raises CheckpointError for what is wrong with
    the checkpoint.
    """
    places = None if mesh is None else shardings(like, mesh)
    if not config.init_from:
        fresh = jax.jit(partial(_fresh_state, config), out_shardings=places)
        return fresh(jax.random.key(config.seed))
    model = stacked(load(config.init_from, mesh=mesh))
    return jax.jit(partial(init_state, config), out_shardings=places, donate_argnums=0)(model)


def _fresh_state(config: TrainConfig, key: jax.Array) -> TrainState:
    return init_state(config, Llama(config.model, rngs=nnx.Rngs(key)))


def check_same_run(before: TrainConfig, now: TrainConfig, where: str) -> TrainConfig:
    """The configuration to resume with; its model is that of the run.

    Raises ConfigError for the first field that makes it another run: schedules are stretched over
    num_steps, and the order of the data follows from the seed.
    """
    if now.model is None:
        now = dataclasses.replace(now, model=before.model)
    for path, old, new in differences(dataclasses.asdict(before), dataclasses.asdict(now)):
        check(
            path in FREE or path.partition(".")[0] in FREE,
            f"{where} was begun with {path} {old}, now it is {new}: a run can't change it; take "
            "another --workdir, or the value of before",
        )
    return dataclasses.replace(now, model=before.model)
