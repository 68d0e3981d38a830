"""Scores given texts in one pass, without a cache: loss and agreement of every exit (the paper's
Figures 6 and 8), and log-probabilities at one exit."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from lsjax.checkpoints.run import EVALUATION, REJECTED
from lsjax.config import AttentionKernel, ComputeDtype, Kernels, StepConfig, check
from lsjax.decoding.sampling import argmax
from lsjax.model.exit_blocks import block_exits
from lsjax.model.llama import Llama
from lsjax.model.matrices import cast_matrices
from lsjax.platforms import with_kernels
from lsjax.sharding import chunk_steps, constrain, over_context, pieces, split_rows
from lsjax.training.block_loss import block_states, frozen_states
from lsjax.training.prepare import TrainingRun
from lsjax.training.run import Hook, draft_ids

AGREEMENT = "agreement: share of greedy drafts that would be accepted, teacher-forced"
CHUNK_LOGITS = 2**25  # logits in memory at once, per device
MIN_LENGTH = 32  # a scored text is padded to this many tokens, or a larger power of two


class BatchSums(NamedTuple):
    """Sums over the labelled tokens of each batch: losses in nats, and tokens where the argmax of
    an exit equals that of exit L. Index E - 1 is exit E. tokens_n: labelled tokens."""

    loss_nE: Float[np.ndarray, "n E"]
    agreed_nE: Float[np.ndarray, "n E"]
    tokens_n: Int[np.ndarray, " n"]


@dataclass(frozen=True)
class ExitScores:
    """Scores of the exits 1..L on labelled batches; index E - 1 is exit E.

    loss_E: cross entropy, nats per labelled token. agreement_E: share of labelled tokens where the
    exit's argmax equals that of exit L. It is the acceptance rate of single greedy drafts along
    this text. tokens: number of labelled tokens.
    """

    loss_E: tuple[float, ...]
    agreement_E: tuple[float, ...]
    tokens: int

    @property
    def perplexity_E(self) -> tuple[float, ...]:
        """exp(loss); infinite if it overflows."""
        return tuple(math.exp(loss) if loss < 700 else math.inf for loss in self.loss_E)

    @classmethod
    def of(cls, sums: BatchSums) -> "ExitScores":
        """The scores over all batches."""
        count = int(sums.tokens_n.sum())
        loss_E, agreed_E = (sum_nE.sum(0) / count for sum_nE in sums[:2])
        return cls(tuple(loss_E.tolist()), tuple(agreed_E.tolist()), count)


def score_exits(
    model: Llama, batches: Iterable[Mapping[str, np.ndarray]], **options: Any
) -> ExitScores:
    """Scores every exit on batches. Arguments and errors are those of `score_batches`."""
    return ExitScores.of(score_batches(model, batches, **options))


def score_batches(
    model: Llama,
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    dtype: ComputeDtype = "auto",
    micro_batches: int = 1,
    attention: AttentionKernel = "auto",
    kernels: Kernels = "auto",
    draft_ids_W: Int[np.ndarray, " W"] | None = None,
) -> BatchSums:
    """Scores every exit on each batch of tokens_BT, labels_BT, segments_BT and positions_BT.

    dtype, micro_batches, attention, kernels: as in `StepConfig`. draft_ids_W: tokens that exit
    blocks draft; all by default. Labels of -1 do not count. Raises ConfigError if no token is
    labelled.
    """
    settings = dict(dtype=dtype, micro_batches=micro_batches, attention=attention, kernels=kernels)
    ids_W = None if draft_ids_W is None else jnp.asarray(draft_ids_W)
    parts = [jax.device_get(exit_sums(model, dict(batch), ids_W, **settings)) for batch in batches]
    check(
        any(labelled > 0 for *_, labelled in parts),
        "no token is labelled: raise the number of batches, or the row length",
    )
    loss_nE, agreed_nE, tokens_n = (np.array(column) for column in zip(*parts, strict=True))
    return BatchSums(loss_nE.astype(np.float64), agreed_nE.astype(np.float64), tokens_n)


def evaluation_hook(
    run: TrainingRun, show: Callable[[int, ExitScores], None] = lambda step, scores: None
) -> Hook:
    """Hook that scores every exit of a run on its held-out batches, computed as in a training step.

    The loss of the last exit decides which saved steps are best. Of exit blocks, the mean share of
    rejected drafts does. show: called with step and scores.
    """
    batches, names = list(run.held_out), ("dtype", "micro_batches", "attention", "kernels")
    settings = {name: getattr(run.config, name) for name in names}
    settings["draft_ids_W"] = draft_ids(run)

    def evaluate(step: int, model: Llama) -> dict[str, Any]:
        scores = score_exits(model, map(run.place, batches), **settings)
        row = {**asdict(scores), "last_exit_loss": scores.loss_E[-1]}
        loss, blocks = scores.loss_E[-1], run.config.exit_blocks.exits
        if blocks:
            loss = statistics.fmean(1 - scores.agreement_E[one - 1] for one in blocks)
            row[REJECTED] = loss
        if math.isfinite(loss):
            run.losses[step] = loss
        show(step, scores)
        return row

    return Hook(EVALUATION, run.config.evaluation.every, evaluate)


@partial(jax.jit, static_argnames=("dtype", "micro_batches", "attention", "kernels"))
def exit_sums(
    model: Llama,
    batch: dict[str, Array],
    draft_ids_W: Int[Array, " W"] | None = None,
    *,
    dtype: ComputeDtype,
    micro_batches: int,
    attention: AttentionKernel,
    kernels: Kernels,
):
    """Sums of loss [L] and agreement [L] over the labelled tokens, and the number of these tokens.

    The scan over layers keeps two numbers per token and exit, but no states or logits.
    """
    model = cast_matrices(model, dtype)
    # Cast and gathered once, not in each chunk.
    table_VD = constrain(model.head_table.astype(model.compute_dtype), "tensor")

    def sums(whole: dict[str, Array]):
        part = over_context(whole)
        labels_BT = pieces(part["labels_BT"])
        labelled_BT = labels_BT >= 0
        loss_LBT, token_LBT = model.exits(
            part["tokens_BT"],
            part["positions_BT"],
            part["segments_BT"],
            kernel=attention,
            read=lambda x_BTD: _loss_and_argmax(model, table_VD, labels_BT, pieces(x_BTD)),
        )
        if len(model.exit_blocks):  # which draft in place of their exits
            config = StepConfig(num_steps=1, attention=attention)
            *before, _ = frozen_states(config, model, whole)
            x_EBTD = block_states(config, model, jnp.stack(before), whole)
            for exit_layer, x_BTD in zip(block_exits(model), x_EBTD, strict=True):
                given = model, table_VD, labels_BT, pieces(x_BTD), draft_ids_W
                loss_BT, token_BT = _loss_and_argmax(*given)
                loss_LBT = loss_LBT.at[exit_layer - 1].set(loss_BT)
                token_LBT = token_LBT.at[exit_layer - 1].set(token_BT)
        found = loss_LBT, token_LBT == token_LBT[-1]
        counted = [jnp.where(labelled_BT, values_LBT, 0) for values_LBT in found]
        sums_L = [values_LBT.sum((1, 2), dtype=loss_LBT.dtype) for values_LBT in counted]
        return *sums_L, labelled_BT.sum()

    with with_kernels(kernels):
        if micro_batches == 1:
            return sums(batch)
        parts = lax.map(sums, split_rows(batch, micro_batches))
    return jax.tree.map(lambda leaf: leaf.sum(0), parts)


def score_texts(
    model: Llama,
    texts: Sequence[tuple[Sequence[int], int]],
    *,
    exit_layer: int,
    batch_size: int = 1,
    mesh: Mesh | None = None,
    kernels: Kernels = "auto",
    track: Callable[[Sequence], Iterable] = iter,
) -> list[tuple[float, bool]]:
    """Joint log-probability (nats) of each text's scored tokens by the first `exit_layer` layers,
    and whether each scored token is the argmax at its position.

    texts: token ids that fit the context, and how many of the last are scored, but never the first.
    Texts of similar length share a batch. Each power-of-two length has its own program. kernels:
    as in `StepConfig`. track: wraps the sequence of batches, for a progress bar.
    """
    scores = [(0.0, True)] * len(texts)
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index][0]))
    for begin in track(range(0, len(texts), batch_size)):
        batch = order[begin : begin + batch_size]
        length = max(MIN_LENGTH, 1 << (len(texts[batch[0]][0]) - 2).bit_length())  # of the longest
        tokens_BT = np.zeros((batch_size, length), np.int32)
        labels_BT = np.full_like(tokens_BT, -1)
        for row, index in enumerate(batch):
            tokens, count = texts[index]
            inputs = len(tokens) - 1
            tokens_BT[row, :inputs] = tokens[:-1]
            labels_BT[row, inputs - count : inputs] = tokens[len(tokens) - count :]
        with nullcontext() if mesh is None else jax.set_mesh(mesh):
            found = _score_rows(model, tokens_BT, labels_BT, exit_layer=exit_layer, kernels=kernels)
        loss_BT, token_BT = jax.device_get(found)
        for row, index in enumerate(batch):
            scored = labels_BT[row] >= 0
            log_prob = 0.0 - loss_BT[row, scored].astype(np.float64).sum()
            is_greedy = (token_BT == labels_BT)[row, scored].all()
            scores[index] = float(log_prob), bool(is_greedy)
    return scores


@partial(jax.jit, static_argnames=("exit_layer", "kernels"))
def _score_rows(
    model: Llama,
    tokens_BT: Int[Array, "B T"],
    labels_BT: Int[Array, "B T"],
    *,
    exit_layer: int,
    kernels: Kernels,
) -> tuple[Float[Array, "B T"], Int[Array, "B T"]]:
    """Loss and argmax at each position of one exit."""
    with with_kernels(kernels):
        x_BTD = model.exits(tokens_BT)[exit_layer - 1]
        return _loss_and_argmax(model, model.head_table, labels_BT, x_BTD)


def _loss_and_argmax(
    model: Llama,
    table_VD: Float[Array, "V D"],
    labels_BT: Int[Array, "B T"],
    x_BTD: Float[Array, "B T D"],
    ids_W: Int[Array, " W"] | None = None,
) -> tuple[Float[Array, "B T"], Int[Array, "B T"]]:
    """Loss and argmax at each position, a chunk of positions at a time. ids_W: tokens among which
    the argmax is; all by default."""
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
        label_BC = jnp.maximum(label_BC, 0)  # unlabelled positions are dropped later
        wanted_BC = jnp.take_along_axis(logits_BCV, label_BC[:, :, None], -1)[:, :, 0]
        best_BC = argmax(logits_BCV) if ids_W is None else ids_W[argmax(logits_BCV[..., ids_W])]
        return log_z_BC - wanted_BC, best_BC

    def join(parts: Array) -> Array:
        return parts.swapaxes(0, 1).reshape(batch, chunks * chunk)[:, :steps]

    return jax.tree.map(join, lax.map(score, (split(x_BTD), split(labels_BT))))
