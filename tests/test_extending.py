"""The examples of docs/extending.md: functions that are passed in, a loop, a strategy, a model."""

import dataclasses
import re
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.stats import chisquare

import lsjax
from lsjax.checkpoints.run import read_metrics
from lsjax.config import (
    CheckpointConfig,
    DataConfig,
    EarlyExitConfig,
    EvaluationConfig,
    LayerDropoutConfig,
    LlamaConfig,
    TrainConfig,
)
from lsjax.decoding import runtime
from lsjax.decoding.draft_vocabulary import DraftVocabulary
from lsjax.model.rope import rope_angles

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
PROMPTS, NEW = [[7], [1, 2, 3], list(range(40, 60))], 24
CONFIG = TrainConfig(
    model=LlamaConfig.tiny(),
    data=DataConfig(tokenizer="bytes", max_documents=6, validation_fraction=0.2),
    num_steps=2,
    batch_size=4,
    seq_len=16,
    layer_dropout=LayerDropoutConfig(p_max=1.0),
    early_exit=EarlyExitConfig(curriculum="all", weights="uniform"),
    checkpoints=CheckpointConfig(every=2),
    evaluation=EvaluationConfig(every=2, batches=1, sample_tokens=0),
)


def run_block(knob: str, lines: int = 25, **names) -> dict:
    """What the example with this word defines, given these names. lines: that it may have."""
    (code,) = [block for block in BLOCKS if knob in block]
    assert code.count("\n") < lines
    exec(code, names)
    return names


def test_each_part_has_an_example():
    assert len(BLOCKS) == 8


@pytest.mark.long
def test_a_drop_schedule(tmp_path):
    """Rates of 1 in the upper half: exit 2 and the last exit say the same."""
    run_block("drop_rates=", config=CONFIG, workdir=tmp_path / "run")
    rows = read_metrics(tmp_path / "run")
    losses = [row["exit_losses"] for row in rows if "exit_losses" in row]
    assert len(losses) == CONFIG.num_steps
    for exit_losses in losses:
        assert exit_losses[1] == pytest.approx(exit_losses[-1], rel=1e-6)
        assert abs(exit_losses[0] - exit_losses[-1]) > 1e-4


@pytest.mark.long
def test_a_curriculum(tmp_path):
    """The deeper half first, then all exits."""
    config = dataclasses.replace(CONFIG, early_exit=EarlyExitConfig(), num_steps=4)
    run_block("exit_weights=", config=config, workdir=tmp_path / "run")
    rows = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "step"]
    assert [row["exits"] for row in rows] == [[3, 4], [3, 4], [1, 2, 3, 4], [1, 2, 3, 4]]


@pytest.mark.long
def test_an_exit_loss(tmp_path):
    """A share of the metric of each target, at the first step of equal runs."""
    config = dataclasses.replace(CONFIG, layer_dropout=LayerDropoutConfig())

    def losses(run: Path) -> np.ndarray:
        rows = read_metrics(run)
        return np.array(next(row["exit_losses"] for row in rows if row["step"] == 1))

    run_block("exit_loss=", config=config, workdir=tmp_path / "mixed")
    for target in ("labels", "final"):
        early_exit = dataclasses.replace(config.early_exit, target=target)
        other = dataclasses.replace(config, early_exit=early_exit)
        lsjax.train(other, tmp_path / target, hooks=())
    mixed, labels, final = (losses(tmp_path / name) for name in ("mixed", "labels", "final"))
    share = np.array([0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(mixed, share * labels + (1 - share) * final, rtol=1e-5)


@pytest.mark.long
def test_an_optimizer(tmp_path):
    """Lion's step: each parameter moves by the learning rate, and decays."""
    config = dataclasses.replace(CONFIG, num_steps=1, layer_dropout=LayerDropoutConfig())
    run_block("optimizer=", config=config, workdir=tmp_path / "run")
    start = jax.jit(lambda: lsjax.Llama(config.model, rngs=nnx.Rngs(jax.random.key(0))))()
    pairs = zip(
        *(jax.tree.leaves(one) for one in (lsjax.load(tmp_path / "run"), start)), strict=True
    )
    for after, before in pairs:
        moved = np.abs(np.asarray(after - before * (1 - 0.5e-4)))
        assert ((np.abs(moved - 1e-4) < 2e-6) | (moved < 1e-6)).all() and moved.max() > 9e-5


@pytest.fixture(scope="module")
def loop():
    """The example of a training loop."""
    return run_block("def train_step(", 42)


class WholeRows(lsjax.Llama):
    """Its layers run as in training, on rows that begin at position 0."""

    def run_layers(self, x_BTD, lo, hi, positions_BT, cache):
        rope = rope_angles(positions_BT, self.config, x_BTD.dtype)["full"]
        for layer in range(lo, hi):
            x_BTD = self.layers[layer](x_BTD, rope)
        return x_BTD, cache


@pytest.mark.long
def test_a_loop_has_the_losses_of_lsjax(loop):
    """Two steps with the same masks, curriculum and optimizer, on rows with few labels."""
    config = lsjax.StepConfig(
        num_steps=100, layer_dropout=loop["dropout"], early_exit=loop["early_exit"]
    )
    shape = LlamaConfig.tiny(vocab_size=40, hidden_size=32, intermediate_size=48, head_dim=8)
    model = jax.jit(lambda: WholeRows(shape, rngs=nnx.Rngs(0)))()
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(0, 40, (4, 12))
    labels_BT = np.where(rng.random((4, 12)) < 0.7, np.roll(tokens_BT, -1, 1), -1)
    positions_BT = np.broadcast_to(np.arange(12, dtype=np.int32), (4, 12))
    batch = dict(tokens_BT=tokens_BT, labels_BT=labels_BT, positions_BT=positions_BT)
    batch |= dict(segments_BT=np.ones((4, 12), np.int32))
    optimizer = loop["optimizer"]
    state = lsjax.init_state(config, jax.tree.map(jnp.copy, model), optimizer)
    step, opt_state = lsjax.make_train_step(config, optimizer=optimizer), optimizer.init(model)
    for at in range(2):
        model, opt_state, value = loop["train_step"](model, opt_state, tokens_BT, labels_BT, at)
        state, metrics = step(state, batch)
        np.testing.assert_allclose(value, metrics["loss"], rtol=1e-5)
        assert metrics["enabled_L"].tolist() == [False, at == 1, at == 0, True]


@pytest.mark.long
def test_a_model_learns_in_the_loop(gpt, loop):
    """It repeats the only text that it is trained on."""
    model = jax.tree.map(jnp.copy, gpt)
    tokens_BT = jnp.asarray([[*range(10, 34)]] * 4)
    labels_BT = jnp.roll(tokens_BT, -1, 1)
    opt_state, values = loop["optimizer"].init(model), []
    for at in range(100):
        model, opt_state, value = loop["train_step"](model, opt_state, tokens_BT, labels_BT, at)
        values.append(float(value))
    assert values[-1] < 0.2 * values[0]


def test_an_acceptance_rule(model, tokenizer):
    """An accepted draft is among the top three of a plain forward pass, and not always first."""
    strategy = run_block("accept=")["strategy"]
    engine = lsjax.Engine(model, tokenizer, strategy, batch_size=4)
    found = engine.generate(PROMPTS, max_new_tokens=NEW)
    assert sum(completion.accepted for completion in found) > 0
    forward = jax.jit(lambda ids: model(ids)[0])
    ranks = []
    for prompt, completion in zip(PROMPTS, found, strict=True):
        ids = [*prompt, *completion.token_ids]
        logits_TV = np.asarray(forward(jnp.asarray([ids + [0] * (48 - len(ids))])))
        before_TV = logits_TV[len(prompt) - 1 : len(ids) - 1]
        chosen_T1 = np.take_along_axis(before_TV, np.array(completion.token_ids)[:, None], axis=1)
        rank_T = (before_TV > chosen_T1 + 1e-4).sum(1)
        accepted_T = completion.trace.accepted_n
        assert (rank_T[accepted_T] < 3).all() and (rank_T[~accepted_T] == 0).all()
        ranks += rank_T[accepted_T].tolist()
    assert {0, 1} <= set(ranks)


@pytest.mark.long
def test_a_strategy(model, tokenizer):
    """With no layer to skip it decodes autoregressively; otherwise it says something else."""
    names = run_block("Strategy)")
    whole, fewer = names["SkipMiddle"](first=2, last=2), names["strategy"]

    def texts(strategy) -> list[list[int]]:
        engine = lsjax.Engine(model, tokenizer, strategy, batch_size=4)
        return [one.token_ids for one in engine.generate(PROMPTS, max_new_tokens=NEW)]

    expected = texts(lsjax.Autoregressive())
    assert texts(whole) == expected
    assert texts(fewer) != expected


def gpt_of_the_page(tokenizer):
    """The model of the example. Its layers say more, so that texts are not one token repeated."""
    engine = run_block("class GPT", 90, tokenizer=tokenizer)["engine"]
    model = jax.tree.map(lambda leaf: leaf, engine.model)
    model.layers = jax.tree.map(lambda leaf: 2.5 * leaf, model.layers)
    return model


@pytest.fixture(scope="module")
def gpt(tokenizer):
    return gpt_of_the_page(tokenizer)


@pytest.fixture(scope="module")
def following(gpt):
    """Logits of the token after a text, by a pass without earlier keys and values."""

    @jax.jit
    def run(ids_1T):
        places_1T = jnp.arange(64)[None]
        cache = gpt.new_cache(1, 64, gpt.num_layers)
        x_1TD, _ = gpt.run_layers(gpt.embed(ids_1T, places_1T), 0, gpt.num_layers, places_1T, cache)
        return gpt.unembed(x_1TD)[0]

    return lambda ids: np.asarray(run(np.array([ids + [0] * (64 - len(ids))]))[len(ids) - 1], float)


@pytest.fixture(scope="module")
def greedy(following):
    """The best tokens after a text."""

    def text(prompt, new=NEW):
        ids = list(prompt)
        for _ in range(new):
            ids.append(int(following(ids).argmax()))
        return ids[len(prompt) :]

    return text


OWN = {
    "autoregressive": lsjax.Autoregressive(),
    "drafts": lsjax.SelfSpeculative(2, 3),
    "confidence": lsjax.SelfSpeculative(1, 4, draft_confidence=0.02),
    "vocabulary": lsjax.SelfSpeculative(2, 3, DraftVocabulary(np.arange(0, 258, 2))),
    "auto": lsjax.Adaptive((1, 2), lengths=(0, 2, 4), seconds=((1.0,) * 3,) * 3),
}


@pytest.mark.long
@pytest.mark.parametrize("name", ["drafts", "autoregressive", "confidence", "vocabulary", "auto"])
def test_a_model(gpt, greedy, tokenizer, name, monkeypatch):
    """Every strategy gives the greedy text. Rows are refilled, and outgrow their cache."""
    monkeypatch.setattr(runtime, "MIN_CAPACITY", 16)
    monkeypatch.setattr(runtime, "SLACK", 16)
    engine = lsjax.Engine(gpt, tokenizer, OWN[name], batch_size=2, ignore_end=True)
    found = engine.generate(PROMPTS, max_new_tokens=NEW)
    assert [one.token_ids for one in found] == [greedy(prompt) for prompt in PROMPTS]
    if name != "autoregressive":
        assert sum(one.drafted for one in found) > sum(one.accepted for one in found) > 0


@pytest.mark.long
def test_a_conversation_and_sampling_of_a_model(gpt, greedy, tokenizer):
    """The second turn reads only what is new. Sampled texts depend on the seed alone."""
    engine = lsjax.Engine(gpt, tokenizer, OWN["drafts"], ignore_end=True)
    kept = lsjax.Conversation()
    *_, first = engine.stream([1, 2, 3], conversation=kept, max_new_tokens=9)
    prompt = [1, 2, 3, *first.token_ids, 7]
    *_, second = engine.stream(prompt, conversation=kept, max_new_tokens=9)
    assert first.token_ids == greedy([1, 2, 3], 9) and second.token_ids == greedy(prompt, 9)
    drawn = lsjax.Sampling(temperature=1.0, seed=3)
    assert len({*first.token_ids, *second.token_ids}) > 9
    texts = [
        one.token_ids
        for _ in range(2)
        for one in engine.generate([[1, 2]], sampling=drawn, max_new_tokens=9)
    ]
    assert texts[0] == texts[1] != greedy([1, 2], 9)


@pytest.mark.long
@pytest.mark.parametrize("name", ["drafts", "auto"])
def test_sampled_texts_of_a_model_have_its_distribution(gpt, following, tokenizer, name):
    """Chi-square over 1,500 texts of three tokens, against full forward passes."""
    sampling, texts = lsjax.Sampling(temperature=1.5, top_k=4), 1_500
    engine = lsjax.Engine(gpt, tokenizer, OWN[name], batch_size=60, ignore_end=True)
    done = engine.generate([[1, 2, 3]] * texts, sampling=sampling, max_new_tokens=3)
    seen = Counter(tuple(one.token_ids) for one in done)

    def shares(ids) -> dict[int, float]:
        """The four best tokens with their probabilities."""
        logits_V = following(ids)
        best = np.argsort(-logits_V)[:4]
        weights = np.exp((logits_V[best] - logits_V[best[0]]) / 1.5)
        return dict(zip(best.tolist(), weights / weights.sum(), strict=True))

    expected: dict[tuple[int, ...], float] = {(): texts}
    for _ in range(3):
        expected = {
            (*text, token): count * share
            for text, count in expected.items()
            for token, share in shares([1, 2, 3, *text]).items()
        }
    assert seen.keys() <= expected.keys() and len(expected) == 64
    rare = sum(count for count in expected.values() if count < 5)
    classes = [text for text, count in expected.items() if count >= 5]
    found = [seen[text] for text in classes]
    wanted = [expected[text] for text in classes]
    if rare >= 5:
        found, wanted = [*found, texts - sum(found)], [*wanted, rare]
    assert chisquare(found, np.array(wanted) * sum(found) / sum(wanted)).pvalue > 0.01
    assert sum(one.drafted for one in done) > sum(one.accepted for one in done) > 0
