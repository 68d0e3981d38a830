"""What of a run's configuration may change when it goes on."""

import json

from lsjax.config.errors import ConfigError
from lsjax.config.json_form import differences, to_json
from lsjax.config.train import TrainConfig

# How the work is done and shown; all else says what is computed, and would make another run of it.
MAY_CHANGE = frozenset(
    ("mesh", "micro_batches", "remat", "checkpoints", "evaluation", "max_skipped", "tensorboard")
)


def check_resume(saved: TrainConfig, config: TrainConfig, run: str) -> None:
    """Raises ConfigError, with the field and both values, where a run that was begun with one
    config cannot go on with another. A config without a model takes the run's."""
    changed = [
        (path, before, now)
        for path, before, now in differences(to_json(saved), to_json(config))
        if path.partition(".")[0] not in MAY_CHANGE and not (path == "model" and now is None)
    ]
    if not changed:
        return
    path, before, now = changed[0]
    others = ", ".join(path for path, _, _ in changed[1:])
    raise ConfigError(
        f"{run} was begun with {path} {json.dumps(before)}, not {json.dumps(now)}"
        + (f" (and other values of {others})" if others else "")
        + ": go on with the old values, or begin another run in a new directory"
    )
