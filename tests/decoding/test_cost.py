"""The cost model: golden numbers worked out by hand, and its calibration."""

import dataclasses
import json

import numpy as np
import pytest

from lsjax.config import LlamaConfig
from lsjax.decoding import calibration
from lsjax.decoding.calibration import calibrate, calibrated
from lsjax.decoding.cost import (
    Costs,
    ideal_speedup,
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


def test_the_paper_has_a_share_of_its_ideal():
    """Llama-2 7B, CNN/DM, exit 8, 12 drafts, 68.9% accepted, 1.86x (the paper's Table 3)."""
    share = 1.86 / ideal_speedup(LlamaConfig.llama2_7b(), 8, 12, 0.689)
    assert 0.75 < share < 1.05


def test_bytes_of_a_token():
    # 30 layers of 3,540,096 parameters (two norms of 576 in each) and the tied table.
    assert weight_bytes(SMOL, 4) == 4 * (30 * 3_540_096 + 49_152 * 576)


def test_round_by_hand():
    costs = Costs({1: 1.0, 3: 1.5}, {1: 4.0, 3: 5.0}, {7: 0.5}, draft_step=0.25, step=2.0)
    assert costs.autoregressive(10) == 2 + 10 + 4
    # Two steps of 3 layers, head and overhead; 3 layers once more; 7 layers and head at width 3.
    assert costs.round(10, 3, 2, width=3) == 2 * (3 + 4 + 0.25) + 3 + 7 * 1.5 + 5 + 2
    assert costs.round(10, 3, 2, width=3, draft_vocab=7) == 2 * 3.75 + 3 + 7 * 1.5 + 5 + 2
    assert costs.speedup(10, 3, 2, 1.0, width=3) == pytest.approx(3 * 16 / 35)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(calibration, "TIMED_SECONDS", 1e-3)
    monkeypatch.setattr(calibration, "REPEATS", 1)


def test_calibration_knows_every_part(model, quick):
    costs = calibrate(model, [2, 5], [10, 20])
    assert set(costs.layer) == set(costs.head) == {1, 3, 6}
    assert set(costs.draft_head) == {10, 20}
    seconds = [*costs.layer.values(), *costs.head.values(), *costs.draft_head.values()]
    assert all(0 < value < 1 for value in seconds)
    assert abs(costs.draft_step) < 1 and abs(costs.step) < 1


def test_calibration_is_kept(model, quick, tmp_path, monkeypatch):
    """And measured again for what it lacks, for another model, and where the file is damaged."""
    measured = []
    parts = Costs({1: 1.0}, {1: 1.0}, {}, 0.0, 0.0)

    def fake(model, lengths, draft_vocabs):
        measured.append((list(lengths), list(draft_vocabs)))
        widths = {1: 1.0} | {d + 1: 2.0 for d in lengths}
        return dataclasses.replace(
            parts, layer=widths, head=widths, draft_head=dict.fromkeys(draft_vocabs, 0.5)
        )

    monkeypatch.setattr(calibration, "calibrate", fake)
    first = calibrated(tmp_path, "machine", model, [2])
    assert calibrated(tmp_path, "machine", model, [2]) == first
    assert measured == [([2], [])]
    calibrated(tmp_path, "machine", model, [4], [10])
    assert measured[1:] == [([0, 2, 4], [10])]
    assert calibrated(tmp_path, "machine", model, [2, 4]).draft_head == {10: 0.5}
    assert len(measured) == 2
    assert set(calibrated(tmp_path, "machine", model, [2], again=True).head) == {1, 3, 5}
    calibrated(tmp_path, "another machine", model, [2])
    assert len(measured) == 4
    for file in (tmp_path / "costs").iterdir():
        file.write_text(json.dumps({"layer": 3}))
    calibrated(tmp_path, "machine", model, [2])
    assert len(measured) == 5


def test_median_of_loops(monkeypatch):
    """Seconds of one turn, whatever the number of turns that were timed."""
    clock = [0.0]
    monkeypatch.setattr(calibration.time, "perf_counter", lambda: clock[0])

    def loop(seconds):
        def run(times):
            clock[0] += seconds * times

        return run

    found = calibration.median_seconds([loop(0.02), loop(0.3)])
    assert np.allclose(found, [0.02, 0.3])
