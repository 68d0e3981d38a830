"""A user's script: python own_recipe.py WORKDIR (test_own_recipe.py runs and kills it)."""

import sys

import jax.numpy as jnp
import optax

import lsjax

config = lsjax.TrainConfig(
    model=lsjax.LlamaConfig.tiny(num_layers=4, hidden_size=32, intermediate_size=48, head_dim=8),
    data=lsjax.DataConfig(tokenizer="bytes", max_documents=8, validation_fraction=0.2),
    num_steps=24,
    batch_size=4,
    seq_len=32,
    layer_dropout=lsjax.LayerDropoutConfig(p_max=0.5),
    checkpoints=lsjax.CheckpointConfig(every=3, keep_last=99),
    evaluation=lsjax.EvaluationConfig(every=12, batches=1, sample_tokens=8),
)


def deep_first(config, num_layers, step, num_steps):
    exits = jnp.arange(1, num_layers + 1)
    return jnp.where(exits > num_layers - 1 - 4 * step // num_steps, exits**2, 0)


def mixed(logits, labels, final_logits, exit, step):
    share = jnp.minimum(1, exit / (2 + step / 10))
    own, distilled = lsjax.cross_entropy(logits, labels), lsjax.divergence
    return share * own + (1 - share) * distilled(logits, labels, final_logits)


def rising(config, num_layers, step, num_steps):
    return config.p_max * jnp.arange(num_layers) / num_layers * step / num_steps


lion = optax.lion(optax.warmup_cosine_decay_schedule(0, 3e-3, 5, config.num_steps))
functions = dict(optimizer=lion, exit_weights=deep_first, exit_loss=mixed, drop_rates=rising)
lsjax.train(config, sys.argv[1], **functions)
