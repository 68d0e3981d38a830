"""Who wrote each token of a text, and what a report says of the machine."""

import numpy as np
import pytest

import lsjax
from lsjax.reporting import machine
from lsjax.reporting.texts import with_origins


@pytest.mark.parametrize(
    "strategy", [lsjax.SelfSpeculative(2, 3), lsjax.Autoregressive()], ids=["drafts", "plain"]
)
def test_origins_of_tokens(model, tokenizer, strategy):
    """The pieces are the text. Accepted drafts, corrections and probabilities are the trace's."""
    prompt = [72, 101, 108]
    engine = lsjax.Engine(model, tokenizer, strategy)
    (done,) = engine.generate([prompt], max_new_tokens=40, log_probs=True)
    found = with_origins(tokenizer, prompt, done)
    assert found["prompt"] == "Hel"
    tokens, trace = found["tokens"], done.trace
    assert "".join(one["text"] for one in tokens) == done.text and len(tokens) == 40
    np.testing.assert_array_equal([one["origin"] == "accepted" for one in tokens], trace.accepted_n)
    corrected = [one["origin"] == "corrected" for one in tokens]
    np.testing.assert_array_equal(corrected, (trace.replaced_n >= 0) & ~trace.accepted_n)
    assert all(one["exit"] == 2 for one in tokens if one["origin"] == "accepted")
    np.testing.assert_allclose(
        [one["probability"] for one in tokens], np.exp(trace.log_probs_n), atol=1e-4
    )
    if strategy.name == "self_speculative":
        assert any(corrected) and any(trace.accepted_n)
        at = corrected.index(True)
        rejected = bytes([trace.replaced_n[at]]) if trace.replaced_n[at] < 256 else None
        assert rejected is None or tokens[at]["rejected"] == rejected.decode(errors="replace")


def test_lookups_have_no_exit(model, tokenizer):
    prompt = [*b"one two three one two three one two three"]
    engine = lsjax.Engine(
        model, tokenizer, lsjax.Adaptive((), lengths=(0, 3), seconds=((1e9, 1.0),))
    )
    (done,) = engine.generate([prompt], max_new_tokens=12)
    origins = {one["origin"] for one in with_origins(tokenizer, prompt, done)["tokens"]}
    assert origins <= {"looked-up", "corrected", "added"}


def test_the_machine(monkeypatch):
    """What XLA may not use does not count."""
    fields = {"model name": "X 1", "flags": "fpu avx2 avx512f avx512_bf16"}
    monkeypatch.setattr(machine, "processor", lambda: fields)
    monkeypatch.setenv("XLA_FLAGS", "")
    assert machine.machine_name().startswith("X 1, ") and machine.multiplies_bfloat16()
    assert "AVX-512 with bfloat16" in machine.machine_name()
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX2")
    assert not machine.multiplies_bfloat16()
    assert ", AVX2, XLA_FLAGS=--xla_cpu_max_isa=AVX2" in machine.machine_name()
    assert "jax" in machine.versions() and machine.versions().startswith("Python 3.")
