"""Requests: prompts with their settings, checked before weights are read."""

from collections.abc import Sequence
from dataclasses import dataclass

from lsjax.config import GREEDY, Checked, Sampling, bounded, check
from lsjax.data.tokenizer import Tokenizer
from lsjax.model.protocol import Sizes


@dataclass(frozen=True, kw_only=True)
class Request(Checked):
    """A prompt, how its text is sampled, and when it ends.

    Raises ConfigError for a field of another type, an empty stop string and negative stop ids.
    """

    prompt: str | Sequence[int]
    """Text or token ids."""
    max_new_tokens: int = 128
    """Maximum number of new tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end the text, across token boundaries too; they are cut off."""
    stop_ids: tuple[int, ...] = bounded((), low=0)
    """Tokens that end the text, beside the tokenizer's own."""
    sampling: Sampling = GREEDY
    """How tokens are chosen. A text depends on its own request only, except with `Adaptive`."""
    log_probs: bool = False
    """Whether the completion contains the log-probability of each token."""
    sampled_log_probs: bool = False
    """Whether these are after penalties, temperature and filters: of the distributions that tokens
    are drawn from. All requests of a batch agree."""
    exits: tuple[int, ...] = bounded((), low=1)
    """Exits whose states and probabilities at each new token the completion contains."""

    def __post_init__(self):
        super().__post_init__()
        check("" not in self.stop, "a stop string is empty: give the text to stop at")


def encode_prompt(
    request: Request, tokenizer: Tokenizer, sizes: Sizes, max_length: int | None = None
) -> list[int]:
    """Token ids of a request's prompt. max_length: of the text, the model's context by default.

    Raises ConfigError for an empty prompt, and for too few new tokens or too little room for them.
    Also raises it for ids of prompt or `stop_ids` that the model does not have.
    """
    prompt, new = request.prompt, request.max_new_tokens
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    limit = sizes.max_context if max_length is None else max_length
    vocabulary = f"the vocabulary of {sizes.vocab_size}: give ids in 0..{sizes.vocab_size - 1}"
    check(
        max(request.stop_ids, default=0) < sizes.vocab_size,
        f"stop ids {list(request.stop_ids)} are not all in {vocabulary}",
    )
    check(len(ids) > 0, "the prompt is empty: it needs at least one token")
    check(new >= 1, f"max_new_tokens {new} is below 1: use 1 or more")
    check(
        min(ids) >= 0 and max(ids) < sizes.vocab_size,
        f"token ids {min(ids)}..{max(ids)} are not all in {vocabulary}",
    )
    check(
        len(ids) + new <= limit,
        f"a prompt of {len(ids)} tokens and {new} new ones do not fit the length of "
        f"{limit}: shorten the prompt, lower --max-new-tokens"
        + (" or raise --max-length" if limit < sizes.max_context else ""),
    )
    return ids
