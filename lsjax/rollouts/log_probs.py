"""Log-probabilities of new tokens by one forward pass, with gradients: the policy's side of RL."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lsjax.config import StepConfig, check
from lsjax.model.llama import Llama, stacked
from lsjax.sharding import context_shards
from lsjax.training.early_exit import ExitLoss, divergence
from lsjax.training.forward import exit_states
from lsjax.training.layer_dropout import drop_rates
from lsjax.training.loss import early_exit_loss

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

    model: stacked or not. Other arguments are `RolloutBatch.arrays`. temperature: of the softmax.
    The logits of few positions are in memory at once.
    """
    x_BTD = last_states(model, as_batch(prompts_RP, prompt_mask_RP, tokens_RT, mask_RT))
    before = prompts_RP.shape[1] - 1  # the state that predicts the first new token
    x_RTD = x_BTD[:, before:-1]
    found_RT = jax.lax.map(
        partial(_of_position, model, temperature),
        (x_RTD.swapaxes(0, 1), tokens_RT.T),
        batch_size=CHUNK,
    ).T
    return jnp.where(mask_RT, found_RT, 0)


def rollout_exit_loss(
    model: Llama,
    exits: Sequence[int],
    prompts_RP: Int[Array, "R P"],
    prompt_mask_RP: Bool[Array, "R P"],
    tokens_RT: Int[Array, "R T"],
    mask_RT: Bool[Array, "R T"],
    *,
    exit_loss: ExitLoss = divergence,
) -> Float[Array, ""]:
    """Mean loss of some exits over the new tokens, to add to an RL loss: it keeps drafts good while
    the policy moves. By default the divergence from the last exit, which gets no gradient.

    exits: in ascending order. exit_loss: its `exit`, if it takes one, is the index in `exits`, plus
    1. Other arguments as of `token_log_probs`. Raises ConfigError for an exit out of range.
    """
    last = model.config.num_layers
    check(bool(exits), "exits is empty: name at least one exit")
    for exit_layer in exits:
        check(1 <= exit_layer < last, f"exit {exit_layer} is out of range: use 1..{last - 1}")
    check(list(exits) == sorted({*exits}), f"exits {list(exits)} must ascend, each once")
    batch = as_batch(prompts_RP, prompt_mask_RP, tokens_RT, mask_RT)
    x_EBTD = states_after(model, batch, [*exits, last])
    # A state predicts the next token. The prompt's last state predicts the first new one.
    ends = (0, 0), (prompts_RP.shape[1] - 1, 1)
    labels_BT = jnp.pad(jnp.where(mask_RT, tokens_RT, -1), ends, constant_values=-1)
    weights_E = jnp.array([1 / len(exits)] * len(exits) + [0.0])
    return early_exit_loss(
        model.norm, model.head_table, x_EBTD, labels_BT, weights_E, exit_loss=exit_loss
    )[0]


def as_batch(
    prompts_RP: Int[Array, "R P"],
    prompt_mask_RP: Bool[Array, "R P"],
    tokens_RT: Int[Array, "R T"],
    mask_RT: Bool[Array, "R T"],
) -> dict[str, Array]:
    """Prompts with their texts, as rows of training."""
    is_token_BT = jnp.concatenate([prompt_mask_RP, mask_RT], 1)
    return {
        "tokens_BT": jnp.concatenate([prompts_RP, tokens_RT], 1),
        "segments_BT": is_token_BT.astype(jnp.int32),
        "positions_BT": jnp.maximum(jnp.cumsum(is_token_BT, 1) - 1, 0),
    }


def states_after(
    model: Llama, batch: dict[str, Array], exits: Sequence[int]
) -> Float[Array, "E B T D"]:
    """States after exits, the last one last. batch: tokens_BT, positions_BT, and segments_BT, which
    are 0 in padding. model: stacked or not."""
    check(context_shards() == 1, "rollouts need a mesh with context 1: give the axis to data")
    layer_E = jnp.array([exit_layer - 1 for exit_layer in exits])
    given = jnp.int32(0), jnp.arange(len(batch["tokens_BT"])), layer_E, drop_rates
    return exit_states(StepConfig(num_steps=1), stacked(model), batch, *given)


def last_states(model: Llama, batch: dict[str, Array]) -> Float[Array, "B T D"]:
    """States after the last layer. batch: as of `states_after`."""
    return states_after(model, batch, [model.config.num_layers])[-1]


@partial(jax.checkpoint, static_argnums=1)
def _of_position(model, temperature, position):
    x_RD, token_R = position
    logits_RV = model.unembed(x_RD) / temperature
    chosen_R = jnp.take_along_axis(logits_RV, token_R[:, None], 1)[:, 0]
    return chosen_R - jax.nn.logsumexp(logits_RV, axis=-1)
