"""The ideal speedup: golden numbers worked out by hand."""

import pytest

from lsjax.config import LlamaConfig
from lsjax.decoding.cost import best_draft_vocab, best_exit, ideal_speedup

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


@pytest.mark.parametrize(
    "agreements, expected",
    [
        ({}, None),  # no draft passes: a round costs more than a token
        ({8: 1.0}, (8, 8)),
        # One draft: 1.5 x 37.9975 / (9.9975 + 37.9975) = 1.1875; two: 1.75 x ... / 57.99 = 1.147.
        ({2: 0.5, 30: 1.0}, (2, 1)),
        ({2: 0.5, 8: 0.9}, (8, 4)),  # 1.63 at 3 and 5 drafts, 1.64 at 4; exit 2 has 1.19
    ],
)
def test_the_exit_with_the_best_ideal_speedup(agreements, expected):
    agreement_E = [agreements.get(exit_layer, 0.0) for exit_layer in range(1, 31)]
    assert best_exit(SMOL, agreement_E) == expected


def test_the_paper_has_a_share_of_its_ideal():
    """Llama-2 7B, CNN/DM, exit 8, 12 drafts, 68.9% accepted, 1.86x (the paper's Table 3)."""
    share = 1.86 / ideal_speedup(LlamaConfig.llama2_7b(), 8, 12, 0.689)
    assert 0.75 < share < 1.05


def test_a_draft_vocabulary_pays_if_few_tokens_are_common():
    """SmolLM2's head is as large as 8 layers. All tokens if all are equally common."""
    config = LlamaConfig.smollm2_135m()
    common = {token: 1_000_000 if token < 500 else 2 for token in range(30_000)}
    assert best_draft_vocab(config, 8, common) == 512
    assert best_draft_vocab(config, 8, dict.fromkeys(range(49_152), 10)) is None
    once = dict.fromkeys(range(500), 1)  # half of the next tokens may be others
    assert best_draft_vocab(config, 8, once) is None
