"""One training step (gradients of the objective, AdamW), and the training state."""

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
from jaxtyping import Array, Float, Int

from lsjax.config import OptimizerConfig, StepConfig, TrainConfig, check
from lsjax.model.llama import Llama, stacked
from lsjax.model.lora import joined, split, with_adapters
from lsjax.model.parameters import map_named, placed_shapes, shardings
from lsjax.platforms import with_kernels
from lsjax.sharding import ROWS, split_rows
from lsjax.training.early_exit import ExitLoss, enabled_exits
from lsjax.training.layer_dropout import DropRates, drop_rates
from lsjax.training.loss import objective

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


def init_state(config: StepConfig, model: Llama) -> TrainState:
    """State before the first step. It shares the model's arrays, and steps overwrite them. With
    `lora` the model gets adapters, and only these are trained. model: stacked or not. Raises
    ConfigError if config and model do not fit."""
    config.check_model(model.config)
    model = stacked(model)
    if config.lora.rank > 0:
        model = with_adapters(model, config.lora, config.seed)
    opt_state = directions(config.optimizer).init(split(model)[0])
    step, skipped, in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))  # all are donated
    return TrainState(model, opt_state, step, skipped, in_a_row)


def abstract_state(config: TrainConfig, mesh: Mesh | None) -> TrainState:
    """Shapes of the state, with shardings on a mesh."""
    return placed_shapes(jax.eval_shape(partial(_fresh_state, config), jax.random.key(0)), mesh)


def initial_state(config: TrainConfig, mesh: Mesh | None, like: TrainState) -> TrainState:
    """State before the first step, sharded: from the checkpoint in `init_from`, or random.
    like: its `abstract_state`. Raises CheckpointError for a bad checkpoint."""
    places = None if mesh is None else shardings(like, mesh)
    if not config.init_from:
        fresh = jax.jit(partial(_fresh_state, config), out_shardings=places)
        return fresh(jax.random.key(config.seed))
    from lsjax.checkpoints import load  # training alone needs no file readers

    model = stacked(load(config.init_from, mesh=mesh))
    return jax.jit(partial(init_state, config), out_shardings=places, donate_argnums=0)(model)


def _fresh_state(config: TrainConfig, key: jax.Array) -> TrainState:
    return init_state(config, Llama(config.model, rngs=nnx.Rngs(key)))


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
    exit_loss: ExitLoss | None = None,
    drop_rates: DropRates = drop_rates,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The compiled step (state, batch) -> (state, metrics), which reuses the state's memory.

    exit_loss: loss of the exits below the last one (early_exit.py); by default that of the config's
    target. drop_rates: replaces the paper's rates of layer dropout, if p_max is not 0.

    A step whose loss or gradient is not finite changes only the counters. Metrics: loss (of the
    objective), last_exit_loss, exit_loss_L, enabled_L, grad_norm, learning_rate, tokens, skipped,
    skipped_in_a_row. Exit E has index E - 1, and exit_loss_L is 0 for disabled exits. grad_norm is
    measured before clipping. tokens counts labels. Raises ConfigError for remat "auto".
    """
    check(
        config.remat != "auto",
        "remat 'auto' is chosen by train.py and lsjax.train: name a policy for make_train_step",
    )
    optimizer = directions(config.optimizer)
    schedule = learning_rates(config.optimizer, config.num_steps)
    knobs = dict(exit_loss=exit_loss, drop_rates=drop_rates)

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        num_labels = (batch["labels_BT"] >= 0).sum()
        with with_kernels(config.kernels):
            found = loss_and_gradients(config, state, batch, num_labels, **knobs)
        (loss, sums_L), gradients = found
        with jax.named_scope("optimizer"):
            grad_norm = optax.tree.norm(gradients)
            finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
            if config.optimizer.clip_norm is not None:
                shrink = jnp.minimum(1, config.optimizer.clip_norm / jnp.maximum(grad_norm, 1e-30))
                gradients = jax.tree.map(lambda g: g * shrink.astype(g.dtype), gradients)
            learning_rate = schedule(state.step)
            before, frozen = split(state.model)
            updates, opt_state = optimizer.update(gradients, state.opt_state, before)
            after = jax.tree.map(
                lambda leaf, move: leaf - learning_rate.astype(leaf.dtype) * move, before, updates
            )
            new, old = (after, opt_state), (before, state.opt_state)
            after, opt_state = jax.tree.map(partial(jnp.where, finite), new, old)
        skipped = jnp.where(finite, state.skipped, state.skipped + 1)
        in_a_row = jnp.where(finite, 0, state.skipped_in_a_row + 1)
        metrics = dict(
            loss=loss,
            **exit_metrics(config, sums_L / jnp.maximum(num_labels, 1), state.step),
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            tokens=num_labels,
            skipped=skipped,
            skipped_in_a_row=in_a_row,
        )
        model = joined(after, frozen)
        return TrainState(model, opt_state, state.step + 1, skipped, in_a_row), metrics

    return train_step


def exit_metrics(
    config: StepConfig, exit_loss_L: Float[Array, " L"], step: Int[Array, ""]
) -> Metrics:
    """The losses of all exits, that of the last one, and which exits are enabled."""
    enabled_L = enabled_exits(config.early_exit, len(exit_loss_L), step, config.num_steps)
    return dict(last_exit_loss=exit_loss_L[-1], exit_loss_L=exit_loss_L, enabled_L=enabled_L)


def loss_and_gradients(
    config: StepConfig, state: TrainState, batch: Batch, num_labels: Int[Array, ""], **knobs
):
    """Loss, per-exit sums and gradients of the trained parameters, over all micro-batches. knobs:
    `exit_loss` and `drop_rates`, passed to `objective`."""
    rows_B = jnp.arange(len(batch["tokens_BT"]))
    config.check_batch(len(rows_B))
    trained, frozen = split(state.model)

    def loss(trained, part, rows_B):
        model = joined(trained, frozen)
        return objective(config, model, part, state.step, rows_B, num_labels, **knobs)

    one = partial(jax.value_and_grad(loss, has_aux=True), trained)
    if config.micro_batches == 1:
        return one(batch, rows_B)
    split_batch = split_rows((batch, rows_B), config.micro_batches)
    shapes = jax.eval_shape(one, *jax.tree.map(lambda leaf: leaf[0], split_batch))
    zeros = jax.tree.map(jnp.zeros_like, shapes)

    def add(total, part):
        return jax.tree.map(jnp.add, total, one(*part)), None

    return lax.scan(add, zeros, split_batch)[0]


def learning_rates(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate at step t of T: rises in the warm-up, then follows the schedule. Warm-up
    starts at the peak over `warmup_steps + 1`, because a rate of 0 would waste step 0."""
    peak, final = config.learning_rate, config.learning_rate * config.final_share
    steps = max(1, num_steps - config.warmup_steps)
    match config.schedule:
        case "constant":
            after = optax.constant_schedule(peak)
        case "cosine":
            after = optax.cosine_decay_schedule(peak, steps, config.final_share)
        case "linear":
            after = optax.linear_schedule(peak, final, steps)
    up = config.warmup_steps + 1
    warmup = optax.linear_schedule(peak / up, peak, config.warmup_steps) if up > 1 else after
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def directions(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW without its learning rate; the step multiplies by the rate."""
    return optax.chain(
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
    )


def decays(params):
    """True for matrices and tables, False for the scales of norms and for biases."""
    return map_named(lambda name, _: not name.endswith(("scale", "bias")), params)
