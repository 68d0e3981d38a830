"""Early-exit loss (LayerSkip, 4.1.2): enabled exits, their weights, and their targets.

    J(t) = sum over exits E of w(t, E) CE(unembed(output of layer E - 1), labels)    (eq. 5)
    w(t, E) = C(t, E) e(E - 1) / sum over i of C(t, i) e(i - 1)                      (eq. 6)

C is the curriculum, e the weights before normalisation. Arrays over exits have exit E at index
E - 1. CE is the loss of each token, a function of an exit's logits, which are float32 or wider. Any
other function may replace it below exit L (docs/extending.md). Ignored labels are negative.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from lsjax.config import EarlyExitConfig


def exit_weights(config: EarlyExitConfig, num_layers: int) -> Float[np.ndarray, " L"]:
    """Weights before curriculum and normalisation: e(l) for layer l = E - 1."""
    config.check_layers(num_layers)
    if config.weights == "custom":
        return np.array(config.custom_weights, float)
    if config.weights == "uniform" or num_layers == 1:
        return np.ones(num_layers)
    depth, last = np.arange(num_layers), num_layers - 1
    weights = config.e_scale * depth * (depth + 1) / 2
    weights[last] = last + config.e_scale * (last - 1) * last / 2
    return weights


def enabled_exits(
    config: EarlyExitConfig, num_layers: int, step: ArrayLike, num_steps: int
) -> Bool[Array | np.ndarray, "... L"]:
    """C(t, E): whether each exit is in the loss of step t of T. Exits of weight 0 never are. step:
    one, or [..., 1] for several. The result is a numpy array if `step` is."""
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
    on = on & (exit_weights(config, num_layers) > 0)
    return on | (exits == num_layers)


def loss_weights(
    config: EarlyExitConfig, num_layers: int, step: ArrayLike, num_steps: int
) -> Float[Array, " L"]:
    """w(t, E) (eq. 6): weights of the enabled exits, which sum to 1; 0 for the others."""
    enabled_L = enabled_exits(config, num_layers, step, num_steps)
    weights_L = exit_weights(config, num_layers)
    # Relative to the last exit's weight: float32 then holds the weights at any depth.
    on_L = jnp.where(enabled_L, (weights_L / weights_L[-1]).astype(np.float32), 0)
    return on_L / on_L.sum()


def exit_counts(config: EarlyExitConfig, num_layers: int, num_steps: int) -> Int[np.ndarray, " T"]:
    """Number of enabled intermediate exits at each of the T steps of the run."""
    enabled = enabled_exits(config, num_layers, np.arange(num_steps)[:, None], num_steps)
    return np.broadcast_to(enabled, (num_steps, num_layers))[:, :-1].sum(1)


def exit_slots(
    config: EarlyExitConfig, num_layers: int, step: ArrayLike, num_steps: int
) -> tuple[Int[Array, " E"], Bool[Array, " E"], Float[Array, " E"]]:
    """Each slot's layer, whether the slot is used, and the weight of its exit. There are as many
    slots as a step enables exits at most, and the last exit has the last slot. If these are nearly
    all exits, every exit has its own slot, which makes the scan cheaper."""
    enabled_L = enabled_exits(config, num_layers, step, num_steps)
    weights_L = loss_weights(config, num_layers, step, num_steps)
    most, last = int(exit_counts(config, num_layers, num_steps).max()), num_layers - 1
    if last and most + 1 >= last:
        layer_E, taken_E = jnp.arange(num_layers), jnp.append(enabled_L[:-1], True)
    else:
        (layer_E,) = jnp.nonzero(enabled_L[:-1], size=most, fill_value=last)
        layer_E, taken_E = jnp.append(layer_E, last), jnp.append(layer_E < last, True)
    return layer_E, taken_E, jnp.where(taken_E, weights_L[layer_E], 0)


# (logits [..., V], labels [...], final_logits [..., V]) -> losses [...]
ExitLoss = Callable[[Array, Array, Array], Array]


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
