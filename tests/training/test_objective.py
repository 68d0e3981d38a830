"""The objective against its definition: every document by itself, every exit, plain logits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.config import EarlyExitConfig, LayerDropoutConfig, StepConfig
from lsjax.training.early_exit import loss_weights
from lsjax.training.loss import loss_positions, objective
from tests.marks import long


@jax.jit
def log_probs(model, tokens_T):
    """After every token, at every exit: [L, T, V]."""
    return jax.nn.log_softmax(model.unembed(model.exits(tokens_T[None])[:, 0]))


def exit_sums(model, batch, target="labels"):
    """Summed loss of every exit; each document runs alone, from position 0."""
    sums = np.zeros(model.config.num_layers)
    for row, segments in enumerate(batch["segments_BT"]):
        for segment in range(1, segments.max() + 1):
            at = segments == segment
            labels = batch["labels_BT"][row, at]
            tokens = batch["tokens_BT"][row, at]
            padded = np.pad(tokens, (0, len(segments) - len(tokens)))  # behind all that is seen
            logp = np.array(log_probs(model, padded))[:, : len(tokens)][:, labels >= 0]
            labels = labels[labels >= 0]
            losses = -logp[:, np.arange(len(labels)), labels]
            if target == "final":
                final = logp[-1]
                losses[:-1] = (np.exp(final) * (final - logp[:-1])).sum(-1)
            sums += losses.sum(1)
    return sums


CURRICULA = {
    "none": EarlyExitConfig(),
    "rotational": EarlyExitConfig(curriculum="rotational", rotation=3, e_scale=0.3),
    "gradual": EarlyExitConfig(curriculum="gradual", weights="uniform"),
    "all": EarlyExitConfig(curriculum="all", weights="uniform"),
    "subset": EarlyExitConfig(curriculum="subset", exits=(2, 5)),
    "final": EarlyExitConfig(curriculum="all", target="final"),
}


@pytest.mark.parametrize("name", ["rotational", *long("final", "none", "gradual", "all", "subset")])
def test_loss_is_the_weighted_sum_over_the_exits_that_are_on(wide, packed, evaluate, name):
    """In every phase; gradients reach every layer."""
    exits = CURRICULA[name]
    config = StepConfig(num_steps=6, early_exit=exits)
    sums = exit_sums(wide, packed, exits.target)
    tokens = (packed["labels_BT"] >= 0).sum()
    for step in range(6):
        (loss, sums_L), gradients = evaluate(config, wide, packed, step)
        weights = np.asarray(loss_weights(exits, 5, step, 6))
        np.testing.assert_allclose(loss, (weights * sums).sum() / tokens, rtol=2e-7)
        np.testing.assert_allclose(sums_L, np.where(weights > 0, sums, 0), rtol=1e-10)
        for leaf in jax.tree.leaves(gradients.layers):
            assert (np.abs(leaf).reshape(5, -1).max(1) > 0).all()


@pytest.mark.long
def test_parts_of_a_batch_add_up(wide, packed, evaluate):
    """Any grouping of the rows: the same masks, the same tokens, sums that add up."""
    config = StepConfig(
        num_steps=9,
        seed=1,
        z_loss=1e-2,
        early_exit=EarlyExitConfig(curriculum="all", weights="uniform", token_share=0.4),
        layer_dropout=LayerDropoutConfig(p_max=0.5, distribution="uniform"),
    )
    num_labels = (packed["labels_BT"] >= 0).sum()
    whole = evaluate(config, wide, packed, 2)
    part = jax.jit(jax.value_and_grad(partial(objective, config), has_aux=True))
    parts = [
        part(wide, {name: a[rows] for name, a in packed.items()}, 2, jnp.array(rows), num_labels)
        for rows in ([2, 0], [3, 1])
    ]
    total = jax.tree.map(jnp.add, *parts)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-12), total, whole)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_a_share_of_the_tokens_stands_for_all(packed, share):
    """Each labelled token counts 1 on average, no other counts, and a row's counts add up."""
    config = StepConfig(
        num_steps=9, early_exit=EarlyExitConfig(curriculum="all", token_share=share)
    )
    labels = jnp.asarray(packed["labels_BT"])

    def counts(step):
        found = loss_positions(
            config,
            labels,
            step,
            jnp.arange(4),
            jnp.array([1, 3, 4]),
            jnp.array([True, False, True]),
        )
        rank_EBT = jnp.argsort(found.order_EBT, axis=2)
        return (rank_EBT < found.counts_EB[:, :, None]) * found.scales_EB[:, :, None]

    counts_NSBT = np.asarray(jax.jit(jax.vmap(counts))(jnp.arange(2000)))
    labelled = packed["labels_BT"] >= 0
    assert (counts_NSBT[:, 2] == labelled).all()  # the last exit has all of them
    assert (counts_NSBT[:, 1] == 0).all()  # no exit took this entry
    assert (counts_NSBT[:, 0][:, ~labelled] == 0).all()
    np.testing.assert_allclose(
        counts_NSBT[:, 0].sum(2), np.broadcast_to(labelled.sum(1), (2000, 4)), rtol=1e-6
    )
    error = counts_NSBT[:, 0].std(0) / np.sqrt(2000)
    np.testing.assert_array_less(np.abs(counts_NSBT[:, 0].mean(0) - labelled), 4.5 * error + 1e-6)
