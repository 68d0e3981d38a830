"""Writes files atomically, copies those of buckets, and says what a failure means."""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lsjax.config import AnyPath, as_path, check, in_bucket

log = logging.getLogger(__name__)

TOKENIZER = re.compile(r"(tokenizer|special|generation).*\.(json|model)|chat_template\.jinja")
WEIGHTS = re.compile(r"config\.json|.+\.safetensors(\.index\.json)?")


def cache_directory() -> AnyPath:
    """The cache directory: $LSJAX_CACHE, else lsjax in $XDG_CACHE_HOME or ~/.cache."""
    return as_path(os.environ.get("LSJAX_CACHE") or _default_cache())


def local_cache() -> AnyPath:
    """The cache directory, or the default one if $LSJAX_CACHE is in a bucket."""
    directory = cache_directory()
    return _default_cache() if in_bucket(directory) else directory


def _default_cache() -> AnyPath:
    return as_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lsjax"


def one_line(error: BaseException) -> str:
    """A library's error message on one line, or the error's type if the message is empty."""
    return " ".join(str(error).split())[:600] or type(error).__name__


def cause(error: BaseException) -> str:
    """The innermost error, in which storage names array, file and problem, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error)


def read_json(
    file: AnyPath, error_type: type[ValueError], needs: Sequence[str] = ()
) -> dict[str, Any]:
    """The object in a JSON file. Raises `error_type` for anything else, or if it lacks a name of
    `needs`."""
    try:
        raw = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise error_type(f"{file}: is not JSON ({error}): download it again") from error
    if not isinstance(raw, dict):
        raise error_type(f"{file}: holds a {type(raw).__name__}, but must be a JSON object")
    for name in needs:
        if name not in raw:
            raise error_type(f"{file}: has no {name!r}: restore the file, or make it again")
    return raw


@contextmanager
def writing(file: AnyPath) -> Iterator[None]:
    """Raises an error of the system again, as an OSError with the file's name, the reason and the
    fix. The system's own names no file while an open file is written. Of nested contexts the
    outermost names the file."""
    try:
        yield
    except OSError as error:
        cause = error.__cause__ if error.errno is None else error
        if not isinstance(cause, OSError):  # it has a message of its own, as that of a bucket
            raise
        reason = cause.strerror or one_line(cause)
        raise OSError(
            f"{file} can't be written ({reason}): free space there, or choose another place, and "
            "start again"
        ) from cause


def write_json(file: AnyPath, content: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically: indented, with a newline at the end."""
    write_whole(file, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_whole(file: AnyPath, content: bytes) -> None:
    """Writes a file atomically: it appears under its name when it is complete."""
    with writing(file):
        if in_bucket(file):
            file.write_bytes(content)
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".partial-{uuid.uuid4().hex}")
        try:
            partial.write_bytes(content)
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def whole_directory(directory: AnyPath, last: str = "") -> Iterator[AnyPath]:
    """Yields a local directory to write into. If the block succeeds, it is renamed to `directory`,
    or its files are copied to the bucket.

    last: the file that is copied after all others, so that it marks a complete directory.
    If another process has created `directory` by then, that one stays.
    """
    parent = local_cache() if in_bucket(directory) else directory.parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=parent) as folder:
        partial = as_path(folder) / "whole"
        partial.mkdir()
        yield partial
        if not in_bucket(directory):
            try:
                partial.rename(directory)
            except OSError:
                if not directory.is_dir():
                    raise
            return
        from lsjax.config.buckets import file_system

        names = {str(file.relative_to(partial)) for file in partial.rglob("*") if file.is_file()}
        for some in (names - {last}, names & {last}):
            if last and (directory / last).exists():
                return
            if some:
                here, there = ([str(base / name) for name in some] for base in (partial, directory))
                file_system().put(here, there)


def remove_directory(directory: AnyPath) -> None:
    """Removes a directory with all that it holds, if it exists."""
    if in_bucket(directory):
        directory.rmtree(missing_ok=True)
    else:
        shutil.rmtree(directory, ignore_errors=True)


def local_copy(path: AnyPath, *, wanted: re.Pattern = TOKENIZER) -> AnyPath:
    """The path itself, or a copy in the cache if it is in a bucket. A changed file is copied again.

    path: directory of a model, tokenizer file, or GGUF file, which is copied with all its parts.
    wanted: names of the files to copy from a directory.

    Raises FileNotFoundError, and ConfigError if the disk has too little space.
    """
    if not in_bucket(path):
        return path
    from lsjax.config.buckets import bucket_files, file_system

    alone = path.is_file()
    if not alone and not path.is_dir():
        raise FileNotFoundError(f"{path}: does not exist: check the bucket and the name")
    folder, is_gguf = path.parent if alone else path, alone and path.suffix == ".gguf"
    pattern = re.sub(r"-\d{5}-of-", "-?????-of-", path.name) if is_gguf else "*"
    found = {}
    for place, entry in bucket_files(f"{folder}/{pattern}").items():
        name = place.rpartition("/")[2]
        if is_gguf or name == path.name or wanted.fullmatch(name):
            found[name] = entry["size"], entry["generation"]
    key = hashlib.sha256(f"{folder} {sorted(found.items())}".encode()).hexdigest()[:16]
    copy = local_cache() / "models" / f"{folder.name}-{key}"
    if not copy.is_dir():
        copy.parent.mkdir(parents=True, exist_ok=True)
        size, free = sum(size for size, _ in found.values()), shutil.disk_usage(copy.parent).free
        check(
            size < free,
            f"{path} has {size / 1e9:.1f} GB, but {copy.parent} has only {free / 1e9:.1f} GB free: "
            "remove old copies there, or set LSJAX_CACHE to a larger disk",
        )
        with whole_directory(copy) as partial:
            for name in found:
                file_system().get_file(str(folder / name), str(partial / name))
    return copy / path.name if alone else copy
