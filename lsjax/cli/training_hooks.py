"""What a training shows of its model now and then: every exit's scores, a picture, a sample."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from rich.table import Table

from lsjax.checkpoints import EVALUATION, read_metrics
from lsjax.cli.hosts import is_first
from lsjax.cli.show import coloured, verbatim
from lsjax.config import ConfigError, EvaluationConfig, LlamaConfig, TrainConfig
from lsjax.data.tokenizers import Tokenizer
from lsjax.decoding.completion import Completion
from lsjax.decoding.engine import Engine
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.evaluation.exits import AGREEMENT, ExitScores, exits_to_show, score_exits
from lsjax.evaluation.plots import plot_exits, plot_training
from lsjax.model.llama import Llama
from lsjax.training.trainer import Hook

Print = Callable[..., None]


def evaluation_hook(
    config: TrainConfig,
    batches: Sequence[Mapping[str, np.ndarray]],
    workdir: Path,
    print: Print,
    place: Callable[[Any], Any],
    losses: dict[int, float],
) -> Hook:
    """Scores every exit on the held-out batches, computing as a step does; draws loss and
    agreement by exit.

    place: puts a batch where the devices want it. losses: gets the last exit's loss by step.
    """

    def evaluate(step: int, model: Llama) -> dict[str, Any]:
        scores = score_exits(
            model,
            map(place, batches),
            dtype=config.dtype,
            micro_batches=config.micro_batches,
            attention=config.attention,
        )
        print(exit_table(f"step {step}, {scores.tokens:,} held-out tokens", scores))
        print(AGREEMENT, style="dim")
        row = {**scores.to_json(), "last_exit_loss": scores.loss_E[-1]}
        if math.isfinite(scores.loss_E[-1]):
            losses[step] = scores.loss_E[-1]
        if not is_first():
            return row
        rows = [*read_metrics(workdir), {"kind": EVALUATION, "step": step, **row}]
        try:
            plot_exits({f"step {step}": scores}, workdir / "exits.png", title=workdir.name)
            plot_training(rows, workdir / "training.png")
        except (ConfigError, OSError) as error:  # no matplotlib, no room: metrics.jsonl has it all
            print(str(error), style="dim")
        return row

    return Hook(EVALUATION, config.evaluation.every, evaluate)


def exit_table(title: str, scores: ExitScores) -> Table:
    """Loss, perplexity and agreement of the first exit and of each eighth of the layers."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("exit", "loss", "perplexity", "agreement"):
        table.add_column(name, justify="right")
    for exit_layer in exits_to_show(len(scores.loss_E)):
        i = exit_layer - 1
        table.add_row(
            str(exit_layer),
            f"{scores.loss_E[i]:.3f}",
            f"{scores.perplexity_E[i]:.2f}",
            f"{scores.agreement_E[i]:.3f}",
        )
    return table


def drafting_exit(config: EvaluationConfig, model: LlamaConfig) -> int:
    """The exit that drafts samples: the configured one, or a quarter of the layers."""
    return config.exit_layer or max(1, model.num_layers // 4)


def sample_hook(
    config: EvaluationConfig,
    model: LlamaConfig,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    print: Print,
    mesh: Mesh | None = None,
) -> Hook:
    """Lets the model continue a prompt, drafting by an early exit, and shows it in colours."""
    exit_layer = drafting_exit(config, model)
    length = min(config.sample_tokens, model.max_context - len(prompt))
    engine: Engine | None = None

    def sample(step: int, model: Llama) -> dict[str, Any]:
        nonlocal engine  # which holds the run's own arrays: the next step takes them over
        if engine is None:
            strategy = SelfSpeculative(exit_layer, config.num_draft_tokens)
            engine = Engine(model, tokenizer, strategy, mesh=mesh, lay_out=False)
        else:
            engine.use_model(model)
        (done,) = engine.generate([list(prompt)], max_new_tokens=length)
        print(verbatim(tokenizer.decode(list(prompt))), style="dim")
        print(coloured(tokenizer, prompt, done))
        print(_drafts(exit_layer, done), style="dim")
        return {
            "text": done.text,
            "exit_layer": exit_layer,
            "num_draft_tokens": config.num_draft_tokens,
            "acceptance_rate": done.acceptance_rate,
        }

    return Hook("sample", config.every, sample)


def _drafts(exit_layer: int, done: Completion) -> str:
    return f"{done.accepted} of {done.drafted} drafts of exit {exit_layer} were accepted"
