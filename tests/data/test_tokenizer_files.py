"""Loading: which file counts, and bad files are one line."""

import json
import random
import shutil

import pytest
import tokenizers
from tokenizers import pre_tokenizers

from lsjax.data.tokenizer import TokenizerError
from lsjax.data.tokenizer_backends import HuggingFaceTokenizer
from lsjax.data.tokenizer_files import load_tokenizer


def test_tokenizer_json_with_more_tokens_goes_before_tokenizer_model(
    bpe_directory, sentencepiece_model, tmp_path
):
    for file in (bpe_directory / "tokenizer.json", sentencepiece_model):
        shutil.copy(file, tmp_path)
    assert isinstance(load_tokenizer(tmp_path), HuggingFaceTokenizer)


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_space_after_special_tokens_follows_tokenizer_json(sentencepiece_model, tmp_path, scheme):
    load_tokenizer(sentencepiece_model).save(tmp_path)
    file = tmp_path / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(file))
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.save(str(file))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("<s> little house", add_bos=False)
    spaces = 1 if scheme == "first" else 2  # tokenizer.model also puts its own
    assert b"".join(map(tokenizer.token_bytes, ids[1:])) == b" " * spaces + b"little house"


def test_bad_files_are_one_line_that_names_them(sentencepiece_model, bpe_directory, tmp_path):
    model = sentencepiece_model.read_bytes()
    pipeline = (bpe_directory / "tokenizer.json").read_bytes()
    decoder = json.dumps(json.loads(pipeline) | {"decoder": {"type": "WordPiece", "prefix": "#",
                                                            "cleanup": True}})  # fmt: skip
    cases = [
        ("tokenizer.model", b""),
        ("tokenizer.model", b"hello"),
        ("tokenizer.model", random.Random(3).randbytes(3000)),
        ("tokenizer.model", model[: len(model) // 2]),
        ("tokenizer.model", model[:-3]),
        ("tokenizer.model", b"AA== 0\nAQ== 1\n"),  # Llama 3's own
        ("tokenizer.json", b""),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"hidden_size": 64}'),
        ("tokenizer.json", b'{"model": 3}'),
        ("tokenizer.json", b"[" * 100_000),
        ("tokenizer.json", pipeline[: len(pipeline) // 2]),
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
