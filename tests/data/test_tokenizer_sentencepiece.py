"""SentencePiece: ids and texts equal the library's; the saved tokenizer.json is the same BPE."""

import random

import pytest
import sentencepiece

from lsjax.data.tokenizer_backends import HuggingFaceTokenizer, SentencePieceTokenizer
from lsjax.data.tokenizer_files import load_tokenizer


def test_equals_the_library(sentencepiece_model, texts):
    tokenizer = load_tokenizer(sentencepiece_model)
    library = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    for text in texts:
        ids = library.encode(text)
        assert tokenizer.encode(text, allow_special=False) == [1, *ids]
        assert tokenizer.decode(ids) == library.decode(ids)
    rng = random.Random(0)
    text_ids = [i for i in range(library.vocab_size()) if i > 2 and not library.is_byte(i)]
    for _ in range(300):
        ids = rng.choices([0, 1, 2, *text_ids], k=6)
        assert tokenizer.decode(ids) == library.decode(ids)


def test_reads_special_tokens_only_if_allowed(sentencepiece_model):
    tokenizer = load_tokenizer(sentencepiece_model)
    ids = tokenizer.encode("<s>hi</s> you", add_bos=False)
    assert ids[0] == 1 and ids.count(2) == 1
    plain = tokenizer.encode("<s>hi</s> you", add_bos=False, allow_special=False)
    assert not {1, 2} & set(plain)
    assert tokenizer.decode(plain) == "<s>hi</s> you"
    assert tokenizer.decode([1, 2]) == "" and tokenizer.decode([1, 2], skip_special=False)


@pytest.mark.parametrize("remove, prefix", [(True, True), (False, False), (True, False)])
def test_leading_spaces_follow_the_model(tmp_path, corpus, remove, prefix):
    (tmp_path / "corpus.txt").write_text("\n".join(corpus), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "m"), vocab_size=90,
        model_type="unigram", add_dummy_prefix=prefix, remove_extra_whitespaces=remove,
        character_coverage=1.0, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = load_tokenizer(tmp_path / "m.model")
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    space = library.piece_to_id("▁")
    word = library.encode("there")
    for ids in ([space, *word], [space, space, space, *word], word, [space]):
        assert tokenizer.decode(ids) == library.decode(ids)
    tokenizer.save(tmp_path / "saved")  # normalizes or is no BPE: no tokenizer.json may claim it
    assert not (tmp_path / "saved" / "tokenizer.json").exists()
    assert load_tokenizer(tmp_path / "saved").encode("there") == tokenizer.encode("there")


def test_an_end_that_is_an_ordinary_piece_is_saved_and_found(tmp_path, corpus):
    """ChatML's, say, in a model of Llama 2's kind."""
    (tmp_path / "corpus.txt").write_text("\n".join(corpus), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "m"), vocab_size=90,
        model_type="unigram", user_defined_symbols=["<|im_end|>"], character_coverage=1.0,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = load_tokenizer(tmp_path / "m.model")
    *_, end = tokenizer.encode("a<|im_end|>")
    assert tokenizer.spelling(end) == "<|im_end|>" and tokenizer.eos_ids == (2,)
    tokenizer.eos_ids = (end,)
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").eos_ids == (end,)


def test_saves_an_equal_tokenizer_json(sentencepiece_model, texts, tmp_path):
    tokenizer = load_tokenizer(sentencepiece_model)
    tokenizer.save(tmp_path)
    converted = load_tokenizer(tmp_path / "tokenizer.json")
    assert isinstance(converted, HuggingFaceTokenizer)
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
    for text in texts:
        assert converted.encode(text) == tokenizer.encode(text)
        assert converted.decode(converted.encode(text, allow_special=False)) == text
