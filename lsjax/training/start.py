"""The state that a run begins with."""

import math
from functools import partial

import jax
from flax import nnx
from jax.sharding import Mesh

from lsjax.checkpoints import load
from lsjax.config import TrainConfig, check
from lsjax.model.llama import Llama, stacked
from lsjax.sharding import ROWS, shardings
from lsjax.training.step import TrainState, init_state


def check_rows(config: TrainConfig, mesh: Mesh | None) -> None:
    """Raises ConfigError where the devices that share out rows do not divide a micro-batch."""
    if mesh is None:
        return
    rows = config.batch_size // config.micro_batches
    shards = math.prod(mesh.shape[name] for name in ROWS)
    check(
        rows % shards == 0,
        f"{rows} rows (batch_size / micro_batches) can't be shared out among {shards} devices "
        f"(mesh.data x mesh.fsdp): choose a multiple of {shards}",
    )


def abstract_state(config: TrainConfig, mesh: Mesh | None) -> TrainState:
    """Shapes of the state, with where they lie on a mesh."""
    like = jax.eval_shape(partial(_fresh_state, config), jax.random.key(0))
    if mesh is None:
        return like
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        like,
        shardings(like, mesh),
    )


def initial_state(config: TrainConfig, mesh: Mesh | None, like: TrainState) -> TrainState:
    """The state before the first step: of the checkpoint in `init_from`, or random; made where it
    belongs.

    like: its `abstract_state`. Raises CheckpointError for what is wrong with the checkpoint.
    """
    places = None if mesh is None else shardings(like, mesh)
    if not config.init_from:
        fresh = jax.jit(partial(_fresh_state, config), out_shardings=places)
        return fresh(jax.random.key(config.seed))
    model = stacked(load(config.init_from, mesh=mesh))
    return jax.jit(partial(init_state, config), out_shardings=places, donate_argnums=0)(model)


def _fresh_state(config: TrainConfig, key: jax.Array) -> TrainState:
    return init_state(config, Llama(config.model, rngs=nnx.Rngs(key)))
