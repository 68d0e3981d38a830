"""Streaming equals decoding, and never splits a character."""

import random

from lsjax.data.tokenizer import StreamDecoder
from lsjax.data.tokenizer_backends import ByteTokenizer
from lsjax.data.tokenizer_files import load_tokenizer


def continued(tokenizer, prompt, ids):
    stream = StreamDecoder(tokenizer, prompt)
    return stream.push(ids) + stream.finish()


def test_streaming_equals_decoding(any_tokenizer, texts):
    rng, tokenizer = random.Random(1), any_tokenizer
    emoji = tokenizer.encode("🙂 é👍🏽 你", add_bos=False)
    for _ in range(300):
        ids = rng.choices([*range(tokenizer.vocab_size), *emoji * 20], k=rng.randrange(12))
        prompt = tokenizer.encode(rng.choice(texts))
        continuation = continued(tokenizer, prompt, ids)
        for before, expected in ((), tokenizer.decode(ids)), (prompt, continuation):
            stream = StreamDecoder(tokenizer, before)
            parts = [stream.push([token]) for token in ids]
            assert "".join(parts) + stream.finish() == expected
        assert tokenizer.decode([*prompt, *ids]) == tokenizer.decode(prompt) + continuation


def test_streaming_never_splits_a_character(any_tokenizer):
    text = "a 🙂 é👍🏽 你 b"
    stream = StreamDecoder(any_tokenizer)
    parts = [stream.push([token]) for token in any_tokenizer.encode(text)]
    assert "\ufffd" not in "".join(parts)
    assert "".join(parts).strip() == text and stream.finish() == ""


def test_an_unfinished_character_is_held_back():
    stream = StreamDecoder(ByteTokenizer())
    assert [stream.push([b]) for b in "🙂".encode()] == ["", "", "", "🙂"]
    assert stream.push("🙂".encode()[:3]) == "" and stream.finish() == "\ufffd"


def test_continuation_keeps_the_space_that_decode_drops(sentencepiece_model):
    tokenizer = load_tokenizer(sentencepiece_model)
    new = tokenizer.encode("little house", add_bos=False)
    assert tokenizer.decode(new) == "little house"
    assert continued(tokenizer, tokenizer.encode("a"), new) == " little house"
    assert continued(tokenizer, [1], new) == "little house"
    assert StreamDecoder(tokenizer).push(new) == " little house"
