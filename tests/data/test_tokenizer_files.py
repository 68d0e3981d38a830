"""Loading: which file counts, Llama 3's tiktoken file, and bad files are one line."""

import json
import random
import shutil

import pytest
from tokenizers import Regex, pre_tokenizers

from lsjax.data.tokenizer import TokenizerError
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.data.tokenizer_huggingface import LLAMA3_SPLIT, HuggingFaceTokenizer


def test_tokenizer_json_with_more_tokens_goes_before_tokenizer_model(
    bpe_directory, sentencepiece_model, tmp_path
):
    for file in (bpe_directory / "tokenizer.json", sentencepiece_model):
        shutil.copy(file, tmp_path)
    assert isinstance(load_tokenizer(tmp_path), HuggingFaceTokenizer)


def test_tiktoken_file_equals_rank_bpe(tiktoken_file, tiktoken_ranks, texts):
    tokenizer = load_tokenizer(tiktoken_file)
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")

    def rank_bpe(word):
        parts = [bytes([byte]) for byte in word.encode()]
        if word.encode() in tiktoken_ranks:
            return [tiktoken_ranks[word.encode()]]
        while True:
            joins = [tiktoken_ranks.get(a + b, 1 << 30) for a, b in zip(parts, parts[1:])]  # noqa: B905
            if not joins or min(joins) == 1 << 30:
                return [tiktoken_ranks[part] for part in parts]
            i = joins.index(min(joins))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]

    for text in [*texts, "the world is in the string, worlds", "1234567 12345"]:
        expected = [i for word, _ in split.pre_tokenize_str(text) for i in rank_bpe(word)]
        assert tokenizer.encode(text, add_bos=False) == expected
    first = len(tiktoken_ranks)
    assert (tokenizer.bos_id, tokenizer.vocab_size) == (first, first + 256)
    assert tokenizer.eos_ids == (first + 1, first + 9, first + 8)
    assert tokenizer.encode("<|start_header_id|><|eot_id|>") == [first, first + 6, first + 9]
    assert tokenizer.decode([first + 255], skip_special=False) == "<|reserved_special_token_247|>"


def test_bad_files_are_one_line_that_names_them(
    sentencepiece_model, tiktoken_file, bpe_directory, tmp_path
):
    model, ranks = sentencepiece_model.read_bytes(), tiktoken_file.read_bytes()
    pipeline = (bpe_directory / "tokenizer.json").read_bytes()
    decoder = json.dumps(json.loads(pipeline) | {"decoder": {"type": "WordPiece", "prefix": "#",
                                                            "cleanup": True}})  # fmt: skip
    far = {"model": {"type": "BPE", "vocab": {"a": 4_000_000_000}, "merges": []}}
    cases = [
        ("tokenizer.model", b""),
        ("tokenizer.model", b"hello"),
        ("tokenizer.model", random.Random(3).randbytes(3000)),
        ("tokenizer.model", model[: len(model) // 2]),
        ("tokenizer.model", model[:-3]),
        ("tokenizer.model", ranks[: len(ranks) // 2]),
        ("tokenizer.model", ranks.replace(b" 7\n", b" 8\n")),
        ("tokenizer.model", ranks.replace(b"AA== 0", b"AQ== 0")),
        ("tokenizer.json", b""),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"hidden_size": 64}'),
        ("tokenizer.json", b'{"model": 3}'),
        ("tokenizer.json", b"[" * 100_000),
        ("tokenizer.json", pipeline[: len(pipeline) // 2]),
        ("tokenizer.json", json.dumps(far).encode()),
        ("tokenizer.json", decoder.encode()),
    ]
    for number, (name, content) in enumerate(cases):
        file = tmp_path / str(number) / name
        file.parent.mkdir()
        file.write_bytes(content)
        for path in (file, file.parent):
            with pytest.raises(TokenizerError) as error:
                print(number, load_tokenizer(path))
            assert str(file.parent) in str(error.value) and "\n" not in str(error.value)
    for path in (tmp_path / "nowhere", tmp_path / "no.json", tmp_path):
        with pytest.raises(TokenizerError, match=str(path)):
            load_tokenizer(path)
