"""Texts of a page: who wrote each token, with what probability, and what was rejected for it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lsjax.data.tokenizer import StreamDecoder, Tokenizer
from lsjax.decoding.completion import Completion

ACCEPTED, LOOKED_UP, CORRECTED, ADDED = "accepted", "looked-up", "corrected", "added"


def with_origins(
    tokenizer: Tokenizer, prompt_ids: Sequence[int], done: Completion
) -> dict[str, Any]:
    """A text as JSON: its prompt, and for each new token the text, origin, exit that drafted it,
    probability by the full model, and rejected draft. done: with log_probs."""
    trace, decoder, tokens = done.trace, StreamDecoder(tokenizer, prompt_ids), []
    ends = np.flatnonzero(trace.round_n)  # the last token of each round
    for index, token in enumerate(trace.tokens_n.tolist()):
        end = ends[min(np.searchsorted(ends, index), len(ends) - 1)]
        exit_layer = done.exit_layer if trace.source_n is None else int(trace.source_n[end])
        replaced, origin = int(trace.replaced_n[index]), ADDED
        if trace.accepted_n[index]:
            origin = ACCEPTED if exit_layer else LOOKED_UP
        elif replaced >= 0:
            origin = CORRECTED
        one: dict[str, Any] = {"text": decoder.push([token]), "origin": origin}
        if origin == ACCEPTED:
            one["exit"] = exit_layer
        if replaced >= 0:
            rejected = tokenizer.token_bytes(replaced, skip_special=False)
            one["rejected"] = rejected.decode("utf-8", errors="replace")
        if trace.log_probs_n is not None:
            one["probability"] = round(float(np.exp(trace.log_probs_n[index])), 4)
        tokens.append(one)
    tokens[-1]["text"] += decoder.finish()
    return {"prompt": tokenizer.decode(prompt_ids), "tokens": tokens}
