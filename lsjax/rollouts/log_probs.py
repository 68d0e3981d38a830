"""Log-probabilities of new tokens by one forward pass, with gradients: the policy's side of RL."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lsjax.config import StepConfig
from lsjax.model.llama import Llama, stacked
from lsjax.training.forward import exit_states
from lsjax.training.layer_dropout import drop_rates

CHUNK = 64  # positions that pass through the head together


def token_log_probs(
    model: Llama,
    prompts_RP: Int[Array, "R P"],
    prompt_mask_RP: Bool[Array, "R P"],
    tokens_RT: Int[Array, "R T"],
    mask_RT: Bool[Array, "R T"],
    *,
    temperature: float = 1.0,
) -> Float[Array, "R T"]:
    """Log-probability of each new token, given the prompt and the tokens before; 0 in padding.

    model: stacked or not. The arguments are fields of `RolloutBatch`. temperature: of the softmax.
    The logits of few positions are in memory at once.
    """
    tokens_BT = jnp.concatenate([prompts_RP, tokens_RT], 1)
    is_token_BT = jnp.concatenate([prompt_mask_RP, mask_RT], 1)
    batch = {
        "tokens_BT": tokens_BT,
        "segments_BT": is_token_BT.astype(jnp.int32),
        "positions_BT": jnp.maximum(jnp.cumsum(is_token_BT, 1) - 1, 0),
    }
    x_BTD = last_states(model, batch)
    before = prompts_RP.shape[1] - 1  # the state that predicts the first new token
    x_RTD = x_BTD[:, before:-1]
    found_RT = jax.lax.map(
        partial(_of_position, model, temperature),
        (x_RTD.swapaxes(0, 1), tokens_RT.T),
        batch_size=CHUNK,
    ).T
    return jnp.where(mask_RT, found_RT, 0)


def last_states(model: Llama, batch: dict[str, Array]) -> Float[Array, "B T D"]:
    """States after the last layer. batch: tokens_BT, positions_BT, and segments_BT, which are 0 in
    padding. model: stacked or not."""
    last = jnp.array([model.config.num_layers - 1])
    given = jnp.int32(0), jnp.arange(len(batch["tokens_BT"])), last, drop_rates
    return exit_states(StepConfig(num_steps=1), stacked(model), batch, *given)[-1]


@partial(jax.checkpoint, static_argnums=1)
def _of_position(model, temperature, position):
    x_RD, token_R = position
    logits_RV = model.unembed(x_RD) / temperature
    chosen_R = jnp.take_along_axis(logits_RV, token_R[:, None], 1)[:, 0]
    return chosen_R - jax.nn.logsumexp(logits_RV, axis=-1)
