"""How likely a model finds tokens that are given, at any exit: one pass, nothing is decoded.

Each scored token is predicted once, by what stands before it in its window. Scored tokens that do
not fit a window of `max_length` inputs take several; the last one has its full context:

    tokens    c  0  1  2  3  4  5  6  7  8  9     scored: 0..9, max_length 4
    window 1  c  0  1  2 -> 0  1  2  3
    window 2  3  4  5  6 -> 4  5  6  7
    window 3  5  6  7  8 -> .  .  8  9

Windows whose inputs begin those of another share its row: answers of one token to one question
cost one pass.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from lsjax.config import check
from lsjax.decoding.sampling import likeliest
from lsjax.model.cache import KVCache
from lsjax.model.llama import Llama, unstacked

MIN_LENGTH = 32  # a window is padded to this many tokens, or a larger power of two
# Scored tokens that pass the head together: [ROWS, V] logits are all that exists of them at once.
ROWS = 32


class Text(NamedTuple):
    """Token ids, of which the last `count` are scored."""

    tokens: Sequence[int]
    count: int


@dataclass(frozen=True)
class Score:
    """log_prob: natural logarithm of the probability of all scored tokens together. is_greedy:
    whether each of them is the likeliest after those before it. num_tokens: how many they are."""

    log_prob: float
    is_greedy: bool
    num_tokens: int


@dataclass
class Row:
    """Tokens that the model reads, and the windows that are scored by what it says of them, with
    the number of the text that each is of."""

    inputs: Sequence[int]
    pieces: list[tuple[int, Text]]

    @property
    def count(self) -> int:
        """Scored tokens."""
        return sum(text.count for _, text in self.pieces)


def score(
    model: Llama,
    texts: Sequence[Text],
    *,
    exit_layer: int | None = None,
    batch_size: int = 1,
    max_length: int | None = None,
    mesh: Mesh | None = None,
    track: Callable[[Sequence], Iterable] = iter,
) -> list[Score]:
    """Scores of the texts, in their order, by the first `exit_layer` layers (all by default).

    Rows of similar length share a batch, and batches are padded to few sizes: a program for each
    power of two, whatever the texts. max_length: inputs of a window, the model's context by
    default. track: wraps the sequence of batches, for a progress bar.

    Raises ConfigError for an exit or a length that the model does not have, for ids beyond its
    vocabulary, and for a text whose first scored token has nothing before it.
    """
    config = model.config
    exit_layer = config.num_layers if exit_layer is None else exit_layer
    max_length = config.max_context if max_length is None else max_length
    check(
        1 <= exit_layer <= config.num_layers,
        f"exit layer {exit_layer} is not in 1..{config.num_layers}, the layers of this model",
    )
    check(
        1 <= max_length <= config.max_context,
        f"max length {max_length} is not in 1..{config.max_context}, the model's context",
    )
    check(batch_size >= 1, f"batch size {batch_size} is below 1: choose 1 or more")
    pieces = []
    for index, text in enumerate(texts):
        check(
            0 <= text.count < len(text.tokens),
            f"text {index} of {len(text.tokens)} tokens can't have {text.count} scored: the first "
            "scored one needs a token before it",
        )
        check(
            0 <= min(text.tokens) and max(text.tokens) < config.vocab_size,
            f"text {index} has token ids {min(text.tokens)}..{max(text.tokens)}: give ids in "
            f"0..{config.vocab_size - 1}",
        )
        pieces += [(index, window) for window in windows(text, max_length)]
    rows = shared_rows(pieces)
    log_prob_N, is_greedy_N = np.zeros(len(texts)), np.ones(len(texts), bool)
    for begin in track(range(0, len(rows), batch_size)):
        batch = rows[begin : begin + batch_size]
        owners = [index for row in batch for index, text in row.pieces for _ in range(text.count)]
        log_prob_n, is_greedy_n = _score_batch(model, batch, batch_size, exit_layer, mesh)
        np.add.at(log_prob_N, owners, log_prob_n.astype(np.float64))
        np.logical_and.at(is_greedy_N, owners, is_greedy_n)
    return [
        Score(float(log_prob), bool(is_greedy), text.count)
        for log_prob, is_greedy, text in zip(log_prob_N, is_greedy_N, texts, strict=True)
    ]


def windows(text: Text, max_length: int) -> Iterator[Text]:
    """Texts that together score what this one does, with at most `max_length` inputs each."""
    tokens, count = text
    for begin in range(len(tokens) - count, len(tokens), max_length):
        end = min(begin + max_length, len(tokens))
        yield Text(tokens[max(0, end - max_length - 1) : end], end - begin)


def shared_rows(pieces: Sequence[tuple[int, Text]]) -> list[Row]:
    """Rows that score all these windows, the longest first."""
    rows: list[Row] = []
    # Backwards in the order of dictionaries a list follows right behind those that it begins.
    for index, window in sorted(pieces, key=lambda piece: list(piece[1].tokens[:-1]), reverse=True):
        inputs = window.tokens[:-1]
        last = rows[-1] if rows else None
        # A program has room for as many scored tokens as it has inputs.
        room = 0 if last is None else max(MIN_LENGTH, len(last.inputs)) - last.count
        if room >= window.count and list(last.inputs[: len(inputs)]) == list(inputs):
            last.pieces.append((index, window))
        else:
            rows.append(Row(inputs, [(index, window)]))
    return sorted(rows, key=lambda row: -len(row.inputs))


def _score_batch(
    model: Llama, rows: Sequence[Row], batch_size: int, exit_layer: int, mesh: Mesh | None
) -> tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Of the scored tokens of all these rows, one after the other."""
    length = MIN_LENGTH
    while length < max(len(row.inputs) for row in rows):
        length *= 2
    tokens_BT = np.zeros((batch_size, length), np.int32)
    places, targets = [], []
    for number, row in enumerate(rows):
        tokens_BT[number, : len(row.inputs)] = row.inputs
        for _, (tokens, count) in row.pieces:
            end = number * length + len(tokens) - 1
            places.append(np.arange(end - count, end))
            targets.append(tokens[len(tokens) - count :])
    count = sum(map(len, targets))
    place_P, target_P = np.zeros((2, batch_size * length), np.int32)
    place_P[:count], target_P[:count] = np.concatenate(places), np.concatenate(targets)
    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        log_prob_P, is_greedy_P = _score_places(
            model, tokens_BT, place_P, target_P, np.int32(count), exit_layer=exit_layer
        )
    return np.asarray(log_prob_P)[:count], np.asarray(is_greedy_P)[:count]


@partial(jax.jit, static_argnames="exit_layer")
def _score_places(
    model: Llama,
    tokens_BT: Int[Array, "B T"],
    place_P: Int[Array, " P"],
    target_P: Int[Array, " P"],
    count: Int[Array, ""],
    *,
    exit_layer: int,
) -> tuple[Float[Array, " P"], Bool[Array, " P"]]:
    """Log-probability of `target_P`, and whether it is the likeliest token, by what stands up to
    `place_P` (row * T + position), for the first `count` of P = B * T places."""
    batch, steps = tokens_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(steps), (batch, steps))
    model = unstacked(model)
    cache = KVCache.create(model.config, batch, steps, model.dtype, exit_layer)
    x_BTD, _ = model.run_layers(model.embed(tokens_BT), 0, exit_layer, positions_BT, cache)
    x_PD = x_BTD.reshape(batch * steps, -1)

    def some(chunk, scores):
        begin = chunk * ROWS
        place_R, target_R = (
            lax.dynamic_slice_in_dim(array, begin, ROWS) for array in (place_P, target_P)
        )
        logits_RV = model.unembed(x_PD[place_R])
        chosen_R = jnp.take_along_axis(logits_RV, target_R[:, None], axis=1)[:, 0]
        found = (
            chosen_R - jax.nn.logsumexp(logits_RV, axis=-1),
            likeliest(logits_RV) == target_R,
        )
        return tuple(
            lax.dynamic_update_slice_in_dim(array, new, begin, 0)
            for array, new in zip(scores, found, strict=True)
        )

    wide = jnp.promote_types(model.dtype, jnp.float32)
    scores = jnp.zeros(place_P.shape, wide), jnp.zeros(place_P.shape, bool)
    return lax.fori_loop(0, (count + ROWS - 1) // ROWS, some, scores)
