"""Acceptance of drafts by exit and position in the draft (the paper's tables count it as one)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from lsjax.config import GREEDY, Sampling, check
from lsjax.data.tokenizer import Tokenizer
from lsjax.decoding.draft_vocabulary import DraftVocabulary
from lsjax.decoding.engine import Engine, Prompt
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.evaluation.intervals import Estimate, from_samples, ratio
from lsjax.evaluation.scores import Answer
from lsjax.model.protocol import DecoderModel


@dataclass(frozen=True)
class Acceptance:
    """Counts of drafts. Index n is a text, E an exit of `exits`, J a position in the draft, from 0.

    drafted_nEJ: rounds that drafted a token at this position. accepted_nEJ: those of them in which
    it was accepted, and so were all before it.
    """

    exits: tuple[int, ...]
    drafted_nEJ: Int[np.ndarray, "n E J"]
    accepted_nEJ: Int[np.ndarray, "n E J"]

    @property
    def drafted_EJ(self) -> Int[np.ndarray, "E J"]:
        """Drafted tokens of all texts."""
        return self.drafted_nEJ.sum(0)

    @property
    def accepted_EJ(self) -> Int[np.ndarray, "E J"]:
        """Accepted tokens of all texts."""
        return self.accepted_nEJ.sum(0)

    @property
    def rate_EJ(self) -> Float[np.ndarray, "E J"]:
        """Share of the drafted tokens that was accepted; NaN where nothing was drafted."""
        drafted_EJ = np.where(self.drafted_EJ > 0, self.drafted_EJ, np.nan)
        return self.accepted_EJ / drafted_EJ

    def estimate(self, exit_layer: int, position: int) -> Estimate:
        """The rate at a position, with its interval from the texts that drafted there."""
        at = self.exits.index(exit_layer), position
        accepted_n, drafted_n = self.accepted_nEJ[:, *at], self.drafted_nEJ[:, *at]
        has_drafts_n = drafted_n > 0
        return from_samples(ratio, accepted_n[has_drafts_n], drafted_n[has_drafts_n], of="prompts")

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> "Acceptance":
        """Counts of answers of self-speculation. Answers of one exit and prompt are added up."""
        exits = sorted({one["exit_layer"] for one in answers})
        texts = list(dict.fromkeys(one["id"] for one in answers))
        most = max((len(one["drafted_by_position"]) for one in answers), default=0)
        drafted_nEJ, accepted_nEJ = np.zeros((2, len(texts), len(exits), most), int)
        for one in answers:
            at = texts.index(one["id"]), exits.index(one["exit_layer"])
            for counts_nEJ, name in ((drafted_nEJ, "drafted"), (accepted_nEJ, "accepted")):
                own = one[f"{name}_by_position"]
                counts_nEJ[at][: len(own)] += np.array(own, int)
        return cls(tuple(exits), drafted_nEJ, accepted_nEJ)


def acceptance(
    model: DecoderModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    exits: Sequence[int],
    num_draft_tokens: int,
    *,
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
    vocabulary: DraftVocabulary | None = None,
    **options: Any,
) -> Acceptance:
    """How many drafts of each exit are accepted at each position, over texts of these prompts.

    Every round drafts `num_draft_tokens`, but for the last rounds of a text. prompts: as in
    `Engine.generate`. vocabulary: tokens that may be drafted. options: of `Engine`, such as
    batch_size and mesh. Raises ConfigError as `Engine` does.
    """
    check(len(exits) > 0, "exits is empty: name at least one exit")
    rows: list[Mapping[str, Any]] = []
    strategies = [SelfSpeculative(one, num_draft_tokens, vocabulary) for one in exits]
    engine = Engine(model, tokenizer, strategies[0], **options)
    for strategy in strategies:
        engine.use(strategy)
        done = engine.generate(prompts, max_new_tokens=max_new_tokens, sampling=sampling)
        rows += [{"id": number, **one.to_json()} for number, one in enumerate(done)]
    return Acceptance.of(rows)
