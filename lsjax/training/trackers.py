"""TensorBoard and Weights & Biases, which show the numbers of metrics.jsonl."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lsjax.config import ConfigError, Path, in_bucket
from lsjax.data.files import local_cache, one_line, remove_directory

Row = Mapping[str, Any]  # {"kind": ..., "step": n, ...}
Tracker = Callable[[Row], None]  # called with each row that follows the kept ones of metrics.jsonl


@contextmanager
def tensorboard(directory: Path, kept: Sequence[Row]) -> Iterator[Tracker]:
    """Event files in tensorboard/. They hide rows of earlier starts after the kept ones."""
    from tensorboardX import SummaryWriter

    def write(row: Row) -> None:
        for name, number in numbers(row).items():
            board.add_scalar(name, number, row["step"])

    first = kept[-1]["step"] + 1
    with SummaryWriter(str(directory / "tensorboard"), purge_step=first) as board:
        yield write


@contextmanager
def weights_and_biases(directory: Path, kept: Sequence[Row], config: dict) -> Iterator[Tracker]:
    """One run at Weights & Biases, however often it starts: its id is the time when it began.

    wandb loses the last steps of a killed process. So each start sends the kept rows that the
    server lacks. Offline it writes all of them, and removes the files of earlier starts.
    Raises ConfigError if wandb can't start.
    """
    import wandb

    run_id = f"{round(1e6 * kept[-1]['began']):x}"
    folder = local_cache() if in_bucket(directory) else directory.absolute()
    for old in (folder / "wandb").glob(f"offline-run-*-{run_id}"):
        remove_directory(old)
    settings = wandb.Settings(console="off")  # it would capture the progress bar
    about = dict(name=directory.name, config=config, dir=str(folder), settings=settings)
    try:
        run = wandb.init(id=run_id, resume="allow", **about)
    except wandb.Error as error:
        fix = "run `wandb login`, set WANDB_MODE=offline, or leave --wandb out"
        raise ConfigError(f"wandb can't start ({one_line(error)}): {fix}") from error
    first = run.step  # that the server lacks

    def write(row: Row) -> None:
        if row["step"] >= first:
            run.log(numbers(row), step=row["step"])

    with run:
        for row in kept:
            write(row)
        yield write


def numbers(row: Row) -> dict[str, float]:
    """The numbers of a row by kind/field; those of a list by kind/field/1 and so on."""
    flat: dict[str, Any] = {}
    for name in row.keys() - {"kind", "step"}:
        key, value = f"{row['kind']}/{name}", row[name]
        items = enumerate(value, start=1) if isinstance(value, list) else ()
        flat |= {f"{key}/{index}": item for index, item in items} or {key: value}
    return {key: value for key, value in flat.items() if type(value) in (int, float)}
