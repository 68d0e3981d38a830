"""Paths on a local disk or in a bucket, and the one place where text becomes a path."""

import glob
import os
import pathlib
import re
from collections.abc import Sequence
from importlib.util import find_spec

from lsjax.config.checked import check

# Base class of local paths (pathlib.Path) and of paths in buckets (BucketPath). Both have pathlib's
# methods. It is for annotations; `as_path` makes paths.
AnyPath = pathlib.PurePath


def as_path(path: str | AnyPath) -> AnyPath:
    """The path that a text names: in a bucket after gs://, else on a local disk.

    Raises ConfigError for an empty text, another kind of URL, and without the package that reaches
    buckets.
    """
    check(str(path) != "", "a path is empty: name a file or a directory")
    bucket = re.match("gs:/+", str(path))  # pathlib turns gs://bucket into gs:/bucket
    if bucket is not None:
        check(
            find_spec("gcsfs") is not None,
            "gs:// paths need the gcsfs package: pip install 'lsjax[gcs]'",
        )
        os.environ.setdefault("EPATH_USE_TF", "false")  # gcsfs, whatever else is installed
        from lsjax.config.buckets import BucketPath

        return BucketPath(f"gs://{str(path)[bucket.end() :]}")
    check(
        re.match(r"\w+://", str(path)) is None,
        f"{path} is neither a local path nor one in a gs:// bucket: copy it there",
    )
    return pathlib.Path(path)


def in_bucket(path: AnyPath) -> bool:
    """Whether a path is in a bucket."""
    return not isinstance(path, pathlib.Path)


def split_step(path: str | AnyPath) -> tuple[AnyPath, int | str | None]:
    """`runs/a@200` is step 200 of runs/a, `runs/a@best` its best one, any other path is itself.

    An existing file or directory of that name takes precedence.
    Raises ConfigError if neither a number nor "best" follows an existing path and an @.
    """
    path = as_path(path)
    directory, at, step = path.name.rpartition("@")
    run = path.with_name(directory) if directory else path
    if not at or not directory or path.exists() or not run.exists():
        return path, None
    check(
        step == "best" or re.fullmatch(r"\d+", step) is not None,
        f"{path}: {step!r} is not a step of {run}: write a number, or best",
    )
    return run, step if step == "best" else int(step)


def find_data(paths: Sequence[str]) -> tuple[list[AnyPath], tuple[str, ...]]:
    """Files of `find_files` that hold something, and a line about the empty ones, if there are any.

    Raises ConfigError if all are empty.
    """
    files = find_files(paths)
    found = [file for file in files if file.stat().st_size]
    names = " ".join(paths)
    check(bool(found) or not paths, f"{names}: every file is empty: name others")
    warning = f"{names}: {len(files) - len(found)} of {len(files)} files are empty and skipped"
    return found, (warning,) if len(found) < len(files) else ()


def find_files(paths: Sequence[str]) -> list[AnyPath]:
    """Files that match the paths and patterns (*, ?, [...], ** for directories), each once.

    Matches of a pattern are sorted. Raises ConfigError if a path or pattern matches no file.
    """
    found: dict[AnyPath, None] = {}
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
            from lsjax.config.buckets import bucket_files

            files = [as_path(f"gs://{name}") for name in bucket_files(str(literal))]
        else:
            matches = sorted(glob.glob(str(literal), recursive=True))
            files = [file for file in map(as_path, matches) if file.is_file()]
        check(bool(files), f"no file matches {path}: check the path and the current directory")
        found |= dict.fromkeys(files)
    return list(found)
