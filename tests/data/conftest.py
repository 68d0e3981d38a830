"""Small tokenizers of every kind, trained here, and texts that tell them apart."""

import json

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lsjax.data.tokenizer_backends import ByteTokenizer
from lsjax.data.tokenizer_files import LLAMA3_SPLIT, load_tokenizer, matched_words

CORPUS = [
    "def f(x):\n    return x + 12345\n\n        return 678",
    "The café isn't open. It's 20:45, they'll be naïve; 你好 world 🙂👍🏽 ",
    "    four  two   three     five spaces and <s> tags </s>",
    "once upon a time there was a little girl who lived in a little house",
] * 4
TEXTS = [
    *CORPUS[:4],
    "",
    " ",
    "     x     y",
    "year 2024 and 1234567",
    "unseen: żółć 🚀\x00\x07",
    "<s> literal </s>",
    "\r\n\t \n\n",
]


@pytest.fixture(scope="session")
def corpus():
    return CORPUS


@pytest.fixture(scope="session")
def texts():
    return TEXTS


def _train_bpe(pre_tokenizer):
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


@pytest.fixture(scope="session")
def train_bpe():
    """Trains a pipeline whose words come from the given pre-tokenizer."""
    return _train_bpe


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory):
    """A Llama-2-like model: BPE, bytes, a space put first, whitespace kept."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "corpus.txt").write_text("\n".join(CORPUS), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def bpe_directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    backend = _train_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": {"content": "<s>", "lstrip": False},
        "eos_token": "</s>",
        "add_bos_token": True,
        "chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    return folder


@pytest.fixture(scope="session")
def llama3_directory(tmp_path_factory):
    """Words as Llama 3 splits them, a begin token, and two tokens that end a text."""
    folder = tmp_path_factory.mktemp("llama3")
    _train_bpe(matched_words(LLAMA3_SPLIT)).save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    return folder


@pytest.fixture(params=["sentencepiece_model", "bpe_directory", "llama3_directory", "bytes"])
def any_tokenizer(request):
    if request.param == "bytes":
        return ByteTokenizer()
    return load_tokenizer(request.getfixturevalue(request.param))
