"""Who answered a benchmark's requests: which strategy decoded, or how many layers ran once.

Decoding and scoring are different things. A text comes from a strategy; the likelihood of a given
text comes from one pass through the layers whose distribution the strategy has. Self-speculation
has the whole model's, so its likelihoods say nothing about its exit.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

from lsjax.decoding.completion import Completion
from lsjax.decoding.state import Strategy

FORWARD_PASS = "forward_pass"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Who answered one request.

    strategy: that decoded the text, with its settings, the tokens of the text and how its drafts
    did; or "forward_pass", with exit_layer the number of layers that ran. None: does not apply.
    """

    strategy: str
    exit_layer: int | None = None
    num_draft_tokens: int | None = None
    draft_vocab: int | None = None
    draft_confidence: float | None = None
    num_new_tokens: int | None = None
    drafted: int | None = None
    accepted: int | None = None

    @classmethod
    def of(cls, completion: Completion) -> "Answer":
        """Who decoded this."""
        return cls(**{field.name: getattr(completion, field.name) for field in fields(cls)})

    @classmethod
    def by(cls, strategy: Strategy) -> "Answer":
        """What this strategy would decode."""
        return cls(
            strategy=strategy.name,
            exit_layer=strategy.exit_layer,
            num_draft_tokens=strategy.num_draft_tokens,
            draft_vocab=strategy.draft_vocab,
            draft_confidence=strategy.draft_confidence,
        )

    @classmethod
    def forward_pass(cls, layers: int) -> "Answer":
        """One pass through so many layers."""
        return cls(strategy=FORWARD_PASS, exit_layer=layers)

    def to_json(self) -> dict:
        """What applies."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        if self.strategy == FORWARD_PASS:
            return f"one pass of {self.exit_layer} layer{'s' * (self.exit_layer > 1)}"
        parts = [self.strategy.replace("_", " ")]
        if self.exit_layer is not None:
            parts.append(f"exit {self.exit_layer}")
        if self.num_draft_tokens is not None:
            of = "" if self.draft_vocab is None else f" of {self.draft_vocab} tokens"
            parts.append(f"{self.num_draft_tokens} drafts{of}")
        if self.draft_confidence is not None:
            parts.append(f"at {self.draft_confidence:g} or more")
        return ", ".join(parts)


def acceptance_rate(answers: Iterable[Answer]) -> float | None:
    """Accepted / drafted of all together; None where nothing was drafted."""
    pairs = [(answer.drafted, answer.accepted) for answer in answers if answer.drafted]
    drafted = sum(drafted for drafted, _ in pairs)
    return sum(accepted for _, accepted in pairs) / drafted if drafted else None
