"""What may change between the parts of one run."""

from dataclasses import asdict, replace

from lsjax.config import TrainConfig, check
from lsjax.config.json_form import differences

# How the steps are computed, saved and shown, and not what they are.
FREE = frozenset(
    {
        "mesh",
        "checkpoints",
        "evaluation",
        "tensorboard",
        "max_skipped",
        "micro_batches",
        "remat",
        "attention",
        "dtype",
        "init_from",
        # Where the data and the tokenizer lie. Their contents are compared by their fingerprints.
        "data.paths",
        "data.validation_paths",
        "data.tfds_data_dir",
        "data.tokenizer",
        # Of a model that has begun to learn:
        "model.init_std",
        "model.scaled_init",
        "model.max_context",
    }
)


def check_same_run(before: TrainConfig, now: TrainConfig, where: str) -> TrainConfig:
    """The configuration to go on with; its model is that of the run.

    Raises ConfigError for the first field that makes it another run: schedules are stretched over
    num_steps, and the order of the data follows from the seed.
    """
    if now.model is None:
        now = replace(now, model=before.model)
    for path, old, new in differences(asdict(before), asdict(now)):
        check(
            path in FREE or path.partition(".")[0] in FREE,
            f"{where} was begun with {path} {old}, now it is {new}: a run can't change it; take "
            "another --workdir, or the value of before",
        )
    return replace(now, model=before.model)
