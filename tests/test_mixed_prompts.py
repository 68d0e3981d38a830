"""The table of auto beside static settings (scripts/proofs/mixed_prompts.py)."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def compare(monkeypatch):
    """The comparison of a file of answers."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "proofs"))
    from mixed_prompts import compare

    return compare


def answers(strategy: str, exit_layer: int | None, kind: str, seconds: list[list[float]]):
    """Lines of texts, each with the seconds of its repeats. Autoregressive decoding takes 6."""
    settings = dict(num_draft_tokens=exit_layer and 4, draft_vocab=None, draft_confidence=None)
    for number, repeats in enumerate(seconds):
        for own in repeats:
            about = dict(
                strategy=strategy, exit_layer=exit_layer, group=kind, id=f"{kind}-{number}"
            )
            yield about | settings | dict(decode_seconds=own, base_seconds=6.0)


def test_kinds_weigh_the_same_and_the_best_fixed_setting_is_of_the_kind(compare, tmp_path):
    lines = [
        {"conditions": {}},
        *answers("auto", None, "code", [[2.0, 9.0, 2.0], [2.0]]),  # 3x: of repeats the median
        *answers("auto", None, "quoting", [[6.0], [6.0]]),  # 1x
        *answers("self_speculative", 2, "code", [[3.0], [3.0]]),  # 2x
        *answers("self_speculative", 2, "quoting", [[12.0], [12.0]]),  # 0.5x
        *answers("self_speculative", 4, "code", [[5.0], [7.0]]),  # 1x
        *answers("self_speculative", 4, "quoting", [[4.0], [8.0]]),  # 1x, from 0.75 to 1.5
    ]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows, good = compare(file)
    exit_2, exit_4 = (f"self speculative, exit {exit}, 4 drafts" for exit in (2, 4))
    # The harmonic means of 3 and 1, and of 1 and 1, which beats that of 2 and 0.5.
    assert [row[:3] for row in rows[1:]] == [
        ["mixed", "1.50 (1.50 to 1.50)x", exit_4],
        ["code", "3.00 (3.00 to 3.00)x", exit_2],
        ["quoting", "1.00 (1.00 to 1.00)x", exit_4],
    ]
    assert [row[3:] for row in rows[2:]] == [
        ["2.00 (2.00 to 2.00)x", "1.50 (1.50 to 1.50)"],
        ["1.00 (0.75 to 1.50)x", "1.00 (0.67 to 1.33)"],
    ]
    assert rows[1][4].startswith("1.50 (")
    assert good


@pytest.mark.parametrize(("seconds", "kept"), [(2.05, True), (2.07, False)])
def test_a_limit_of_each_kind(compare, tmp_path, seconds, kept):
    """2.0 over 2.05 is 0.976 of the fixed setting, and 2.0 over 2.07 is 0.966."""
    lines = [
        {"conditions": {}},
        *answers("auto", None, "code", [[seconds], [seconds]]),
        *answers("auto", None, "quoting", [[1.0], [1.0]]),
        *answers("self_speculative", 2, "code", [[2.0], [2.0]]),
        *answers("self_speculative", 2, "quoting", [[3.0], [3.0]]),
    ]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert compare(file)[1] is kept
