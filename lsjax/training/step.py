"""One training step (gradients of the objective, then the optimizer), and the training state."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from lsjax.config import StepConfig, TrainConfig, check
from lsjax.model.exit_blocks import with_exit_blocks
from lsjax.model.llama import Llama, stacked
from lsjax.model.lora import joined, split, with_adapters
from lsjax.model.matrices import cast_matrices
from lsjax.model.parameters import placed_shapes, shardings
from lsjax.platforms import with_kernels
from lsjax.sharding import ROWS, split_rows
from lsjax.training.block_loss import block_objective, drafted_labels
from lsjax.training.early_exit import ExitLoss, ExitWeights, exit_weights
from lsjax.training.layer_dropout import DropRates, drop_rates
from lsjax.training.loss import objective
from lsjax.training.optimizer import adamw, learning_rates, unless_skipped
from lsjax.training.recipe import Recipe

Batch = dict[str, Array]  # tokens_BT, labels_BT, segments_BT, positions_BT
Metrics = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """State that a step changes."""

    model: Llama  # stacked
    opt_state: optax.OptState
    step: Int[Array, ""]  # steps done, including skipped ones
    skipped: Int[Array, ""]  # steps whose loss or gradient was not finite
    skipped_in_a_row: Int[Array, ""]  # skipped steps in a row, up to now

    def __repr__(self) -> str:
        size = sum(leaf.size for leaf in jax.tree.leaves(self.model))
        return f"TrainState(step {self.step}, skipped {self.skipped}, {size / 1e6:.1f}M parameters)"


def init_state(
    config: StepConfig, model: Llama, optimizer: optax.GradientTransformation | None = None
) -> TrainState:
    """State before the first step. It shares the model's arrays, and steps overwrite them.

    With `lora` the model gets adapters, with `exit_blocks` blocks, and only these are trained.
    Other blocks are dropped. Matrices that blocks hang off have the dtype of the computation, as
    their values do not change. model: stacked or not. optimizer: that of `make_train_step`. Raises
    ConfigError if config and model do not fit.
    """
    config.check_model(model.config)
    model = stacked(model)
    if config.lora.rank > 0:
        model = with_adapters(model, config.lora, config.seed)
    blocks = config.exit_blocks
    model = with_exit_blocks(
        model,
        blocks.exits,
        feed_forward=blocks.feed_forward,
        start=blocks.start,
        seed=config.seed,
    )
    if blocks.exits:
        trained, frozen = split(model)
        model = joined(trained, cast_matrices(frozen, config.dtype))
    optimizer = optimizer or adamw(config.optimizer, config.num_steps)
    # Some optimizers keep the parameters themselves, but a step donates each array once.
    own = {id(leaf) for leaf in jax.tree.leaves(model)}
    opt_state = jax.tree.map(
        lambda leaf: jnp.copy(leaf) if id(leaf) in own else leaf,
        optimizer.init(split(model)[0]),
    )
    step, skipped, in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))  # all are donated
    return TrainState(model, opt_state, step, skipped, in_a_row)


def abstract_state(
    config: TrainConfig, mesh: Mesh | None, optimizer: optax.GradientTransformation | None = None
) -> TrainState:
    """Shapes of the state, with shardings on a mesh."""
    state = jax.eval_shape(partial(_fresh_state, config, optimizer), jax.random.key(0))
    dtypes = (leaf.dtype for leaf in jax.tree.leaves(state.opt_state))
    check(
        not any(jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) for dtype in dtypes),
        "the optimizer's state holds a random key of JAX's new type, which can't be saved: use an "
        "optimizer without noise, or with a key of jax.random.PRNGKey",
    )
    return placed_shapes(state, mesh)


def initial_state(
    config: TrainConfig,
    mesh: Mesh | None,
    like: TrainState,
    optimizer: optax.GradientTransformation | None = None,
    check_loaded: Callable[[Llama], None] = lambda model: None,
) -> TrainState:
    """State before the first step, sharded: from the checkpoint in `init_from`, or random.
    like: its `abstract_state`. check_loaded: called with the model of the checkpoint. Raises
    CheckpointError for a bad checkpoint."""
    places = None if mesh is None else shardings(like, mesh)
    if not config.init_from:
        fresh = jax.jit(partial(_fresh_state, config, optimizer), out_shardings=places)
        return fresh(jax.random.key(config.seed))
    from lsjax.checkpoints import load  # training alone needs no file readers

    begin = partial(init_state, config, optimizer=optimizer)
    model = stacked(load(config.init_from, mesh=mesh))
    check_loaded(model)
    return jax.jit(begin, out_shardings=places, donate_argnums=0)(model)


def _fresh_state(
    config: TrainConfig, optimizer: optax.GradientTransformation | None, key: jax.Array
) -> TrainState:
    return init_state(config, Llama(config.model, rngs=nnx.Rngs(key)), optimizer)


def check_rows(config: TrainConfig, mesh: Mesh | None) -> None:
    """Raises ConfigError if the devices that shard rows do not divide a micro-batch, or those that
    shard positions do not divide a row."""
    if mesh is None:
        return
    rows = config.batch_size // config.micro_batches
    shards = math.prod(mesh.shape[name] for name in ROWS)
    check(
        rows % shards == 0,
        f"{rows} rows (batch_size / micro_batches) can't be sharded over {shards} devices "
        f"(mesh.data x mesh.fsdp): choose a multiple of {shards}",
    )
    context = mesh.shape["context"]
    check(
        context == 1 or config.seq_len % (2 * context) == 0,
        f"rows of {config.seq_len} tokens can't be sharded over mesh.context {context}: choose a "
        f"seq_len that is a multiple of {2 * context}",
    )


def make_train_step(
    config: StepConfig,
    *,
    optimizer: optax.GradientTransformation | None = None,
    drop_rates: DropRates = drop_rates,
    exit_weights: ExitWeights = exit_weights,
    exit_loss: ExitLoss | None = None,
    draft_ids: Int[ArrayLike, " W"] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The compiled step (state, batch) -> (state, metrics), which reuses the state's memory.

    docs/extending.md explains the functions. A step whose loss, gradient or update is not finite
    changes only counters and the counts of schedules. Metrics: loss (of the objective),
    last_exit_loss, exit_loss_L, enabled_L, grad_norm (before the optimizer), learning_rate, tokens
    (labels), skipped, skipped_in_a_row. Exit E has index E - 1. The loss of disabled exits is 0.
    With exit blocks, exits are theirs alone. Raises ConfigError for remat "auto".

    Args:
      optimizer: replaces that of `config.optimizer`, in `init_state` too.
      drop_rates: replaces the paper's rates of layer dropout.
      exit_weights: replaces curriculum and weights of the exits, before normalisation (eq. 6).
      exit_loss: loss of the exits below the last; by default that of the config's target.
      draft_ids: ids of `exit_blocks.draft_vocab`, in ascending order.
    """
    check(
        config.remat != "auto",
        "remat 'auto' is chosen by train.py and lsjax.train: name a policy for make_train_step",
    )
    config.exit_blocks.check_ids(draft_ids)
    recipe = Recipe(optimizer, drop_rates, exit_weights, exit_loss)
    moves = optax.with_extra_args_support(optimizer or adamw(config.optimizer, config.num_steps))

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        recipe.check(config, state.model.config.num_layers)
        ids_W = None if draft_ids is None else jnp.asarray(draft_ids)
        num_labels = (drafted_labels(batch["labels_BT"], ids_W) >= 0).sum()
        with with_kernels(config.kernels):
            given = config, recipe, state, batch, num_labels, ids_W
            (loss, sums_L), gradients = loss_and_gradients(*given)
        grad_norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        model, opt_state, finite = moved(recipe, moves, state, gradients, loss, finite)
        skipped = jnp.where(finite, state.skipped, state.skipped + 1)
        in_a_row = jnp.where(finite, 0, state.skipped_in_a_row + 1)
        metrics = dict(
            loss=loss,
            **exit_metrics(config, recipe, sums_L / jnp.maximum(num_labels, 1), state.step),
            grad_norm=grad_norm,
            **rate_metrics(config, recipe, state.step, opt_state),
            tokens=num_labels,
            skipped=skipped,
            skipped_in_a_row=in_a_row,
        )
        return TrainState(model, opt_state, state.step + 1, skipped, in_a_row), metrics

    return train_step


@jax.named_scope("optimizer")
def moved(
    recipe: Recipe,
    moves: optax.GradientTransformationExtraArgs,
    state: TrainState,
    gradients: Llama,
    loss: Float[Array, ""],
    finite: Bool[Array, ""],
) -> tuple[Llama, optax.OptState, Bool[Array, ""]]:
    """The model and the optimizer's state after the update, and whether all is finite. If not, the
    parameters stay as they are."""
    before, frozen = split(state.model)
    # Some optimizers want the value of the loss.
    updates, opt_state = moves.update(gradients, state.opt_state, before, value=loss)
    if recipe.optimizer is not None:  # AdamW's updates are finite if the gradients are
        finite &= jnp.isfinite(optax.tree.norm(updates))
    new = optax.apply_updates(before, updates), opt_state
    after, opt_state = unless_skipped(finite, new, (before, state.opt_state))
    return joined(after, frozen), opt_state, finite


def exit_metrics(
    config: StepConfig, recipe: Recipe, exit_loss_L: Float[Array, " L"], step: Int[Array, ""]
) -> Metrics:
    """The losses of all exits, that of the last one, and which exits are enabled."""
    if config.exit_blocks.exits:
        layers = jnp.arange(1, len(exit_loss_L) + 1)
        blocks_L = jnp.isin(layers, jnp.array(config.exit_blocks.exits))
        return dict(exit_loss_L=exit_loss_L, enabled_L=blocks_L)
    run = config.early_exit, len(exit_loss_L), step, config.num_steps
    enabled_L = jnp.asarray(recipe.exit_weights(*run) > 0)
    return dict(last_exit_loss=exit_loss_L[-1], exit_loss_L=exit_loss_L, enabled_L=enabled_L)


def rate_metrics(
    config: StepConfig, recipe: Recipe, step: Int[Array, ""], opt_state: optax.OptState
) -> Metrics:
    """The learning rate of this step, if it is known. opt_state: after the step."""
    if recipe.optimizer is None:
        return {"learning_rate": learning_rates(config.optimizer, config.num_steps)(step)}
    found = optax.tree_utils.tree_get_all_with_path(
        opt_state, "learning_rate", lambda _, value: isinstance(value, jax.Array)
    )
    return {"learning_rate": found[0][1]} if len(found) == 1 else {}


def loss_and_gradients(
    config: StepConfig,
    recipe: Recipe,
    state: TrainState,
    batch: Batch,
    num_labels: Int[Array, ""],
    draft_ids: Int[Array, " W"] | None = None,
) -> tuple[tuple[Float[Array, ""], Float[Array, " L"]], Llama]:
    """(loss, per-exit sums) and gradients of the trained parameters, over all micro-batches."""
    rows_B = jnp.arange(len(batch["tokens_BT"]))
    config.check_batch(len(rows_B))
    trained, frozen = split(state.model)

    def loss(trained, part, rows_B):
        model = joined(trained, frozen)
        given = config, model, part, state.step
        if config.exit_blocks.exits:
            return block_objective(*given, num_labels, recipe.exit_loss, draft_ids)
        return objective(*given, rows_B, num_labels, recipe)

    one = partial(jax.value_and_grad(loss, has_aux=True), trained)
    if config.micro_batches == 1:
        return one(batch, rows_B)
    split_batch = split_rows((batch, rows_B), config.micro_batches)
    shapes = jax.eval_shape(one, *jax.tree.map(lambda leaf: leaf[0], split_batch))
    zeros = jax.tree.map(jnp.zeros_like, shapes)

    def add(total, part):
        return jax.tree.map(jnp.add, total, one(*part)), None

    return lax.scan(add, zeros, split_batch)[0]
