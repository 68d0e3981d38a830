"""Tokens of a source: computed once, cached on disk, and memory-mapped.

Each store is a directory of the cache, named by a hash of everything that determines the tokens:

    tokens.bin     tokens of all documents, one document after another, uint16 or uint32
    documents.npz  the other arrays of a `TokenStore`, and the fingerprint of all
"""

import hashlib
import json
import shutil
from array import array
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Int32, Int64, UInt64
from rich.console import Console
from rich.progress import Progress

from lsjax.config import DataConfig, check
from lsjax.data.files import whole_directory
from lsjax.data.sources import Document, Source, document_source
from lsjax.data.tokenizer import Tokenizer, TokenizerError

FORMAT = 3  # raise it if the code makes other tokens from the same text, or other files
# SentencePiece rarely joins these with the next character. Its normalizers drop the first.
MARKS = ("\x01", ".", ":", "0", "\u4e00")


@dataclass(frozen=True, eq=False)
class TokenStore:
    """Tokens of N documents: document n is tokens[starts_N1[n] : starts_N1[n + 1]].

    tokens: memory-mapped. prompts_N: prompt tokens of each document. keys_N: `Document.key`.
    fingerprint: hash (hex) of all four arrays.
    """

    tokens: np.ndarray
    starts_N1: Int64[np.ndarray, "N+1"]
    prompts_N: Int32[np.ndarray, "N"]
    keys_N: UInt64[np.ndarray, "N"]
    fingerprint: str

    @property
    def lengths_N(self) -> Int64[np.ndarray, "N"]:
        """Number of tokens of each document."""
        return np.diff(self.starts_N1)


def token_store(
    config: DataConfig, tokenizer: Tokenizer, *, cache: Path, validation: bool = False
) -> TokenStore:
    """Tokens of the config's source, or of its separate validation set; cached.

    Raises ConfigError if data are missing or unreadable, or if there is no document. Also raises it
    if the tokenizer lacks the end token that the config requests.
    """
    end = next(iter(tokenizer.eos_ids), tokenizer.vocab_size)
    check(
        not config.append_end or end < tokenizer.vocab_size,
        f"this tokenizer has no end token among the {tokenizer.vocab_size} rows of the model's "
        "table: set append_end to False",
    )
    source = document_source(config, validation=validation)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    directory = cache / "tokens" / _name(config, tokenizer, source)
    was_there = directory.is_dir()  # then it was complete: directories are renamed into place
    store = _load(directory, dtype)
    if store is None:
        if was_there:
            shutil.rmtree(directory, ignore_errors=True)
        with whole_directory(directory) as partial:
            _write(partial, config, tokenizer, source, dtype)
        store = _load(directory, dtype)
        check(store is not None, f"{directory} cannot be read back: check the disk")
    return store


def encode_document(
    document: Document, config: DataConfig, tokenizer: Tokenizer
) -> tuple[list[int], int]:
    """Token ids of a document, and the number of prompt tokens.

    The prompt is encoded separately, as in decoding, and includes a beginning-of-text token.
    """
    special = config.allow_special
    if config.has_prompts:
        prompt = tokenizer.encode(document.prompt, allow_special=special)
        ids = prompt + _continuation(document.text, tokenizer, special)
    else:
        prompt, ids = [], tokenizer.encode(document.text, allow_special=special)
    return ids + [*tokenizer.eos_ids[:1]] * config.append_end, len(prompt)


def _continuation(text: str, tokenizer: Tokenizer, special: bool) -> list[int]:
    """Ids of a continuation, without the space that SentencePiece puts before a text."""
    if not tokenizer.leading_spaces:
        return tokenizer.encode(text, add_bos=False, allow_special=special)
    for mark in MARKS:
        alone = tokenizer.encode(mark, add_bos=False)
        ids = tokenizer.encode(mark + text, add_bos=False, allow_special=special)
        if tokenizer.decode(alone) == mark and ids[: len(alone)] == alone:
            return ids[len(alone) :]
    raise TokenizerError(f"the tokenizer joins {text[:40]!r} with its prompt: use another one")


def _name(config: DataConfig, tokenizer: Tokenizer, source: Source) -> str:
    made_of = [
        *(FORMAT, source.fingerprint(), tokenizer.fingerprint, tokenizer.add_bos, source.limit),
        *(tokenizer.bos_id, tokenizer.eos_ids[:1], config.append_end, config.allow_special),
        *(tokenizer.vocab_size, config.source, config.separator),
        *(config.text_template, config.prompt_template, config.response_template),
    ]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]


def _write(
    folder: Path, config: DataConfig, tokenizer: Tokenizer, source: Source, dtype: np.dtype
) -> None:
    starts, prompts, keys, digest = array("q", [0]), array("i"), array("Q"), hashlib.sha256()
    size = sum(file.stat().st_size for file in source.files)
    progress = Progress(console=Console(stderr=True), transient=True)
    with (folder / "tokens.bin").open("wb") as file, progress:
        task = progress.add_task(f"tokens of {source.name}", total=size)
        for document in source.documents():
            ids, prompt = encode_document(document, config, tokenizer)
            tokens = np.array(ids, dtype).tobytes()
            file.write(tokens)
            digest.update(tokens)
            starts.append(starts[-1] + len(ids))
            prompts.append(prompt)
            keys.append(document.key)
            progress.advance(task, len(document.prompt) + len(document.text))
    check(len(keys) > 0, f"{source.name} holds no text: every document is empty, check its files")
    for numbers in (starts, prompts, keys):
        digest.update(numbers)
    arrays = {"starts": starts, "prompts": prompts, "keys": keys, "fingerprint": digest.hexdigest()}
    np.savez(folder / "documents.npz", **arrays)


def _load(directory: Path, dtype: np.dtype) -> TokenStore | None:
    """The store in a directory; None if missing or damaged."""
    try:
        with np.load(directory / "documents.npz") as arrays:
            starts_N1, prompts_N, keys_N = (arrays[k] for k in ("starts", "prompts", "keys"))
            fingerprint = str(arrays["fingerprint"])
        tokens = np.memmap(directory / "tokens.bin", dtype, "r", shape=(int(starts_N1[-1]),))
    except (OSError, ValueError, LookupError, EOFError, BadZipFile):
        return None
    # A plain view of the tokens: slicing a memmap is slower than slicing an array.
    return TokenStore(tokens.view(np.ndarray), starts_N1, prompts_N, keys_N, fingerprint)
