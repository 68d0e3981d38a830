"""Paths on a local disk or in a bucket, and the one place where text becomes a path."""

import logging
import os
import pathlib
import re
from functools import cache
from importlib.util import find_spec
from typing import Any

from lsjax.config.checked import check

# Base class of local paths (pathlib.Path) and of paths in buckets (etils.epath.Path). Both have
# pathlib's methods. It is for annotations; `as_path` makes paths.
Path = pathlib.PurePath
_BUCKET = re.compile("gs:/+")  # pathlib turns gs://bucket into gs:/bucket
_OTHER = re.compile(r"\w+://")


def as_path(path: str | Path) -> Path:
    """The path that a text names: in a bucket after gs://, else on a local disk.

    Raises ConfigError for another kind of URL, or without the package that reaches buckets.
    """
    bucket = _BUCKET.match(str(path))
    if bucket is not None:
        return _bucket_paths()(f"gs://{str(path)[bucket.end() :]}")
    check(
        _OTHER.match(str(path)) is None,
        f"{path} is neither a local path nor one in a gs:// bucket: copy it there",
    )
    return pathlib.Path(path)


def in_bucket(path: Path) -> bool:
    """Whether a path is in a bucket."""
    return not isinstance(path, pathlib.Path)


@cache
def _bucket_paths() -> type[Path]:
    check(
        find_spec("gcsfs") is not None,
        "gs:// paths need the gcsfs package: pip install 'lsjax[gcs]'",
    )
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs errors that it also raises
    os.environ.setdefault("EPATH_USE_TF", "false")  # one file system, whatever is installed
    import fsspec.config
    from etils import epath

    # Otherwise a listing hides what other processes have written since.
    fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)
    return epath.Path


def absolute(path: Path) -> Path:
    """The path from the root; those in buckets begin there."""
    return path if in_bucket(path) else path.absolute()


def file_system() -> Any:
    """The fsspec file system of gs:// paths."""
    import fsspec

    return fsspec.filesystem("gs", finalize_on_close=True)


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
