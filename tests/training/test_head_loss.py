"""The chunked loss against plain log-softmax, value and gradients, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.model.block import RMSNorm
from lsjax.training import head_loss as module
from lsjax.training.early_exit import cross_entropy, divergence
from lsjax.training.head_loss import Entries, Head, Positions, head_loss
from tests.marks import long
from tests.tunings import tune

S, B, T, D, V = 3, 2, 11, 6, 13


@pytest.fixture
def wide():
    with jax.enable_x64(True):
        yield


def example(dtype=jnp.float32):
    """Hidden states of three entries, ragged labels, and other positions for each entry."""
    keys = jax.random.split(jax.random.key(0), 6)
    norm = RMSNorm(D, 1e-5, dtype)
    norm.scale[...] = 1 + 0.3 * jax.random.normal(keys[0], D, dtype)
    head = Head(norm, jax.random.normal(keys[1], (V, D), dtype))
    x_EBTD = jax.random.normal(keys[2], (S, B, T, D), dtype)
    labels_BT = jax.random.randint(keys[3], (B, T), 0, V)
    order_EBT = jnp.argsort(jax.random.uniform(keys[4], (S, B, T)), axis=2)
    counts_EB = jnp.array([[3, 0], [0, 0], [11, 7]])
    scales_EB = jnp.array([[2.5, 9.0], [1.0, 1.0], [1.0, 1.0]])
    entries = Entries(jnp.array([0.3, 0.5, 0.7]), jnp.array([2, 3, 4]), jnp.int32(9))
    return head, x_EBTD, labels_BT, Positions(order_EBT, counts_EB, scales_EB), entries


def smoothed(logits, labels, final_logits):
    """A loss of one's own: half the mean over the vocabulary, half the final exit's choice."""
    logp = jax.nn.log_softmax(logits)
    choice = jnp.argmax(final_logits, axis=-1)
    return -(logp.mean(-1) + jnp.take_along_axis(logp, choice[..., None], -1)[..., 0]) / 2


def plain(exit_loss, z_loss, head, x_EBTD, labels_BT, positions, entries):
    """The same with all logits at once."""
    logits = head.norm(x_EBTD) @ head.table_VD.T
    logp = jax.nn.log_softmax(logits)
    loss_EBT = -jnp.take_along_axis(logp, labels_BT[None, :, :, None], 3)[..., 0]
    final = jax.lax.stop_gradient(logits[-1])
    if exit_loss is divergence:
        final = jax.nn.log_softmax(final)
        loss_EBT = loss_EBT.at[:-1].set((jnp.exp(final) * (final - logp[:-1])).sum(-1))
    if exit_loss is smoothed:
        loss_EBT = loss_EBT.at[:-1].set(jax.vmap(smoothed, (0, None, None))(logits[:-1], 0, final))
    rank_EBT = jnp.argsort(positions.order_EBT, axis=2)
    scale_EBT = (rank_EBT < positions.counts_EB[:, :, None]) * positions.scales_EB[:, :, None]
    z_EBT = jnp.square(jax.nn.logsumexp(logits, axis=-1))
    sums_E = (scale_EBT * loss_EBT).sum((1, 2))
    return (entries.weights_E * (scale_EBT * (loss_EBT + z_loss * z_EBT)).sum((1, 2))).sum(), sums_E


@pytest.mark.parametrize(
    "exit_loss, z_loss, share, chunk",
    [
        (cross_entropy, 0.0, 0.2, 4),  # chunks of 3 positions for exits, and of 4 for the last
        (divergence, 0.1, 1, 3),
        *long(
            (cross_entropy, 0.1, 1, 4),
            (cross_entropy, 0.0, 1, 1),
            (cross_entropy, 0.0, 0.5, 100),
            (smoothed, 0.1, 0.1, 3),
        ),
    ],
)
def test_chunks_equal_all_logits_at_once(exit_loss, z_loss, share, chunk, wide, monkeypatch):
    tune(monkeypatch, chunk_logits=chunk * B * V)
    monkeypatch.setattr(module, "ONE_PASS", 2 if share < 1 else 3)  # V is more than two widths
    head, x_EBTD, *rest = example(jnp.float64)

    def compare(function, *settings):
        def scaled(head, x_EBTD):
            loss, sums_E = function(*settings, head, x_EBTD, *rest)
            return 1.7 * loss, sums_E

        return jax.jit(jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True))(head, x_EBTD)

    found = compare(head_loss, exit_loss, z_loss, share)
    expected = compare(plain, exit_loss, z_loss)
    assert found[0][0].dtype == jnp.float64
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), found, expected)


def test_a_loss_gets_its_exit_and_the_step():
    """A loss that is the exit's number and the step, at each position that counts."""
    head, *rest = example()

    def told(logits, labels, final_logits, *, step, exit):
        return jnp.full(labels.shape, 100.0 * exit + step) + 0 * logits.sum(-1)

    sums_E = jax.jit(lambda *args: head_loss(told, 0.0, 1, *args)[1])(head, *rest)
    np.testing.assert_allclose(sums_E[:2], [3 * 2.5 * 209, 0], rtol=1e-6)


@pytest.mark.parametrize("chunk", [3, 100])
def test_no_array_holds_the_logits_of_more_than_a_chunk(chunk, monkeypatch):
    tune(monkeypatch, chunk_logits=chunk * B * V)
    head, x_EBTD, *rest = example()
    run = jax.value_and_grad(
        lambda *args: head_loss(cross_entropy, 0.0, 1, *args)[0], argnums=(0, 1)
    )
    text = jax.jit(run).lower(head, x_EBTD, *rest).as_text()
    assert (f"{B}x{T}x{V}xf32" in text) == (chunk >= T)


@pytest.mark.parametrize(
    "counts, expected",
    [
        # Chunks of 3 positions, as many as the fullest row needs.
        ([[3, 0], [0, 0], [11, 7]], 1 + 0 + 4),
        ([[0, 0], [0, 0], [11, 7]], 4),  # entries without an exit that is on
        ([[4, 7], [1, 1], [0, 1]], 3 + 1 + 1),
    ],
)
def test_what_is_not_in_the_loss_does_not_pass_the_head(counts, expected, monkeypatch):
    """A chunk is counted when it runs."""
    tune(monkeypatch, chunk_logits=3 * B * V)
    monkeypatch.setattr(module, "ONE_PASS", 2)
    passes, of_cross_entropy = [], module.of_cross_entropy

    def counted(logits, *rest):
        jax.debug.callback(lambda: passes.append(logits.shape))
        return of_cross_entropy(logits, *rest)

    monkeypatch.setattr(module, "of_cross_entropy", counted)
    head, x_EBTD, labels_BT, positions, entries = example()
    positions = positions._replace(counts_EB=jnp.array(counts))
    run = jax.value_and_grad(
        lambda *args: head_loss(cross_entropy, 0.0, 1, *args)[0], argnums=(0, 1)
    )
    jax.block_until_ready(jax.jit(run)(head, x_EBTD, labels_BT, positions, entries))
    jax.effects_barrier()
    assert passes == [(B, 3, V)] * expected


@pytest.mark.parametrize(
    "batch, steps, vocab, expected",
    [
        (4, 256, 512, 256),
        (8, 1024, 49_152, 79),  # at most 85 positions, so 13 chunks
        (1, 1, 128_256, 1),
        (512, 4096, 128_256, 1),
    ],
)
def test_chunks_are_about_equal(batch, steps, vocab, expected):
    assert module.loss_chunk(batch, steps, (vocab, 1)) == expected


@pytest.mark.parametrize("one_pass", [2, *long(3)])
def test_bfloat16_states_give_float32_sums_and_gradients_of_the_table(one_pass, monkeypatch):
    monkeypatch.setattr(module, "ONE_PASS", one_pass)
    head, x_EBTD, *rest = example()
    run = jax.value_and_grad(
        lambda *args: head_loss(cross_entropy, 0.0, 1, *args)[0], argnums=(0, 1)
    )
    loss, (head_gradient, x_gradient) = jax.jit(run)(head, x_EBTD.astype(jnp.bfloat16), *rest)
    exact, (exact_gradient, _) = jax.jit(run)(head, x_EBTD, *rest)
    assert loss.dtype == head_gradient.table_VD.dtype == jnp.float32
    assert x_gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(loss, exact, rtol=0.02)
    np.testing.assert_allclose(head_gradient.table_VD, exact_gradient.table_VD, atol=0.2)


def test_head_passes_three_times_over_a_token(monkeypatch):
    """Four times where the exit's loss looks at the final logits."""
    monkeypatch.setattr(module, "ONE_PASS", 2)
    head, x_EBTD, *rest = example()

    def products(*losses):
        run = jax.value_and_grad(lambda *args: head_loss(*losses, 1, *args)[0], argnums=(0, 1))
        text = jax.jit(run).lower(head, x_EBTD, *rest).compile().as_text()
        return text.count(" dot(")

    assert products(cross_entropy, 0.0) == products(cross_entropy, 0.1) == 2 * 3
    assert products(divergence, 0.1) == 2 * 3 + 1
