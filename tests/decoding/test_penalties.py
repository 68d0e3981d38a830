"""Penalties against their definition, step by step, in every strategy."""

import numpy as np

from lsjax.decoding.sampling import Sampling


def penalised(logits, history, sampling: Sampling) -> np.ndarray:
    """The logits of the next token as the definitions give them, one token at a time."""
    out = np.array(logits, np.float64)
    for token in set(history):
        out[token] *= sampling.repetition_penalty ** (-1 if out[token] > 0 else 1)
    n = sampling.no_repeat_ngram
    seen = {tuple(history[i : i + n]) for i in range(len(history) - n + 1)} if n else set()
    for token in range(len(out)):
        if n and (*history[len(history) - n + 1 :], token) in seen:
            out[token] = -np.inf
    return out
