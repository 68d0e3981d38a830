"""Preparation of a run before anything is compiled: checks its input, reads data, writes files.

Decoding uses two of the files: token_counts.json says how often each token is a label, to choose a
draft vocabulary. prompts.jsonl holds beginnings of held-out rows, for --prompt-file.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import Mesh

from lsjax.checkpoints import open_checkpoint
from lsjax.checkpoints.run import (
    CHECKPOINTS,
    begin_run,
    held_out_losses,
    is_run,
    read_recipe,
    read_run_config,
)
from lsjax.checkpoints.steps import saved_steps
from lsjax.config import AnyPath, EvaluationConfig, LlamaConfig, MeshConfig, TrainConfig, check
from lsjax.config.checked import differences
from lsjax.data.pipeline import OnePass, Pipeline, packed_rows
from lsjax.data.shards import SPLITS
from lsjax.data.token_counts import COUNTS, write_counts
from lsjax.data.token_rows import Share, TokenRows
from lsjax.data.tokenizer import Tokenizer
from lsjax.data.vocabulary import make_tokenizer
from lsjax.io.files import cache_directory, write_whole
from lsjax.model.lora import num_adapter_params
from lsjax.sharding import make_mesh, own_rows, placed_rows
from lsjax.training.hosts import check_same, in_turn, is_first, wait_to_see
from lsjax.training.recipe import PAPER, Recipe
from lsjax.training.step import check_rows
from lsjax.training.writer import Writer

PROMPTS = "prompts.jsonl"
COUNTED = 4_000_000  # tokens counted for the draft vocabulary
# Fields that a resumed run may change: they do not affect the results of steps.
FREE = {
    *("mesh", "checkpoints", "evaluation", "tensorboard", "wandb", "profile", "max_skipped"),
    *("micro_batches", "remat", "attention", "kernels", "dtype", "init_from"),
    # Paths of the data and the tokenizer. Fingerprints compare their contents.
    *("data.paths", "data.validation_paths", "data.tfds_data_dir", "data.tokenizer"),
    # Fields of a model that has weights already.
    *("model.init_std", "model.scaled_init", "model.max_context"),
}


@dataclass(frozen=True)
class TrainingRun:
    """A run that is ready for compilation."""

    config: TrainConfig  # with the model's shape
    writer: Writer  # of the run's directory
    resumes: bool  # whether the directory already contains this run
    mesh: Mesh | None
    tokenizer: Tokenizer
    pipeline: Pipeline  # the training rows of this host
    held_out: OnePass
    sample_prompt: list[int]  # tokens that samples continue
    losses: dict[int, float]  # held-out loss by step (`held_out_losses`); evaluations add more
    recipe: Recipe

    @property
    def workdir(self) -> AnyPath:
        """Directory of the run."""
        return self.writer.directory

    def place(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Places a batch of this host's rows on their devices."""
        return placed_rows(batch, self.config.batch_size, self.mesh)

    def data_position(self) -> dict[str, Any]:
        """Position in the data, for `resume_data` and JSON."""
        return {**self.pipeline.state(), "held_out": self.held_out.rows.fingerprint}

    def resume_data(self, position: Mapping[str, Any]) -> None:
        """Resumes at a position in the data. Raises ConfigError if the data differ."""
        self.pipeline.restore(position)
        now = self.held_out.rows.fingerprint
        before = position.get("held_out", now)  # older checkpoints lack this entry
        check(
            before == now,
            "the validation data differ from those that the run began with (fingerprint "
            f"{before}, now {now}): give the same data, or start a new run",
        )

    def describe(self) -> str:
        """Two lines: the model and the data."""
        config, rows = self.config, self.pipeline.rows
        tokens = config.num_steps * config.batch_size * config.seq_len
        adapters = ""
        if config.lora.rank > 0:
            trained = num_adapter_params(config.model, config.lora)
            share = trained / config.model.num_params
            adapters = f" ({trained / 1e6:.2f}M of adapters are trained, {share:.1%})"
        return (
            f"{self.workdir}: {config.model.num_params / 1e6:.1f}M parameters{adapters}, "
            f"{config.model.num_layers} layers; {config.num_steps} steps of {config.batch_size} x "
            f"{config.seq_len} tokens, {tokens / len(rows) / rows.seq_len:.2g} passes over\n"
            f"{rows.describe()}"
        )


def prepare_run(
    config: TrainConfig,
    writer: Writer,
    recipe: Recipe = PAPER,
    warn: Callable[[str], None] = print,
) -> TrainingRun:
    """Checks the configuration, reads the data, and writes the first files of the run. warn: called
    with a line if the run began with another recipe. Raises ConfigError, CheckpointError,
    TokenizerError or OSError for bad input."""
    workdir = writer.directory
    resumes = is_run(workdir)
    if resumes:
        config = check_same_run(read_run_config(workdir), config, str(workdir))
    if config.init_from and not saved_steps(workdir / CHECKPOINTS):
        config = with_model(config, open_checkpoint(config.init_from).config)
    alone = jax.process_count() == 1 and config.mesh == MeshConfig()
    mesh = None if alone else make_mesh(config.mesh)
    check_rows(config, mesh)
    recipe.check(config, config.model.num_layers)
    for extra, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        check(
            not getattr(config, extra) or find_spec(package) is not None,
            f"--{extra} needs {package}: pip install 'lsjax[{extra}]', or turn it off",
        )
    given = f"{config} {resumes} {recipe.given()}"
    check_same("the configurations, given functions and states of --workdir", given)

    with in_turn("the tokenizer is read"):
        tokenizer = make_tokenizer(config.data, cache=cache_directory())
    tokenizer = tokenizer.fitted(config.model.vocab_size)
    # All hosts share the work if tokens are missing.
    share = Share(jax.process_index(), jax.process_count(), sync_global_devices)
    options = dict(seq_len=config.seq_len, cache=cache_directory(), share=share)
    rows = {split: packed_rows(config.data, tokenizer, split=split, **options) for split in SPLITS}
    own = dict(batch_size=config.batch_size, own_B=own_rows(config.batch_size, mesh))
    pipeline = Pipeline(rows["train"], seed=config.seed, **own)
    held_out = OnePass(rows["validation"], max_batches=config.evaluation.batches, **own)
    fingerprints = tokenizer.fingerprint, pipeline.rows.fingerprint, held_out.rows.fingerprint
    check_same("the tokenizers and the data", f"{fingerprints}")
    prompts = held_out_prompts(held_out.whole(), config.evaluation)  # the same on all hosts
    sampled = sample_prompt(config, tokenizer, prompts)
    writer.check()  # reading data may take hours
    with in_turn("the run has begun"):
        if is_first():
            begin_run(workdir, with_known_base(workdir, config), tokenizer)
            compare_recipe(workdir, recipe, warn)
            write_run_files(workdir, tokenizer, pipeline.rows, prompts)
        wait_to_see(lambda: is_run(workdir), f"the run in {workdir}")
    return TrainingRun(
        config=config,
        writer=writer,
        resumes=resumes,
        mesh=mesh,
        tokenizer=tokenizer,
        pipeline=pipeline,
        held_out=held_out,
        sample_prompt=sampled,
        losses=held_out_losses(workdir),
        recipe=recipe,
    )


def check_same_run(before: TrainConfig, now: TrainConfig, where: str) -> TrainConfig:
    """The configuration to resume with; its model is that of the run. Raises ConfigError for the
    first changed field that a run can't change."""
    given = dataclasses.replace(now, model=now.model or before.model)
    longer = f", or train it further in a new run with --init-from {where}"
    for path, old, new in differences(dataclasses.asdict(before), dataclasses.asdict(given)):
        check(
            path in FREE or path.partition(".")[0] in FREE,
            f"{where} was started with {path} {old}, now it is {new}: a run can't change it; use "
            f"another --workdir or the old value{longer * (path == 'num_steps')}",
        )
    return dataclasses.replace(now, model=before.model)


def with_known_base(workdir: AnyPath, config: TrainConfig) -> TrainConfig:
    """The configuration to write. The base of exit blocks may have moved, but a new place is noted
    only when it holds the same model (`check_base`)."""
    if not (config.exit_blocks.exits and is_run(workdir)):
        return config
    return dataclasses.replace(config, init_from=read_run_config(workdir).init_from)


def compare_recipe(workdir: AnyPath, recipe: Recipe, warn: Callable[[str], None]) -> None:
    """Warns in one line if the saved steps of a run were trained with other functions."""
    before, now = read_recipe(workdir), recipe.given()
    if before == now or not saved_steps(workdir / CHECKPOINTS):
        return
    unset, changes = {"name": "the default"}, []
    for key in {**before, **now}:
        old, new = before.get(key, unset), now.get(key, unset)
        if old != new:
            to = new["name"] if old["name"] != new["name"] else "another source or other values"
            changes.append(f"{key} from {old['name']} to {to}")
    warn(f"this run resumes with other functions than before: {', '.join(changes)}")


def with_model(config: TrainConfig, model: LlamaConfig) -> TrainConfig:
    """The config with the model shape of the checkpoint that it starts from. Raises ConfigError if
    the config's own shape differs, or if the run does not fit the model."""
    given = dataclasses.asdict(config.model or model)
    for path, own, other in differences(given, dataclasses.asdict(model)):
        check(
            f"model.{path}" in FREE,
            f"model.{path} is {own}, but that of {config.init_from} is {other}: "
            "leave the model out of the config, or correct it",
        )
    return dataclasses.replace(config, model=model)


def write_run_files(
    workdir: AnyPath, tokenizer: Tokenizer, rows: TokenRows, prompts: Sequence[Sequence[int]]
) -> None:
    """Writes the missing files, from the training rows and held-out prompts. Before the first saved
    step it writes all of them, because the data may still change."""
    fresh = not saved_steps(workdir / CHECKPOINTS)
    if fresh or not (workdir / COUNTS).exists():
        counts: Counter[int] = Counter()
        for first in range(0, min(len(rows), COUNTED // rows.seq_len + 1), 256):
            labels_BT = rows.read(np.arange(first, min(first + 256, len(rows))))["labels_BT"]
            counts.update(labels_BT[labels_BT >= 0].tolist())
        write_counts(workdir / COUNTS, tokenizer, counts)
    if fresh or not (workdir / PROMPTS).exists():
        texts = map(tokenizer.decode, prompts)
        lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts if text]
        write_whole(workdir / PROMPTS, "".join(f"{line}\n" for line in lines).encode())


def held_out_prompts(
    held_out: Iterable[Mapping[str, np.ndarray]], config: EvaluationConfig
) -> list[list[int]]:
    """Beginnings of evenly spaced rows: the row's prompt if it has one, else its first
    `prompt_tokens`, at most half of the row. Raises ConfigError if no token is labelled."""
    prompts: list[list[int]] = []
    for batch in held_out:
        for tokens_T, labels_T in zip(batch["tokens_BT"], batch["labels_BT"], strict=True):
            if not (labels_T >= 0).any():
                continue  # padding of the last batch
            half = max(1, min(config.prompt_tokens, len(tokens_T) // 2))
            prompt = int(np.argmax(labels_T >= 0))  # its tokens before the last have no label
            prompts.append(tokens_T[: prompt + 1 if prompt else half].tolist())
    check(
        bool(prompts),
        "no token of the held-out rows has a label: raise seq_len, so that rows hold more than the "
        "prompts, or raise evaluation.batches",
    )
    most = min(config.num_prompts, len(prompts))
    return [prompts[(2 * number + 1) * len(prompts) // (2 * most)] for number in range(most)]


def sample_prompt(
    config: TrainConfig, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]]
) -> list[int]:
    """Tokens that samples continue: the configured text, or the middle prompt; empty without
    samples. Raises ConfigError if the text leaves no room in the model's context."""
    if config.evaluation.sample_tokens == 0:
        return []
    most = config.model.max_context - 1
    if not config.evaluation.sample_prompt:
        return list(prompts[len(prompts) // 2])[:most]
    prompt = tokenizer.encode(config.evaluation.sample_prompt)
    check(
        0 < len(prompt) <= most,
        f"evaluation.sample_prompt has {len(prompt)} tokens: use 1 to {most}, as the model's "
        f"context has {most + 1}",
    )
    return prompt
