"""Paths on a local disk or in a bucket, and the one place where text becomes a path."""

import os
import pathlib
import re
from importlib.util import find_spec

from lsjax.config.checked import check

# Base class of local paths (pathlib.Path) and of paths in buckets (BucketPath). Both have pathlib's
# methods. It is for annotations; `as_path` makes paths.
Path = pathlib.PurePath
_BUCKET = re.compile("gs:/+")  # pathlib turns gs://bucket into gs:/bucket
_OTHER = re.compile(r"\w+://")


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
        from lsjax.config.buckets import BucketPath

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
