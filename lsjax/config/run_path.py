"""The path of a training run, and which of its saved steps is meant."""

import re
from pathlib import Path

from lsjax.config.errors import check


def split_step(path: str | Path) -> tuple[Path, int | str | None]:
    """`runs/a@200` is step 200 of runs/a, `runs/a@best` its best one, any other path is itself.

    A file or directory that has such a name is that file or directory.
    Raises ConfigError for what follows the @ of an existing directory and is neither.
    """
    path = Path(path)
    directory, at, step = path.name.rpartition("@")
    run = path.with_name(directory) if directory else path
    if not at or not directory or path.exists() or not run.is_dir():
        return path, None
    check(
        step == "best" or re.fullmatch(r"\d+", step) is not None,
        f"{path}: {step!r} is no step of {run}: write a number, or best",
    )
    return run, step if step == "best" else int(step)
