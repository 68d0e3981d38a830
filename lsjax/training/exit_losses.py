"""What the exits below the last one learn: losses of tokens, as functions of logits alone.

Any function of this kind can take their place:

    def exit_loss(logits, labels, final_logits):    # [..., V], [...], [..., V]
        return ...                                  # [...]

    step = make_train_step(config, exit_loss=exit_loss)

logits are those of an exit, final_logits those of the last one, in float32 or wider. The head calls
it on a chunk of positions at a time and differentiates it in `logits`; nothing flows back through
`final_logits`, and if they are not used they are not computed. Labels of tokens that do not count
may be negative.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

ExitLoss = Callable[[Array, Array, Array], Array]


@jax.custom_jvp
def log_z(logits: Float[Array, "... V"]) -> Float[Array, "..."]:
    """log sum exp of the logits. Its derivative, the softmax, is computed from the result: the
    pass over the logits writes no array of their size."""
    return jax.nn.logsumexp(logits, axis=-1)


@log_z.defjvp
def _log_z_jvp(primals, tangents):
    (logits,), (dlogits,) = primals, tangents
    result = log_z(logits)
    return result, (jnp.exp(logits - result[..., None]) * dlogits).sum(-1)


def cross_entropy(
    logits: Float[Array, "... V"], labels: Int[Array, "..."], final_logits: object = None
) -> Float[Array, "..."]:
    """-log p(label): the paper's (eq. 5), and always the last exit's."""
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
