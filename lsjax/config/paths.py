"""Paths on a local disk or in a gs:// bucket, and the one place where text becomes a path.

etils.epath and gcsfs reach buckets. Their paths behave here like pathlib's on disks.
"""

import glob
import logging
import os
import pathlib
import re
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import fsspec
from etils import epath
from fsspec.config import conf

from lsjax.config.checked import check

# Base class of local paths (pathlib.Path) and of paths in buckets (BucketPath). Both have pathlib's
# methods. It is for annotations; `as_path` makes paths.
Path = pathlib.PurePath
_BUCKET = re.compile("gs:/+")  # pathlib turns gs://bucket into gs:/bucket
_OTHER = re.compile(r"\w+://")
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs errors that it also raises
# Otherwise a listing hides what other processes have written since.
conf.setdefault("gs", {}).setdefault("use_listings_cache", False)


def as_path(path: str | Path) -> Path:
    """The path that a text names: in a bucket after gs://, else on a local disk.

    Raises ConfigError for another kind of URL, or without the package that reaches buckets.
    """
    bucket = _BUCKET.match(str(path))
    if bucket is not None:
        check(
            find_spec("gcsfs") is not None,
            "gs:// paths need the gcsfs package: pip install 'lsjax[gcs]'",
        )
        os.environ.setdefault("EPATH_USE_TF", "false")  # gcsfs, whatever else is installed
        return BucketPath(f"gs://{str(path)[bucket.end() :]}")
    check(
        _OTHER.match(str(path)) is None,
        f"{path} is neither a local path nor one in a gs:// bucket: copy it there",
    )
    return pathlib.Path(path)


def in_bucket(path: Path) -> bool:
    """Whether a path is in a bucket."""
    return not isinstance(path, pathlib.Path)


def split_step(path: str | Path) -> tuple[Path, int | str | None]:
    """`runs/a@200` is step 200 of runs/a, `runs/a@best` its best one, any other path is itself.

    An existing file or directory of that name takes precedence.
    Raises ConfigError if neither a number nor "best" follows an existing directory and an @.
    """
    path = as_path(path)
    directory, at, step = path.name.rpartition("@")
    run = path.with_name(directory) if directory else path
    if not at or not directory or path.exists() or not run.is_dir():
        return path, None
    check(
        step == "best" or re.fullmatch(r"\d+", step) is not None,
        f"{path}: {step!r} is not a step of {run}: write a number, or best",
    )
    return run, step if step == "best" else int(step)


def find_files(paths: Sequence[str]) -> list[Path]:
    """Files that match the paths and patterns (*, ?, [...], ** for directories), each once.

    Matches of a pattern are sorted. Raises ConfigError if a path or pattern matches no file.
    """
    found: dict[Path, None] = {}
    for path in paths:
        literal = as_path(path).expanduser()
        check(
            not literal.is_dir(),
            f"{path} is a directory: name its files, such as {path.rstrip('/')}/**/*.txt",
        )
        # An existing path is taken literally, even if it looks like a pattern.
        if literal.is_file():
            files = [literal]
        elif in_bucket(literal):
            files = [as_path(f"gs://{name}") for name in bucket_files(str(literal))]
        else:
            matches = sorted(glob.glob(str(literal), recursive=True))
            files = [file for file in map(as_path, matches) if file.is_file()]
        check(bool(files), f"no file matches {path}: check the path and the current directory")
        found |= dict.fromkeys(files)
    return list(found)


def bucket_files(pattern: str) -> dict[str, dict[str, Any]]:
    """Names of the files in a bucket that match a pattern, sorted, and what the bucket knows."""
    try:
        found = file_system().glob(pattern, detail=True)
    except FileNotFoundError:  # no such bucket
        return {}
    return {name: found[name] for name in sorted(found) if found[name]["type"] == "file"}


def file_system() -> Any:
    """The fsspec file system of gs:// paths."""
    return fsspec.filesystem("gs", finalize_on_close=True)


class BucketPath(type(epath.Path("gs://"))):
    """A path in a bucket, which has files and their prefixes, but no directories."""

    def resolve(self, strict: bool = False) -> "BucketPath":
        """The path itself."""
        return self

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing. epath would create a missing bucket."""

    def is_dir(self) -> bool:
        """Whether there are files below. Raises the bucket's errors; epath returns False."""
        return self._kind() == "directory"

    def is_file(self) -> bool:
        """Whether this is a file; raises the bucket's errors."""
        return self._kind() == "file"

    def _kind(self) -> str | None:
        try:
            return file_system().info(str(self))["type"]
        except FileNotFoundError:
            return None
        except Exception as error:  # of the network, the bucket, or the account's rights
            raise OSError(
                f"{self} cannot be reached ({error}): check the bucket, and that this account may "
                "use it"
            ) from error

    def stat(self) -> Any:
        """Size, and time of the last change, by the names of os.stat."""
        found = file_system().info(str(self))
        written = int(found.get("generation", 0))  # in microseconds
        return SimpleNamespace(st_size=found["size"], st_mtime_ns=1000 * written)

    def write_bytes(self, data: bytes) -> int:
        """Writes a file, which appears when it is complete."""
        with suppress(FileNotFoundError):  # a failing server may forget a large upload
            return super().write_bytes(data)
        try:
            return super().write_bytes(data)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{self} can't be written, as there is no such bucket: create it, or name another"
            ) from None
