"""Held-out rows and prompts."""

import json
from dataclasses import replace

import pytest

from lsjax.config import ConfigError, DataConfig, LlamaConfig, Sampling, TrainConfig
from lsjax.data.tokenizer_backends import ByteTokenizer
from lsjax.reporting.held_out import held_out

TOKENIZER = ByteTokenizer(add_bos=False)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LSJAX_CACHE", str(tmp_path / "cache"))


def config(**data) -> TrainConfig:
    model = LlamaConfig.tiny(max_context=64)
    return TrainConfig(
        model=model,
        num_steps=1,
        batch_size=2,
        seq_len=32,
        data=DataConfig(tokenizer="bytes", validation_fraction=0.5, **data),
    )


def found(given: TrainConfig, **more):
    own = dict(num_batches=3, num_prompts=4, max_new_tokens=8, max_context=64)
    own |= dict(sampling=Sampling(temperature=1.0))
    return held_out(given, TOKENIZER, **own | more)


def test_prompts_of_a_task(tmp_path):
    """Each held-out document that fits a row, with its response; long ones are truncated."""
    rows = [{"q": f"{n}+1=", "a": f"{n + 1}"} for n in range(40)]
    rows += [{"q": "long", "a": "x" * 40}] * 20
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    templates = dict(prompt_template="{q}", response_template="{a}")
    own = config(source="jsonl", paths=(str(file),), **templates)
    held = found(own, num_prompts=1000)
    texts = [TOKENIZER.decode(one.request.prompt) for one in held.questions]
    assert 10 < len(texts) < 30 and len({*texts}) == len(texts)
    for text, one in zip(texts, held.questions, strict=True):
        assert one.reference == f"{int(text.partition('+')[0]) + 1}"
        assert one.request.sampling.seed == int(one.id) and one.request.max_new_tokens == 8
    fewer = found(own)
    assert len(fewer.questions) == 4 and len(fewer.rows) <= 3
    assert fewer.alike["prompts"] != held.alike["prompts"] and fewer.alike == found(own).alike
    assert fewer.alike["held-out rows"] == held.alike["held-out rows"]
    with pytest.raises(ConfigError, match="data.train_on_prompt hides which tokens are the answer"):
        found(config(source="jsonl", paths=(str(file),), train_on_prompt=True, **templates))


def test_beginnings_of_texts(tmp_path):
    """At most half of a row, and nothing of a row's second document."""
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(f"{n:02} " + "word " * (n % 5) for n in range(60)))
    own = config(source="text", paths=(str(file),), separator="blank_line")
    held = found(own, num_prompts=1000)
    firsts = []  # documents of the rows
    for batch in replace(held.rows, max_batches=None):
        for tokens_T, segments_T in zip(batch["tokens_BT"], batch["segments_BT"], strict=True):
            firsts += [tokens_T[segments_T == 1].tolist()] * bool(segments_T[0])
    prompts = [one.request.prompt for one in held.questions]
    assert prompts == [first[: min(16, len(first) // 2)] for first in firsts if len(first) > 1]
    assert all(one.reference == "" for one in held.questions)


def test_no_room_for_new_tokens(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(f"{n} words" for n in range(60)))
    own = config(source="text", paths=(str(file),), separator="blank_line")
    with pytest.raises(ConfigError, match="no held-out prompt leaves room for 64 new tokens"):
        found(own, max_new_tokens=64)
    assert len(found(own).questions) == 4
