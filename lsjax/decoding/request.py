"""What can be asked of a model: checked before its weights are read."""

from collections.abc import Sequence
from dataclasses import dataclass

from lsjax.config import Checked, LlamaConfig, bounded, check
from lsjax.data.tokenizer import Tokenizer
from lsjax.decoding.sampling import GREEDY, Sampling


@dataclass(frozen=True, kw_only=True)
class Request(Checked):
    """A prompt, how its text continues, and what ends it.

    Raises ConfigError for a field of another type, an empty stop string and negative stop ids.
    """

    prompt: str | Sequence[int]
    """Text or token ids."""
    max_new_tokens: int = 128
    """Ends a text that does not end by itself."""
    stop: tuple[str, ...] = ()
    """Strings that end it, wherever token borders lie; they are cut off."""
    stop_ids: tuple[int, ...] = bounded((), low=0)
    """Tokens that end it, beside the tokenizer's own."""
    sampling: Sampling = GREEDY
    """How tokens are chosen; a text depends on its own request only, not on its batch mates."""
    log_probs: bool = False
    """Whether the completion says how likely each token was."""

    def __post_init__(self):
        super().__post_init__()
        check("" not in self.stop, "a stop string is empty: give the text to stop at")


def encode_prompt(
    request: Request, tokenizer: Tokenizer, config: LlamaConfig, max_length: int | None = None
) -> list[int]:
    """The token ids of a request's prompt. max_length: of the text, the model's context by default.

    Raises ConfigError for an empty prompt, for one that leaves no room for the new tokens, and for
    ids that the model does not have, in the prompt or among those that end its text.
    """
    prompt, new = request.prompt, request.max_new_tokens
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    limit = config.max_context if max_length is None else max_length
    vocabulary = f"the vocabulary of {config.vocab_size}: give ids in 0..{config.vocab_size - 1}"
    check(
        max(request.stop_ids, default=0) < config.vocab_size,
        f"stop ids {list(request.stop_ids)} are not all in {vocabulary}",
    )
    check(len(ids) > 0, "the prompt is empty: it needs at least one token")
    check(new >= 1, f"max_new_tokens {new} is below 1: ask for 1 or more")
    check(
        min(ids) >= 0 and max(ids) < config.vocab_size,
        f"token ids {min(ids)}..{max(ids)} are not all in {vocabulary}",
    )
    check(
        len(ids) + new <= limit,
        f"a prompt of {len(ids)} tokens and {new} new ones do not fit the length of "
        f"{limit}: shorten the prompt, lower --max-new-tokens"
        + (" or raise --max-length" if limit < config.max_context else ""),
    )
    return ids
