"""Texts of a page: who wrote each token, with what probability, and what was rejected for it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lsjax.data.tokenizer import StreamDecoder, Tokenizer
from lsjax.decoding.completion import Completion


def with_origins(
    tokenizer: Tokenizer, prompt_ids: Sequence[int], done: Completion
) -> dict[str, Any]:
    """A text as JSON: its prompt, and for each new token the text, origin, exit that drafted it,
    probability by the full model, and rejected draft. done: with log_probs."""
    trace, decoder, tokens = done.trace, StreamDecoder(tokenizer, prompt_ids), []
    for index, token in enumerate(trace.tokens_n.tolist()):
        origin, replaced = trace.origin(index), int(trace.replaced_n[index])
        one: dict[str, Any] = {"text": decoder.push([token]), "origin": origin}
        if origin == "accepted":
            chosen = trace.source_n is not None
            one["exit"] = int(trace.source_n[index]) if chosen else done.exit_layer
        if replaced >= 0:
            rejected = tokenizer.token_bytes(replaced, skip_special=False)
            one["rejected"] = rejected.decode("utf-8", errors="replace")
        if trace.log_probs_n is not None:
            one["probability"] = round(float(np.exp(trace.log_probs_n[index])), 4)
        tokens.append(one)
    tokens[-1]["text"] += decoder.finish()
    return {"prompt": tokenizer.decode(prompt_ids), "tokens": tokens}
