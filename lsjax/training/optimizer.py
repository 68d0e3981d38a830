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
        optax.identity() if clip is None else clipping(clip),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.scale_by_learning_rate(learning_rates(config, num_steps)),
    )


def clipping(most: float) -> optax.GradientTransformation:
    """Clipping by the norm of all gradients, by one factor. `optax.clip_by_global_norm` divides
    each number instead, which takes 3% of a training step on a CPU."""

    def update(gradients, params=None):
        factor = jnp.minimum(1, most / jnp.maximum(optax.tree.norm(gradients), 1e-30))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), gradients)

    return optax.stateless(update)


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


# States of optax whose hyperparameters follow schedules, around the state of an optimizer.
_INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)


def unless_skipped(finite: Bool[Array, ""], new: Any, old: Any) -> Any:
    """The new tree if the step's loss and gradient are finite. Otherwise the old one, but for the
    steps that schedules have counted."""

    def choose(new: Any, old: Any) -> Any:
        if counts_steps(new):
            return new
        if isinstance(new, _INJECTED):
            inner_state = unless_skipped(finite, new.inner_state, old.inner_state)
            return new._replace(inner_state=inner_state)
        return jax.tree.map(partial(jnp.where, finite), new, old)

    return jax.tree.map(choose, new, old, is_leaf=has_schedules)


def counts_steps(state: Any) -> bool:
    """Whether this is the state of a schedule: it has nothing but a count."""
    return getattr(state, "_fields", None) == ("count",)


def has_schedules(state: Any) -> bool:
    """Whether `choose` knows the whole state. Steps of MultiSteps count as they are applied."""
    return counts_steps(state) or isinstance(state, (*_INJECTED, optax.MultiStepsState))
