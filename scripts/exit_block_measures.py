"""What is measured of a model with exit blocks, or of one that LayerSkip finetuned: the share of
its own tokens that it proposes, its speed, and the loss of its last exit."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

import lsjax
from lsjax.data.chat import Dialogue
from lsjax.data.tokenizer import Tokenizer
from lsjax.evaluation.exits import score_batches, score_texts

DRAFTS = 4  # of a round, when acceptance is counted
PIECE = 1_600  # characters of a piece of a text
STRIDE = 16  # only every 16th piece is scored

Texts = Sequence[Sequence[int]]


class Measured(NamedTuple):
    """A model, the exits that draft, and the tokens that they may draft."""

    model: lsjax.Llama
    tokenizer: Tokenizer
    exits: tuple[int, ...]
    vocabulary: lsjax.DraftVocabulary
    new_tokens: int  # of each text
    repeats: int  # timed texts of each prompt and strategy

    def kind(self, prompts: Sequence[str], timed: bool) -> dict[str, Any]:
        """Counts of drafts of the answers to some prompts, and seconds if `timed`."""
        dialogue = Dialogue(self.tokenizer)
        texts = [dialogue.prompt(prompt.strip())[1] for prompt in prompts]
        if timed:
            answers, seconds = self.seconds(texts)
        else:
            engine = lsjax.Engine(self.model, self.tokenizer, batch_size=len(texts))
            found = engine.generate(texts, max_new_tokens=self.new_tokens)
            answers, seconds = [one.token_ids for one in found], {}
        agreement = self.agreed(texts, answers)
        return dict(agreement=agreement, acceptance=self.accepted(texts), seconds=seconds)

    def agreed(self, texts: Texts, answers: Texts) -> dict[int, Any]:
        """By exit, for each text: the answer's tokens, and those that the exit proposes."""
        batches = labelled(texts, answers)
        ids_W = self.vocabulary.ids_W
        sums = score_batches(self.model, batches, dtype="float32", draft_ids_W=ids_W)
        tokens = sums.tokens_n.tolist()
        return {
            one: {"drafted": tokens, "accepted": sums.agreed_nE[:, one - 1].tolist()}
            for one in self.exits
        }

    def accepted(self, texts: Texts) -> dict[int, Any]:
        """By exit, for each text: the rounds, and those whose first draft was right."""
        given = self.model, self.tokenizer, texts, self.exits, DRAFTS
        options = dict(max_new_tokens=self.new_tokens, vocabulary=self.vocabulary)
        one = lsjax.acceptance(*given, **options, batch_size=len(texts))
        return {
            exit_layer: {
                "drafted": one.drafted_nEJ[:, at, 0].tolist(),
                "accepted": one.accepted_nEJ[:, at, 0].tolist(),
            }
            for at, exit_layer in enumerate(one.exits)
        }

    def seconds(self, texts: Texts) -> tuple[list[list[int]], dict[str, list[float]]]:
        """The answers, and the seconds of each, the median of the repeats. Strategies take
        turns."""
        engine = lsjax.Engine(self.model, self.tokenizer)
        strategies = {
            "autoregressive": lsjax.Autoregressive(),
            "without": lsjax.Adaptive(()),
            "with": lsjax.Adaptive(self.exits, self.vocabulary),
        }
        taken: dict[str, list[list[float]]] = {name: [[] for _ in texts] for name in strategies}
        answers: list[list[int]] = [[] for _ in texts]
        for _ in range(self.repeats):
            for number, text in enumerate(texts):
                for name, strategy in strategies.items():
                    engine.use(strategy)
                    (one,) = engine.generate([text], max_new_tokens=self.new_tokens)
                    answers[number] = answers[number] or one.token_ids
                    if one.token_ids != answers[number]:
                        raise SystemExit(f"{name} wrote another text: {one.text!r}")
                    taken[name][number].append(one.decode_seconds)  # without compiling
        medians = {name: [statistics.median(each) for each in own] for name, own in taken.items()}
        return answers, medians

    def last_loss(self, text: str) -> float:
        """Loss of the last exit on pieces of a text, in nats a token."""
        pieces = [text[begin:][:PIECE] for begin in range(0, len(text), PIECE * STRIDE)]
        ids = [self.tokenizer.encode(piece) for piece in pieces]
        counts = [len(one) - 1 for one in ids]
        layers = self.model.num_layers
        given = [*zip(ids, counts, strict=True)]
        scores = score_texts(self.model, given, exit_layer=layers, batch_size=4)
        return -sum(log_prob for log_prob, _ in scores) / sum(counts)


def labelled(texts: Texts, answers: Texts) -> list[dict[str, np.ndarray]]:
    """A batch of one row for each text: the answer's tokens are its labels."""
    rows = [([*text, *answer], len(text)) for text, answer in zip(texts, answers, strict=True)]
    length, batches = max(len(row) for row, _ in rows), []
    for row, begin in rows:
        tokens, labels = np.zeros(length, np.int32), np.full(length, -1, np.int32)
        tokens[: len(row)] = row
        labels[begin - 1 : len(row) - 1] = row[begin:]
        batch = dict(tokens_BT=tokens, labels_BT=labels, positions_BT=np.arange(length))
        batch["segments_BT"] = (np.arange(length) < len(row)).astype(np.int32)
        batches.append({name: array[None] for name, array in batch.items()})
    return batches
