"""The optimizer of a configuration, and steps that it skips."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from lsjax.config import OptimizerConfig
from lsjax.model.parameters import map_named


def adamw(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """AdamW with clipping by the norm of all gradients, and the schedule over T steps."""
    clip = config.clip_norm
    return optax.chain(
        optax.identity() if clip is None else optax.clip_by_global_norm(clip),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.scale_by_learning_rate(learning_rates(config, num_steps)),
    )


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


def decays(params):
    """True for matrices and tables, False for the scales of norms and for biases."""
    return map_named(lambda name, _: not name.endswith(("scale", "bias")), params)


# States of optax that count steps for a schedule, with the updates of other states inside or not.
_INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)
_SCHEDULES = (optax.ScaleByScheduleState, *_INJECTED)


def unless_skipped(finite: Bool[Array, ""], new: Any, old: Any) -> Any:
    """The new tree if the step's loss and gradient are finite. Otherwise the old one, but for the
    steps that schedules have counted."""

    def choose(new: Any, old: Any) -> Any:
        if isinstance(new, _INJECTED):
            return new._replace(inner_state=chosen(new.inner_state, old.inner_state))
        return new if isinstance(new, _SCHEDULES) else jnp.where(finite, new, old)

    chosen = partial(jax.tree.map, choose, is_leaf=lambda part: isinstance(part, _SCHEDULES))
    return chosen(new, old)
