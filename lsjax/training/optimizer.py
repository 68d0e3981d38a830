"""AdamW and the schedule of its learning rate, by optax."""

import jax
import optax

from lsjax.config import OptimizerConfig


def learning_rates(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate at step t of T: up from 0 over the warm-up, then as the schedule says; the
    first step is already one of `warmup_steps + 1` up, so that it does something."""
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
    """AdamW up to the learning rate, which the step multiplies by."""
    return optax.chain(
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
    )


def decays(params):
    """True for matrices and tables, False for the scales of norms and for biases."""

    def one(path, _):
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        return not name.endswith(("scale", "bias"))

    return jax.tree_util.tree_map_with_path(one, params)
