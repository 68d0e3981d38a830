"""Training of exit blocks: the loss against plain arithmetic, and a model that stays as it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lsjax.config import (
    ConfigError,
    ExitBlocksConfig,
    LayerDropoutConfig,
    LlamaConfig,
    LoraConfig,
    OptimizerConfig,
    StepConfig,
)
from lsjax.decoding.engine import Engine
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.model.block import RMSNorm
from lsjax.model.exit_blocks import with_exit_blocks, without_exit_blocks
from lsjax.model.llama import Llama, stacked, unstacked
from lsjax.model.lora import split
from lsjax.model.parameters import named_leaves
from lsjax.model.rope import rope_angles
from lsjax.training import block_loss
from lsjax.training.acceptance_loss import (
    Distribution,
    acceptance_loss,
    of_divergence,
    of_exit_loss,
    of_rejection,
)
from lsjax.training.block_loss import (
    LikelyTokens,
    block_losses,
    block_objective,
    block_states,
    frozen_states,
)
from lsjax.training.early_exit import divergence
from lsjax.training.head_loss import Head
from lsjax.training.step import init_state, make_train_step
from tests.marks import long

E, B, T, D, V = 2, 3, 11, 6, 13
CONFIG = StepConfig(
    num_steps=60,
    exit_blocks=ExitBlocksConfig(exits=(1, 2)),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=1, weight_decay=0.0),
)


@pytest.fixture(scope="module")
def base() -> Llama:
    config = LlamaConfig.tiny(num_layers=4, init_std=0.2)
    return stacked(jax.jit(lambda: Llama(config, rngs=nnx.Rngs(0)))())


def batch_of(seed: int = 0, rows: int = 4, steps: int = 24) -> dict[str, jax.Array]:
    """Two documents in each row; the second half of each is labelled."""
    tokens = jax.random.randint(jax.random.key(seed), (rows, steps), 0, 256)
    half = steps // 2
    positions = jnp.broadcast_to(jnp.arange(steps) % half, (rows, steps))
    labels = jnp.where(positions >= half // 2, jnp.roll(tokens, -1, 1), -1)
    segments = jnp.broadcast_to(1 + jnp.arange(steps) // half, (rows, steps))
    own = dict(tokens_BT=tokens, labels_BT=labels)
    return own | dict(segments_BT=segments, positions_BT=positions)


def written_down(function):
    """A loss whose gradient is written down, as a loss of blocks."""
    return lambda q, p, labels, exit, step: function(q, p)


LOSSES = {
    "divergence": written_down(of_divergence),
    "rejection": written_down(of_rejection),
    "own divergence": of_exit_loss(divergence),
}


def plain(loss, head, x_EBTD, final_BTD, labels_BT):
    """The same with all logits at once."""
    q_EBTV, p_BTV = head.norm(x_EBTD) @ head.table_VD.T, head.norm(final_BTD) @ head.table_VD.T
    log_p, log_q = jax.nn.log_softmax(p_BTV), jax.nn.log_softmax(q_EBTV)
    if loss.endswith("divergence"):
        each_EBT = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    else:
        each_EBT = -jnp.log(jnp.minimum(jnp.exp(log_p), jnp.exp(log_q)).sum(-1))
    sums_E = (each_EBT * (labels_BT >= 0)).sum((1, 2))
    return sums_E.sum(), sums_E


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("chunk", [4, *long(11)])
def test_chunks_equal_all_logits_at_once(monkeypatch, loss, chunk):
    """In float64: values and the gradient of the blocks' states. Some rows have few labels."""
    monkeypatch.setattr(block_loss, "loss_chunk", lambda *_: chunk)
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 5)
        norm = RMSNorm(D, 1e-5, jnp.float64)
        norm.scale[...] = 1 + 0.3 * jax.random.normal(keys[0], D)
        head = Head(norm, jax.random.normal(keys[1], (V, D)))
        x_EBTD = jax.random.normal(keys[2], (E, B, T, D))
        final_BTD = jax.random.normal(keys[3], (B, T, D))
        labels_BT = jax.random.randint(keys[4], (B, T), -4, V).at[1, 1:].set(-1)
        fixed = final_BTD, labels_BT

        def ours(x_EBTD):
            return block_losses(LOSSES[loss], head, x_EBTD, *fixed, jnp.array([1, 2]), jnp.int32(0))

        found = jax.value_and_grad(ours, has_aux=True)(x_EBTD)
        expected = jax.value_and_grad(lambda x: plain(loss, head, x, *fixed), has_aux=True)(x_EBTD)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found, expected
        )
        assert np.abs(found[1]).max() > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_likely_tokens_stand_for_the_last_exit(loss):
    """All tokens give the same loss as the states. A few give that of their own distribution."""
    keys = jax.random.split(jax.random.key(1), 4)
    head = Head(RMSNorm(D, 1e-5, jnp.float32), jax.random.normal(keys[0], (V, D)))
    x_EBTD = jax.random.normal(keys[1], (E, B, T, D))
    final_BTD = jax.random.normal(keys[2], (B, T, D))
    labels_BT = jax.random.randint(keys[3], (B, T), -4, V)
    log_p_BTV = jax.nn.log_softmax(head.norm(final_BTD) @ head.table_VD.T)
    order_BTV = jnp.argsort(-log_p_BTV, axis=-1)

    def sums(final):
        given = x_EBTD, final, labels_BT, jnp.array([1, 2]), jnp.int32(0)
        return block_losses(LOSSES[loss], head, *given)[1]

    def likely(count):
        ids_BTK = order_BTV[..., :count]
        return LikelyTokens(ids_BTK, jnp.take_along_axis(log_p_BTV, ids_BTK, -1))

    np.testing.assert_allclose(sums(likely(V)), sums(final_BTD), rtol=1e-4)
    kept_BTV = jnp.argsort(order_BTV, axis=-1) < 3
    p_BTV = jax.nn.softmax(jnp.where(kept_BTV, log_p_BTV, -jnp.inf))
    q_EBTV = jax.nn.softmax(head.norm(x_EBTD) @ head.table_VD.T)
    if loss.endswith("divergence"):
        own = jnp.where(kept_BTV, p_BTV * jnp.log(jnp.where(kept_BTV, p_BTV, 1) / q_EBTV), 0)
        each_EBT = own.sum(-1)
    else:
        each_EBT = -jnp.log(jnp.minimum(p_BTV, q_EBTV).sum(-1))
    expected_E = (each_EBT * (labels_BT >= 0)).sum((1, 2))
    np.testing.assert_allclose(sums(likely(3)), expected_E, rtol=1e-4)


def test_a_draft_vocabulary_has_both_distributions(base):
    """The loss over some tokens is that of a head which has no others. Positions with another token
    are left out. A step without ids, or with too many, is refused."""
    ids = np.sort(np.random.default_rng(0).choice(256, 100, replace=False))
    blocks = ExitBlocksConfig(exits=(1, 2), draft_vocab=len(ids))
    config = dataclasses.replace(CONFIG, exit_blocks=blocks)
    model, batch = with_exit_blocks(base, (1, 2)), batch_of()
    found = block_objective(config, model, batch, jnp.int32(0), 1, None, jnp.array(ids))
    states_EBTD = frozen_states(config, model, batch)
    x_EBTD = block_states(config, model, states_EBTD[:-1], batch)
    small = Head(model.norm, model.head_table[ids])
    drafted = np.isin(batch["labels_BT"], ids)
    labels_BT = jnp.where(drafted, batch["labels_BT"], -1)
    assert 0 < drafted.sum() < (batch["labels_BT"] >= 0).sum()
    _, expected_E = plain("divergence", small, x_EBTD, states_EBTD[-1], labels_BT)
    np.testing.assert_allclose(found[1][:2], expected_E, rtol=1e-4)
    for given in (None, ids[1:]):
        with pytest.raises(ConfigError, match="exit_blocks.draft_vocab is 100"):
            make_train_step(config, draft_ids=given)
    with pytest.raises(ConfigError, match="draft_vocab 258 is not below"):
        big = dataclasses.replace(blocks, draft_vocab=base.config.vocab_size)
        init_state(dataclasses.replace(CONFIG, exit_blocks=big), base)


def test_the_loss_changes_in_the_last_third():
    q, p = map(Distribution.of, jax.random.normal(jax.random.key(0), (2, 1, 3, V)))
    loss = acceptance_loss(CONFIG)
    for step, expected in (
        *((0, of_divergence), (39, of_divergence)),
        *((40, of_rejection), (59, of_rejection)),
    ):
        found = loss(q, p, None, exit=1, step=step)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
            found,
            expected(q, p),
        )
    assert not np.allclose(of_divergence(q, p).loss_BC, found.loss_BC)


def test_distributions_without_a_common_token_have_a_gradient():
    """The accepted share is 0 in float32. The loss and its gradient stay numbers."""
    q, p = (Distribution.of(jnp.array([[row]])) for row in ([300.0, 0, 0], [0, 300.0, 1]))
    loss, gradient = of_rejection(q, p)
    assert float(loss[0, 0]) == pytest.approx(30 * np.log(10), rel=1e-5)
    assert np.isfinite(gradient).all()


def test_blocks_alone_are_trained(base):
    """The model keeps every bit, and the optimizer holds nothing for it. The blocks' loss falls."""
    state = init_state(CONFIG, jax.tree.map(jnp.copy, base))
    before = jax.tree.map(np.asarray, named_leaves(state.model))
    blocks = {name for name in before if name.startswith("exit_blocks.")}
    assert {name for name in named_leaves(split(state.model)[0])} == blocks
    sizes = sum(leaf.size for name, leaf in before.items() if name in blocks)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) < 2.1 * sizes
    step, batch, losses = make_train_step(CONFIG), batch_of(), []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(np.asarray(metrics["exit_loss_L"]))
    after = named_leaves(state.model)
    for name, leaf in before.items():
        assert np.array_equal(leaf, after[name]) == (name not in blocks), name
    first, last = losses[0], losses[-1]
    assert (last[:2] < 0.7 * first[:2]).all() and (last[2:] == 0).all()
    np.testing.assert_array_equal(metrics["enabled_L"], [True, True, False, False])
    assert float(metrics["loss"]) == pytest.approx(last[:2].mean(), rel=1e-6)


@pytest.mark.long
def test_frozen_matrices_have_the_computations_dtype(base):
    """The blocks keep theirs. A step gives the same as one that casts all in each step."""
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    state = init_state(config, jax.tree.map(jnp.copy, base))
    found = named_leaves(state.model)
    kept = {name for name, leaf in found.items() if leaf.dtype == jnp.float32}
    assert kept == {
        *(name for name in found if name.startswith("exit_blocks.")),
        *(name for name in found if name.endswith(("embedding", "scale"))),
    }
    wide = dataclasses.replace(
        state, model=jax.tree.map(lambda leaf: leaf.astype(jnp.float32), state.model)
    )
    wide = jax.tree.map(jnp.copy, wide)
    step, batch = make_train_step(config), batch_of()
    own, expected = step(state, batch), step(wide, batch)
    for name, leaf in named_leaves(expected[0].model.exit_blocks).items():
        np.testing.assert_array_equal(named_leaves(own[0].model.exit_blocks)[name], leaf)


def test_gradients_are_those_of_plain_layers(base):
    """The blocks' gradients equal those of autodiff, layer by layer."""
    model, batch = with_exit_blocks(base, (1, 2), start="copy"), batch_of()
    count = (batch["labels_BT"] >= 0).sum()

    def ours(model):
        return block_objective(CONFIG, model, batch, jnp.int32(3), count)[0]

    def by_layers(model):
        flat = unstacked(model)
        rope = rope_angles(batch["positions_BT"], model.config, jnp.float32)
        x_BTD, states = flat.embed(batch["tokens_BT"]), []
        for layer in flat.layers:
            kind = model.config.layer_kind(0)
            x_BTD = layer(x_BTD, rope[kind.rope], batch["segments_BT"], "xla")
            states.append(x_BTD)
        outputs = [
            flat.exit_blocks[f"{exit_}"](
                states[exit_ - 1], rope[kind.rope], batch["segments_BT"], "xla"
            )
            for exit_ in (1, 2)
        ]
        head = Head(model.norm, model.head_table)
        return plain("divergence", head, jnp.stack(outputs), x_BTD, batch["labels_BT"])[0] / (
            2 * count
        )

    def of_blocks(function):
        def own(blocks):
            found = without_exit_blocks(model)
            found.exit_blocks = blocks
            return function(found)

        return jax.jit(jax.value_and_grad(own))(model.exit_blocks)

    found, expected = of_blocks(ours), of_blocks(by_layers)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), found, expected
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_dropout": LayerDropoutConfig(p_max=0.1)}, "layer_dropout would change the model"),
        ({"lora": LoraConfig(rank=2)}, "lora would change the model"),
        ({"exit_blocks": ExitBlocksConfig(exits=(4,))}, "exit_blocks.exits has 4"),
        ({"exit_blocks": ExitBlocksConfig(exits=(2, 1))}, "must ascend"),
    ],
)
def test_bad_settings(base, changes, words):
    with pytest.raises(ConfigError, match=words):
        init_state(dataclasses.replace(CONFIG, **changes), base)


@pytest.mark.long
def test_trained_blocks_draft_better(base, tokenizer):
    """On the model's own text, that they were trained on."""
    flat, prompts, steps = unstacked(base), [[n] for n in range(1, 9)], 40
    plain_engine = Engine(flat, tokenizer, SelfSpeculative(1, 3), ignore_end=True)
    texts = plain_engine.generate(prompts, max_new_tokens=steps)
    rows = jnp.array([[*p, *one.token_ids] for p, one in zip(prompts, texts, strict=True)])
    batch = batch_of(rows=len(rows), steps=steps)
    batch |= dict(tokens_BT=rows[:, :-1], labels_BT=rows[:, 1:])
    batch |= dict(segments_BT=jnp.ones_like(rows[:, 1:]))
    batch |= dict(positions_BT=jnp.broadcast_to(jnp.arange(steps), (len(rows), steps)))
    state, step = init_state(CONFIG, jax.tree.map(jnp.copy, base)), make_train_step(CONFIG)
    for _ in range(CONFIG.num_steps):
        state, _ = step(state, batch)
    engine = Engine(unstacked(state.model), tokenizer, SelfSpeculative(1, 3), ignore_end=True)
    found = engine.generate(prompts, max_new_tokens=steps)
    assert [one.token_ids for one in found] == [one.token_ids for one in texts]
    share, before = (
        sum(one.accepted for one in own) / sum(one.drafted for one in own) for own in (found, texts)
    )
    assert share > before + 0.2
