"""Early-exit loss (LayerSkip, 4.1.2): enabled exits, their weights, and their targets.

    J(t) = sum over exits E of w(t, E) CE(unembed(output of layer E - 1), labels)    (eq. 5)
    w(t, E) = C(t, E) e(E - 1) / sum over i of C(t, i) e(i - 1)                      (eq. 6)

C is the curriculum, e the weight of each layer. Arrays over exits have exit E at index E - 1. CE is
the loss of each token, a function of an exit's logits, which are float32 or wider. Other functions
may replace `exit_weights`, and CE below exit L (docs/extending.md). Ignored labels are negative.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from lsjax.config import EarlyExitConfig, check

# (config, num_layers, step, num_steps) -> the weights of exits 1..L before normalisation
ExitWeights = Callable[[EarlyExitConfig, int, ArrayLike, int], Float[Array, "... L"]]
# (logits [..., V], labels [...], final_logits [..., V]) -> losses [...]. It may also take the
# keywords exit (1..L - 1) and step, which are integers.
ExitLoss = Callable[..., Array]


def layer_weights(config: EarlyExitConfig, num_layers: int) -> Float[np.ndarray, " L"]:
    """e(l): the weight of the exit after each layer, l = E - 1, before the curriculum."""
    config.check_layers(num_layers)
    if config.weights == "custom":
        return np.array(config.custom_weights, float)
    if config.weights == "uniform" or num_layers == 1:
        return np.ones(num_layers)
    depth, last = np.arange(num_layers), num_layers - 1
    weights = config.e_scale * depth * (depth + 1) / 2
    weights[last] = last + config.e_scale * (last - 1) * last / 2
    return weights


def curriculum(
    config: EarlyExitConfig, num_layers: int, step: ArrayLike, num_steps: int
) -> Bool[Array | np.ndarray, "... L"]:
    """C(t, E): the exits that are enabled at step t of T. step: a number, or [..., 1] for several.
    The result is NumPy's, unless `step` is an array of JAX."""
    exits = np.arange(1, num_layers + 1)
    match config.curriculum:
        case "none":
            on = np.zeros(num_layers, bool)
        case "rotational":
            on = (exits - 1) % config.rotation == step % config.rotation
        case "gradual":
            # t >= (L - E + 1) T / (2L), in integers.
            first_step = -(-(num_layers - exits + 1) * num_steps // (2 * num_layers))
            on = step >= first_step
        case "all":
            on = np.ones(num_layers, bool)
        case "subset":
            on = np.isin(exits, config.exits)
    return on | (exits == num_layers)


def exit_weights(
    config: EarlyExitConfig, num_layers: int, step: ArrayLike, num_steps: int
) -> Float[Array | np.ndarray, "... L"]:
    """C(t, E) e(E - 1): the weights of step t of T before normalisation; 0 disables an exit. step:
    as in `curriculum`."""
    enabled_L = curriculum(config, num_layers, step, num_steps)
    return enabled_L * layer_weights(config, num_layers)


def loss_weights(
    config: EarlyExitConfig,
    num_layers: int,
    step: ArrayLike,
    num_steps: int,
    exit_weights: ExitWeights = exit_weights,
) -> Float[Array, " L"]:
    """w(t, E) (eq. 6): weights that sum to 1; 0 for disabled exits. step: a number."""
    weights_L = jnp.asarray(exit_weights(config, num_layers, step, num_steps))
    check(
        weights_L.shape == (num_layers,),
        f"exit_weights returned the shape {list(weights_L.shape)} for one step, instead of "
        f"[{num_layers}]",
    )
    # Relative to the last exit's weight: float32 then holds the weights at any depth.
    relative_L = (weights_L / weights_L[-1]).astype(jnp.float32)
    return relative_L / relative_L.sum()


def enabled_by_step(
    config: EarlyExitConfig,
    num_layers: int,
    num_steps: int,
    exit_weights: ExitWeights = exit_weights,
) -> Bool[np.ndarray, "T L"]:
    """Exits with a weight at each of the T steps of the run. Raises ConfigError for weights that
    are not [T, L], negative, not finite, or 0 for the last exit."""
    shape = num_steps, num_layers
    with jax.ensure_compile_time_eval():  # the loss calls this while it is traced
        weights = exit_weights(config, num_layers, np.arange(num_steps)[:, None], num_steps)
    weights = np.asarray(weights, float)
    check(
        weights.shape in (shape, shape[1:]),
        f"exit_weights returned the shape {list(weights.shape)} for all steps [T, 1], instead of "
        f"{list(shape)}: use operations that broadcast over steps",
    )
    check(
        bool((weights >= 0).all() and np.isfinite(weights).all() and (weights[..., -1] > 0).all()),
        "exit_weights must return finite weights from 0, and more than 0 for the last exit",
    )
    return np.broadcast_to(weights > 0, shape)


def exits_with_loss(
    config: EarlyExitConfig,
    num_layers: int,
    num_steps: int,
    exit_weights: ExitWeights = exit_weights,
) -> tuple[int, ...]:
    """Exits with a loss in some step, besides the last one."""
    enabled_TL = enabled_by_step(config, num_layers, num_steps, exit_weights)
    return tuple((np.flatnonzero(enabled_TL[:, :-1].any(0)) + 1).tolist())


def exit_counts(
    config: EarlyExitConfig,
    num_layers: int,
    num_steps: int,
    exit_weights: ExitWeights = exit_weights,
) -> Int[np.ndarray, " T"]:
    """Number of enabled intermediate exits at each of the T steps of the run."""
    return enabled_by_step(config, num_layers, num_steps, exit_weights)[:, :-1].sum(1)


def exit_entries(
    config: EarlyExitConfig,
    num_layers: int,
    step: ArrayLike,
    num_steps: int,
    exit_weights: ExitWeights = exit_weights,
) -> tuple[Int[Array, " E"], Bool[Array, " E"], Float[Array, " E"]]:
    """Each entry's layer, whether the entry is used, and the weight of its exit. There are as many
    entries as a step enables exits at most, and the last exit has the last entry. If these are
    nearly all exits, every exit has its own entry, which makes the scan cheaper."""
    weights_L = loss_weights(config, num_layers, step, num_steps, exit_weights)
    enabled_L = weights_L > 0
    most = int(exit_counts(config, num_layers, num_steps, exit_weights).max())
    last = num_layers - 1
    if num_layers > 1 and most + 1 >= last:
        layer_E, taken_E = jnp.arange(num_layers), jnp.append(enabled_L[:-1], True)
    else:
        (layer_E,) = jnp.nonzero(enabled_L[:-1], size=most, fill_value=last)
        layer_E, taken_E = jnp.append(layer_E, last), jnp.append(layer_E < last, True)
    return layer_E, taken_E, jnp.where(taken_E, weights_L[layer_E], 0)


@jax.custom_jvp
def log_z(logits: Float[Array, "... V"]) -> Float[Array, "..."]:
    """log sum exp of the logits. Its derivative is recomputed from the result, so the forward pass
    writes no array of the logits' size."""
    return jax.nn.logsumexp(logits, axis=-1)


@log_z.defjvp
def _log_z_jvp(primals, tangents):
    (logits,), (dlogits,) = primals, tangents
    result = log_z(logits)
    return result, (jnp.exp(logits - result[..., None]) * dlogits).sum(-1)


def cross_entropy(
    logits: Float[Array, "... V"], labels: Int[Array, "..."], final_logits: object = None
) -> Float[Array, "..."]:
    """-log p(label): the paper's loss of every exit, and always the last exit's."""
    is_label = jnp.arange(logits.shape[-1]) == labels[..., None]
    return log_z(logits) - jnp.where(is_label, logits, 0).sum(-1)


def divergence(
    logits: Float[Array, "... V"], labels: Int[Array, "..."], final_logits: Float[Array, "... V"]
) -> Float[Array, "..."]:
    """KL(p || q) of this exit's distribution q from the last one's, p."""
    log_p = final_logits - log_z(final_logits)[..., None]
    return (jnp.exp(log_p) * (log_p - logits)).sum(-1) + log_z(logits)


# By `early_exit.target`.
EXIT_LOSSES: Mapping[str, ExitLoss] = {"labels": cross_entropy, "final": divergence}


def with_exit(exit_loss: ExitLoss, exit: Int[Array, ""], step: Int[Array, ""]) -> ExitLoss:
    """The loss with the exit and the step, if it takes them."""
    taken = inspect.signature(exit_loss).parameters
    given = {name: value for name, value in (("exit", exit), ("step", step)) if name in taken}
    return partial(exit_loss, **given) if given else exit_loss
