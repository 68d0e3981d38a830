"""The cost model: golden numbers worked out by hand, and its cost."""

import numpy as np
import pytest

from lsjax.config import LlamaConfig
from lsjax.decoding import cost
from lsjax.decoding.cost import (
    RoundCosts,
    best_draft_vocab,
    calibrate,
    ideal_speedup,
    unsure_share,
    weight_bytes,
)

SMOL = LlamaConfig.smollm2_135m()


@pytest.mark.parametrize(
    "exit_layer, drafts, acceptance, speedup",
    # k = 49,152 x 576 / 3,540,096 = 7.9975: at (8, 8), 9 x 37.9975 / (8 x 15.9975 + 37.9975).
    [(8, 8, 1.0, 2.060), (4, 12, 1.0, 2.713), (2, 12, 1.0, 3.129), (8, 8, 0.0, 0.2289)],
)
def test_ideal_speedup_by_hand(exit_layer, drafts, acceptance, speedup):
    assert ideal_speedup(SMOL, exit_layer, drafts, acceptance) == pytest.approx(speedup, rel=1e-3)


def test_ideal_speedup_of_a_draft_vocabulary_by_hand():
    # k_d = 7.9975 x 2,048 / 49,152 = 0.33323: 13 x 37.9975 / (12 x 2.33323 + 37.9975).
    assert ideal_speedup(SMOL, 2, 12, 1.0, 2048) == pytest.approx(7.484, rel=1e-3)
    assert ideal_speedup(SMOL, 2, 12, 1.0, SMOL.vocab_size) == ideal_speedup(SMOL, 2, 12, 1.0)
    # The head once more in half of the rounds: 13 x 37.9975 / (12 x 2.33323 + 0.5 x 0.33323 + ...).
    assert ideal_speedup(SMOL, 2, 12, 1.0, 2048, unsure=0.5) == pytest.approx(7.465, rel=1e-3)


def test_rounds_that_end_unsure_by_hand():
    # Of 10 rounds 8 drafted first, 5 second, 3 third: 7 ended before the third of 3.
    assert unsure_share([8, 5, 3], 3, 10) == pytest.approx(0.7)
    assert unsure_share([8, 5], 3, 10) == 1
    assert unsure_share([], 0, 10) == 0  # there was nothing to be unsure of


def test_the_paper_has_a_share_of_its_ideal():
    """Llama-2 7B, CNN/DM, exit 8, 12 drafts, 68.9% accepted, 1.86x (the paper's Table 3)."""
    share = 1.86 / ideal_speedup(LlamaConfig.llama2_7b(), 8, 12, 0.689)
    assert 0.75 < share < 1.05


def test_bytes_of_a_token():
    # 30 layers of 3,540,096 parameters (two norms of 576 in each) and the tied table.
    assert weight_bytes(SMOL, 4) == 4 * (30 * 3_540_096 + 49_152 * 576)


def test_round_by_hand():
    costs = RoundCosts(16.0, {1: 1.0, 3: 1.5}, {3: 5.0}, {99: 4.25, 7: 0.75})
    assert costs.pass_seconds(10, 1) == 16
    assert costs.pass_seconds(10, 3) == 10 * 1.5 + 5
    # Two steps of 3 layers and the rest; 3 layers once more; 7 layers and head at width 3.
    three = {"widths": {3: 1.0}}
    assert costs.round(10, 3, 2, **three, draft_vocab=99) == 2 * (3 + 4.25) + 3 + 7 * 1.5 + 5
    assert costs.round(10, 3, 2, **three, draft_vocab=7) == 2 * (3 + 0.75) + 3 + 7 * 1.5 + 5
    # Half of the drafts stand: two tokens for 33 seconds instead of 32.
    assert costs.speedup(10, 3, 2, 0.5, **three, draft_vocab=99) == pytest.approx(2 * 16 / 33)
    # A quarter of the rounds drafts nothing, and verifies by 7 layers and the head of one position.
    mixed = {"widths": {1: 0.25, 3: 0.75}}
    expected = 1.5 * (3 + 0.75) + 3 + 0.25 * (16 - 3) + 0.75 * (7 * 1.5 + 5)
    assert costs.round(10, 3, 1.5, **mixed, draft_vocab=7) == pytest.approx(expected)
    # In half of the rounds the head gives one token in vain.
    vain = costs.round(10, 3, 1.5, **mixed, draft_vocab=7, unsure=0.5)
    assert vain == pytest.approx(expected + 0.5 * 0.75)


def test_calibration_knows_every_part(model, numbered_times):
    """Milliseconds: 1 of a token, 2 to 4 of all layers, 5 and 6 of the head, 7 and 8 of drafts."""
    costs = calibrate(model, [2, 5], [10, 258])
    assert costs.token == pytest.approx(1e-3)
    assert costs.layer == pytest.approx({1: 2e-3 / 4, 3: 3e-3 / 4, 6: 4e-3 / 4})
    assert costs.head == pytest.approx({3: 5e-3, 6: 6e-3})
    # Eight draft steps of one layer, which passes once more for the last token.
    assert costs.draft == pytest.approx({10: (7e-3 - 9 * 5e-4) / 8, 258: (8e-3 - 9 * 5e-4) / 8})


def test_median_of_loops(monkeypatch):
    """Seconds of one turn, whatever the number of turns that were timed."""
    clock = [0.0]
    monkeypatch.setattr(cost.time, "perf_counter", lambda: clock[0])

    def loop(seconds):
        def run(times):
            clock[0] += seconds * times

        return run

    found = cost.median_seconds([loop(0.02), loop(0.3)])
    assert np.allclose(found, [0.02, 0.3])


def test_a_draft_vocabulary_pays_if_few_tokens_are_common():
    """SmolLM2's head is as large as 8 layers. All tokens if all are equally common."""
    config = LlamaConfig.smollm2_135m()
    common = {token: 1_000_000 if token < 500 else 2 for token in range(30_000)}
    assert best_draft_vocab(config, 8, common) == 512
    assert best_draft_vocab(config, 8, dict.fromkeys(range(49_152), 10)) is None
    once = dict.fromkeys(range(500), 1)  # half of the next tokens may be others
    assert best_draft_vocab(config, 8, once) is None
