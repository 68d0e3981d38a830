"""The tokenizer that a configuration names, and vocabularies trained here."""

import hashlib
import heapq
import io
import json
from collections.abc import Iterable

import sentencepiece

from lsjax.config import AnyPath, ConfigError, DataConfig, as_path, check
from lsjax.data.pieces import Document, is_held_out
from lsjax.data.sources import document_source
from lsjax.data.tokenizer import Tokenizer
from lsjax.data.tokenizer_backends import ByteTokenizer, SentencePieceTokenizer
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.io.files import one_line, write_whole

SAMPLE = 20_000_000  # maximum number of characters to train a vocabulary on
SETTINGS = dict(
    model_type="bpe",
    byte_fallback=True,  # decoding restores any text
    split_digits=True,
    normalization_rule_name="identity",
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    allow_whitespace_only_pieces=True,  # indentation
    max_sentence_length=1 << 20,
    num_threads=1,  # the same vocabulary each time
)


def make_tokenizer(config: DataConfig, *, cache: AnyPath) -> Tokenizer:
    """The tokenizer of config.tokenizer; training one reads only the training documents.

    Raises ConfigError (no data, or too little text for the vocabulary), TokenizerError (a path).
    """
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if config.tokenizer != "sentencepiece":
        return load_tokenizer(as_path(config.tokenizer).expanduser())
    source, fraction = document_source(config), config.held_out_fraction
    # Found by the files' names, sizes and times, so that a later start reads none of them.
    known = [sentencepiece.__version__, SETTINGS, repr(config), source.stats()]
    name = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]
    file = cache / "vocabularies" / f"of-{name}.model"
    if not file.is_file():
        training = (one for one in source.documents() if not is_held_out(one.key, fraction))
        write_whole(file, train_tokenizer(training, config.vocab_size).model)
    return SentencePieceTokenizer(file.read_bytes())


def train_tokenizer(documents: Iterable[Document], vocab_size: int) -> SentencePieceTokenizer:
    """Trains a SentencePiece BPE of vocab_size: <unk> 0, <s> 1, </s> 2, 256 bytes, then pieces.

    Decoding restores the text exactly. Equal documents in any order give an equal vocabulary.
    If there are more than SAMPLE characters, it reads a random part.

    Raises ConfigError if there is too little text, or too many different characters.
    """
    texts = _sample(documents)
    check(bool(texts), "there are no documents to train a vocabulary on: check the source")
    model, lines = io.BytesIO(), (line for text in texts for line in text.split("\n") if line)
    options = dict(sentence_iterator=lines, model_writer=model, minloglevel=2)
    try:
        sentencepiece.SentencePieceTrainer.train(vocab_size=vocab_size, **options, **SETTINGS)
    except RuntimeError as error:
        characters = sum(map(len, texts))
        raise ConfigError(
            f"SentencePiece cannot train a vocabulary of {vocab_size} on {characters} characters "
            f"of text ({one_line(error)}): set another data.vocab_size, or data.tokenizer bytes"
        ) from error
    return SentencePieceTokenizer(model.getvalue())


def _sample(documents: Iterable[Document]) -> list[str]:
    """Texts with the smallest hashes, in that order: up to SAMPLE characters, or one text."""
    kept: list[tuple[int, str]] = []  # a heap, the largest hash on top
    total, bound = 0, 1 << 64
    for document in documents:
        if document.key >= bound:
            continue
        text = document.prompt + document.text
        heapq.heappush(kept, (-document.key, text))
        total += len(text)
        while total > SAMPLE and len(kept) > 1:
            key, text = heapq.heappop(kept)
            total, bound = total - len(text), -key
    return [text for _, text in sorted(kept, reverse=True)]
