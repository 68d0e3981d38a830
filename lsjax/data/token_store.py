"""The tokens of a source: made once, kept on disk, and read from there without loading them.

A directory of the cache, named by a hash of the source's content, the tokenizer and all settings
that the tokens depend on:

    tokens.npy   the tokens of all documents, one after the other, uint16 or uint32
    starts.npy   where each document begins, and where the last one ends
    prompts.npy  how many of each document's tokens are its prompt
    keys.npy     the hash of each document
    store.json   a hash of the four, and their lengths
"""

import hashlib
import json
import os
import shutil
import uuid
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Int64, UInt64

from lsjax.config import DataConfig, check
from lsjax.data.documents import Document, Source
from lsjax.data.sources import document_source
from lsjax.data.tokenizer import Tokenizer, TokenizerError

FORMAT = 2  # to be raised when other code makes other tokens of the same text
ARRAYS = ("tokens", "starts", "prompts", "keys")
BLOCK = 1 << 20  # tokens that are written at a time
# Characters that SentencePiece seldom joins with what follows; its normalizers drop the first.
MARKS = ("\x01", ".", ":", "0", "\u4e00")


def cache_directory() -> Path:
    """For files that can be made again: $LSJAX_CACHE, else lsjax below $XDG_CACHE_HOME or
    ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LSJAX_CACHE") or Path(base) / "lsjax")


@dataclass(frozen=True, eq=False)
class TokenStore:
    """Tokens of N documents: document n is tokens[starts_N1[n] : starts_N1[n + 1]].

    tokens: 1-D, memory-mapped. fingerprint: hash (hex) of all four arrays.
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
    """The tokens of the config's source, or of its own validation set; made unless in the cache.

    Raises ConfigError where data are missing or can't be read, where no document is found, and for
    a tokenizer without the end token that the config asks for.
    """
    check(
        not config.append_end or bool(tokenizer.eos_ids),
        "this tokenizer has no end token: set append_end to False",
    )
    end = next(iter(tokenizer.eos_ids), 0)
    check(
        not config.append_end or end < tokenizer.vocab_size,
        f"the end token {end} has no row in the model's table of {tokenizer.vocab_size} rows: set "
        "append_end to False, or enlarge the model's vocabulary",
    )
    source = document_source(config, validation=validation)
    limit = None if validation else config.max_documents
    directory = cache / "tokens" / _name(config, tokenizer, source, limit)
    was_there = directory.is_dir()  # then it was whole: directories appear when they are
    store = _load(directory)
    if store is None:
        if was_there:
            shutil.rmtree(directory, ignore_errors=True)
        with whole_directory(directory) as partial:
            _write(partial, config, tokenizer, source, limit)
        store = _load(directory)
        check(store is not None, f"{directory} can't be read back: is the disk in order?")
    return store


def encode_document(
    document: Document, config: DataConfig, tokenizer: Tokenizer
) -> tuple[list[int], int]:
    """Token ids of a document, and how many of them are its prompt.

    A prompt is encoded by itself, as it is when decoding; the beginning-of-text token, where the
    tokenizer adds one, is part of it.
    """
    special = config.allow_special
    if config.has_prompts:
        prompt = tokenizer.encode(document.prompt, allow_special=special)
        ids = prompt + _continuation(document.text, tokenizer, special)
    else:
        prompt, ids = [], tokenizer.encode(document.text, allow_special=special)
    return ids + [*tokenizer.eos_ids[:1]] * config.append_end, len(prompt)


def _continuation(text: str, tokenizer: Tokenizer, special: bool) -> list[int]:
    """Ids of a text that goes on, without the space that SentencePiece puts before a text."""
    if not tokenizer.leading_spaces:
        return tokenizer.encode(text, add_bos=False, allow_special=special)
    for mark in MARKS:
        alone = tokenizer.encode(mark, add_bos=False)
        ids = tokenizer.encode(mark + text, add_bos=False, allow_special=special)
        if tokenizer.decode(alone) == mark and ids[: len(alone)] == alone:
            return ids[len(alone) :]
    raise TokenizerError(f"the tokenizer joins {text[:40]!r} with whatever stands before it")


def _load(directory: Path) -> TokenStore | None:
    """The store in a directory; None if it is not there, or not as it was written."""
    try:
        about = json.loads((directory / "store.json").read_text())
        arrays = [np.load(directory / f"{name}.npy", mmap_mode="r") for name in ARRAYS]
        if [len(array) for array in arrays] != about["lengths"]:
            return None
    except (OSError, ValueError, LookupError, EOFError):
        return None
    tokens, *others = arrays
    # A plain view of the tokens: slices of a memmap cost several times those of an array.
    return TokenStore(tokens.view(np.ndarray), *map(np.array, others), about["fingerprint"])


def _name(config: DataConfig, tokenizer: Tokenizer, source: Source, limit: int | None) -> str:
    made_of = [
        *(FORMAT, source.fingerprint(), tokenizer.fingerprint, tokenizer.add_bos, limit),
        *(tokenizer.bos_id, tokenizer.eos_ids[:1], config.append_end, config.allow_special),
        tokenizer.vocab_size,
        *(config.source, config.separator),
        *(config.text_template, config.prompt_template, config.response_template),
    ]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]


def _write(
    folder: Path, config: DataConfig, tokenizer: Tokenizer, source: Source, limit: int | None
) -> None:
    small = tokenizer.vocab_size <= 1 << 16
    starts, prompts, keys = array("q", [0]), array("i"), array("Q")
    raw, held = folder / "tokens.raw", array("H" if small else "I")
    # Here, because decoding works without it.
    from rich.console import Console
    from rich.progress import Progress

    with raw.open("wb") as file, Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"tokens of {source.name}", total=source.num_bytes())
        for document in islice(source.documents(), limit):
            ids, prompt = encode_document(document, config, tokenizer)
            held.extend(ids)
            starts.append(starts[-1] + len(ids))
            prompts.append(prompt)
            keys.append(document.key)
            progress.advance(task, len(document.prompt) + len(document.text))
            if len(held) >= BLOCK:
                held.tofile(file)
                del held[:]
        held.tofile(file)
    check(len(keys) > 0, f"{source.name} holds no text: every document of it is empty")
    dtype = np.uint16 if small else np.uint32
    tokens = np.memmap(raw, dtype=dtype, mode="r", shape=(starts[-1],))
    arrays = (tokens, np.array(starts), np.array(prompts), np.array(keys))
    digest = hashlib.sha256()
    for name, values in zip(ARRAYS, arrays, strict=True):
        np.save(folder / f"{name}.npy", values)
        digest.update(values.data)
    raw.unlink()
    about = {"fingerprint": digest.hexdigest(), "lengths": [len(values) for values in arrays]}
    (folder / "store.json").write_text(json.dumps(about))


def write_whole(file: Path, content: bytes) -> None:
    """Writes a file under another name first, and then renames it."""
    partial = _partial(file)
    try:
        partial.write_bytes(content)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
    """A directory to write into, which takes the given name when the block has ended well.

    If another process has finished the same one by then, that one stays.
    """
    partial = _partial(directory)
    partial.mkdir()
    try:
        yield partial
        try:
            partial.rename(directory)
        except OSError:
            if not directory.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".partial-{uuid.uuid4().hex}")
