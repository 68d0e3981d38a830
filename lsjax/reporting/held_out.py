"""Held-out rows of a report, and the prompts that are decoded: the same for all of its models."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lsjax.config import DataConfig, Sampling, TrainConfig, check
from lsjax.data.pipeline import OnePass, packed_rows
from lsjax.data.tokenizer import Tokenizer
from lsjax.decoding.request import Request
from lsjax.evaluation.answers import Question, digest
from lsjax.io.files import cache_directory


@dataclass(frozen=True)
class HeldOut:
    """Rows that score the exits, and questions that are decoded."""

    rows: OnePass
    questions: list[Question]

    @property
    def alike(self) -> dict[str, Any]:
        """What must be equal in models that are compared."""
        prompts = [list(question.request.prompt) for question in self.questions]
        return {
            "number of prompts": len(self.questions),
            "scored batches": len(self.rows),
            "held-out rows": digest([self.rows.rows.fingerprint, self.rows.batch_size]),
            "prompts": digest(prompts),
        }


def held_out(
    config: TrainConfig,
    tokenizer: Tokenizer,
    *,
    num_batches: int,
    num_prompts: int,
    max_new_tokens: int,
    max_context: int,
    sampling: Sampling,
    stop: tuple[str, ...] = (),
) -> HeldOut:
    """Reads the held-out rows of a run, and evenly spaced prompts from them.

    Question number i has the seed + i. max_context: of the model. Raises ConfigError if the data
    has too few documents, or no prompt with room for new tokens.
    """
    check(
        not (config.data.has_prompts and config.data.train_on_prompt),
        "data.train_on_prompt hides which tokens are the answer: a report on a task needs it off",
    )
    options = dict(seq_len=config.seq_len, split="validation", cache=cache_directory())
    rows = packed_rows(config.data, tokenizer, **options)
    batches = OnePass(rows, config.batch_size, max_batches=num_batches)
    every_row = replace(batches, max_batches=None)
    read = _examples if config.data.has_prompts else _beginnings
    room = max_context - max_new_tokens
    found = [one for one in read(every_row, config, tokenizer) if len(one[0]) <= room]
    check(
        bool(found),
        f"no held-out prompt leaves room for {max_new_tokens} new tokens in the context of "
        f"{max_context}: lower --new-tokens",
    )
    most = min(num_prompts, len(found))
    chosen = [found[(2 * number + 1) * len(found) // (2 * most)] for number in range(most)]
    questions = [
        Question(
            id=str(number),
            request=Request(
                prompt=prompt,
                max_new_tokens=max_new_tokens,
                stop=stop,
                sampling=sampling.of_text(number),
            ),
            reference=reference,
        )
        for number, (prompt, reference) in enumerate(chosen)
    ]
    return HeldOut(batches, questions)


def _beginnings(
    batches: OnePass, config: TrainConfig, tokenizer: Tokenizer
) -> Iterator[tuple[list[int], str]]:
    """The first tokens of each row of text: `evaluation.prompt_tokens`, at most half of the row."""
    most = max(1, min(config.evaluation.prompt_tokens, config.seq_len // 2))
    for tokens_T, _, segments_T in _each_row(batches):
        own_T = tokens_T[segments_T == segments_T[0]]
        if len(own_T) > 1:
            yield own_T[: max(1, min(most, len(own_T) // 2))].tolist(), ""


def _examples(
    batches: OnePass, config: TrainConfig, tokenizer: Tokenizer
) -> Iterator[tuple[list[int], str]]:
    """The prompt and the response of each document, but for truncated ones."""
    for tokens_T, labels_T, segments_T in _each_row(batches):
        for segment in range(1, int(segments_T.max()) + 1):
            own_n = np.flatnonzero(segments_T == segment)
            labelled_n = np.flatnonzero(labels_T[own_n] >= 0)
            if config.data.train_on_prompt or not len(labelled_n):
                continue
            prompt = tokens_T[own_n[: labelled_n[0] + 1]].tolist()
            response = labels_T[own_n[labelled_n]].tolist()
            if config.data.append_end:
                if response[-1] not in tokenizer.eos_ids:
                    continue  # truncated
                response = response[:-1]
            yield prompt, tokenizer.decode(response)


def _each_row(batches: OnePass) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Tokens, labels and segments of each row that is not empty."""
    for batch in batches:
        parts = (batch[name] for name in ("tokens_BT", "labels_BT", "segments_BT"))
        for tokens_T, labels_T, segments_T in zip(*parts, strict=True):
            if segments_T[0]:
                yield tokens_T, labels_T, segments_T


def described(data: DataConfig) -> str:
    """The source of the documents, and its files."""
    named = data.paths or ((data.tfds_name,) if data.tfds_name else ())
    return " ".join([data.source, *named])
