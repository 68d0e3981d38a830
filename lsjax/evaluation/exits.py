"""Loss, perplexity and agreement of every exit, in one pass over a text: how good each exit is as a
model, and how often it would draft what the model itself says (the paper's Figures 6 and 8)."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from lsjax.checkpoints import EVALUATION
from lsjax.config import AttentionKernel, ComputeDtype, ConfigError
from lsjax.decoding.sampling import likeliest
from lsjax.model.llama import Llama, cast_matrices
from lsjax.sharding import chunk_steps, constrain, split_rows
from lsjax.training.loop import Hook
from lsjax.training.run import TrainingRun

AGREEMENT = "agreement: share of greedy drafts that would be accepted, teacher-forced"
# Logits that are held at a time, on each device.
CHUNK_LOGITS = 2**25


@dataclass(frozen=True)
class ExitScores:
    """What the exits 1..L make of a text; index E - 1 is exit E."""

    loss_E: tuple[float, ...]
    """Cross entropy, nats per labelled token."""
    agreement_E: tuple[float, ...]
    """Share of the labelled tokens at which the likeliest token is that of exit L: what greedy
    drafts of this exit would have accepted, one at a time, along this text."""
    tokens: int
    """Labelled tokens."""

    @property
    def perplexity_E(self) -> tuple[float, ...]:
        """exp(loss); infinite where that is beyond a float."""
        return tuple(math.exp(loss) if loss < 700 else math.inf for loss in self.loss_E)

    def cells(self, exit_layer: int) -> tuple[str, str]:
        """Loss and agreement of an exit as tables have them; dashes where there is no such exit."""
        if exit_layer > len(self.loss_E):
            return "-", "-"
        return f"{self.loss_E[exit_layer - 1]:.3f}", f"{self.agreement_E[exit_layer - 1]:.3f}"

    def to_json(self) -> dict:
        """Lists and numbers."""
        return {
            "loss_E": list(self.loss_E),
            "agreement_E": list(self.agreement_E),
            "tokens": self.tokens,
        }


def score_exits(
    model: Llama,
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    dtype: ComputeDtype = "auto",
    micro_batches: int = 1,
    attention: AttentionKernel = "auto",
) -> ExitScores:
    """Scores every exit on batches of tokens_BT, labels_BT, segments_BT and positions_BT.

    dtype, micro_batches, attention: of the computation, as in `StepConfig`. A training run gives
    its own, so that scoring never needs more memory than a step. Labels of -1 do not count.
    Raises ConfigError where no token is labelled.
    """
    compiled = partial(exit_sums, dtype=dtype, micro_batches=micro_batches, attention=attention)
    totals = None
    for batch in batches:
        sums = jax.device_get(compiled(model, dict(batch)))
        sums = jax.tree.map(lambda part: np.asarray(part, np.float64), sums)
        totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
    if totals is None or totals[2] == 0:
        raise ConfigError("no token is labelled: raise the number of batches, or the row length")
    loss_E, agreed_E, count = totals
    return ExitScores(
        tuple((loss_E / count).tolist()), tuple((agreed_E / count).tolist()), int(count)
    )


def evaluation_hook(
    run: TrainingRun, show: Callable[[int, ExitScores], None] = lambda step, scores: None
) -> Hook:
    """Scores every exit of a training run on its held-out batches, computing as a step does.

    The loss of the last exit decides which saved steps are the best. show: called with the steps
    done and the scores.
    """
    config, batches = run.config, list(run.held_out)

    def evaluate(step: int, model: Llama) -> dict[str, Any]:
        scores = score_exits(
            model,
            map(run.place, batches),
            dtype=config.dtype,
            micro_batches=config.micro_batches,
            attention=config.attention,
        )
        loss = scores.loss_E[-1]
        if math.isfinite(loss):
            run.losses[step] = loss
        show(step, scores)
        return {**scores.to_json(), "last_exit_loss": loss}

    return Hook(EVALUATION, config.evaluation.every, evaluate)


@partial(jax.jit, static_argnames=("dtype", "micro_batches", "attention"))
def exit_sums(
    model: Llama,
    batch: dict[str, Array],
    *,
    dtype: ComputeDtype,
    micro_batches: int,
    attention: AttentionKernel,
):
    """Sums over the labelled tokens of loss [L] and agreement [L], and their number.

    The scan over layers keeps two numbers of each token and exit, neither states nor logits.
    """
    model = cast_matrices(model, dtype)
    # Cast and gathered once, and not in each chunk.
    table_VD = constrain(model.head_table.astype(model.compute_dtype), "tensor")

    def sums(part: dict[str, Array]):
        labels_BT = part["labels_BT"]
        labelled_BT = labels_BT >= 0
        loss_LBT, token_LBT = model.exits(
            part["tokens_BT"],
            part["positions_BT"],
            part["segments_BT"],
            kernel=attention,
            read=partial(_score, model, table_VD, labels_BT),
        )
        agreed_LBT = token_LBT == token_LBT[-1]

        def count(values_LBT: Array) -> Array:
            return jnp.where(labelled_BT, values_LBT, 0).sum((1, 2), dtype=loss_LBT.dtype)

        return count(loss_LBT), count(agreed_LBT), labelled_BT.sum()

    if micro_batches == 1:
        return sums(batch)
    parts = lax.map(sums, split_rows(batch, micro_batches))
    return jax.tree.map(lambda leaf: leaf.sum(0), parts)


def exits_to_show(layers: int) -> list[int]:
    """Rows of a table: the first exit, and each eighth of the layers, rounded up: in the paper's
    tables quarters of 30 layers are 8, 15 and 23."""
    return sorted({1, *(-(-layers * eighth // 8) for eighth in range(1, 9))})


def _score(
    model: Llama,
    table_VD: Float[Array, "V D"],
    labels_BT: Int[Array, "B T"],
    x_BTD: Float[Array, "B T D"],
) -> tuple[Float[Array, "B T"], Int[Array, "B T"]]:
    """Loss and likeliest token at each position, a chunk of positions at a time."""
    batch, steps, width = x_BTD.shape
    chunk = chunk_steps(batch, steps, model.config.vocab_size, CHUNK_LOGITS)
    chunks = -(-steps // chunk)
    padding = ((0, 0), (0, chunks * chunk - steps))

    def split(array: Array) -> Array:
        """[B, T, ...] -> [chunks, B, C, ...]"""
        padded = jnp.pad(array, padding + ((0, 0),) * (array.ndim - 2))
        return padded.reshape(batch, chunks, chunk, *array.shape[2:]).swapaxes(0, 1)

    def score(parts):
        x_BCD, label_BC = parts
        logits_BCV = model.unembed(x_BCD, table_VD)
        log_z_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        label_BC = jnp.maximum(label_BC, 0)  # those that do not count are left out later
        wanted_BC = jnp.take_along_axis(logits_BCV, label_BC[:, :, None], -1)[:, :, 0]
        return log_z_BC - wanted_BC, likeliest(logits_BCV)

    def join(parts: Array) -> Array:
        return parts.swapaxes(0, 1).reshape(batch, chunks * chunk)[:, :steps]

    return jax.tree.map(join, lax.map(score, (split(x_BTD), split(labels_BT))))
