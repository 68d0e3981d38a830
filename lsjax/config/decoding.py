"""Configuration of decoding: how tokens are sampled, and shapes to compile for."""

from dataclasses import dataclass, replace
from typing import Literal

from lsjax.config.checked import Checked, bounded, check
from lsjax.config.llama import LlamaConfig


@dataclass(frozen=True, kw_only=True)
class Sampling(Checked):
    """How the tokens of a text are chosen.

    Penalties come first, then the temperature, then top_k, top_p and min_p in this order. Each
    filter applies to the tokens that the previous one has left.

    Raises ConfigError for a number out of its range.
    """

    temperature: float = bounded(
        0.0, low=0, high=1e30, hint="0 is greedy, 1 draws as the model says"
    )
    """0 is greedy: the argmax, whatever the filters and the seed. Above 0, tokens are drawn with
    logits divided by this value."""
    top_k: int = bounded(0, low=0, high=2**31 - 1, hint="0 is all tokens")
    """Draws from the k most probable tokens, ties with the last one included. 0 is all."""
    top_p: float = bounded(1.0, above=0, high=1, hint="1 is all tokens")
    """Draws from the fewest tokens with total probability p or more (Holtzman et al., 2020)."""
    min_p: float = bounded(0.0, low=0, high=1, hint="0 is all tokens")
    """Draws from tokens at least min_p times as probable as the argmax (Nguyen et al., 2024)."""
    seed: int = bounded(0, low=0, high=2**32 - 1)
    """Seed of the first text; each further text has the next number. 0 follows 2^32 - 1."""
    repetition_penalty: float = bounded(1.0, low=1, high=1e30, hint="1 is no penalty")
    """For tokens of prompt and text, divides logits above 0 and multiplies those below (Keskar et
    al., 2019)."""
    no_repeat_ngram: int = bounded(0, low=0, high=2**31 - 1, hint="0 allows all")
    """Repeats no n-gram of this size, prompt included; 0 allows all."""

    def of_text(self, number: int) -> "Sampling":
        """Settings of a further text: the seed + number, modulo 2^32."""
        return replace(self, seed=(self.seed + number) % 2**32)


GREEDY = Sampling()


Weights = Literal["float", "int8"]


@dataclass(frozen=True)
class DecodingShape(Checked, prefix="--decoding."):
    """Rows to decode: greedy, with prompts of one length."""

    batch_size: tuple[int, ...] = bounded((1,), low=1)
    """Number of rows; each of several numbers is a program."""
    prompt_tokens: int = bounded(2_048, low=1)
    """Tokens of each prompt, and so in the cache at a round."""
    strategy: Literal["self_speculative", "autoregressive", "auto"] = "self_speculative"
    """What a round is. A round of autoregressive decoding is one token. auto may draft with the
    exit, or with the one at half of the layers. Its rounds with and without drafts are reported."""
    exit_layer: int | None = None
    """Exit that drafts; a quarter of the layers by default."""
    num_draft_tokens: int = 4
    """Tokens drafted per round."""
    exit_blocks: bool = False
    """Whether exit blocks draft in place of their exits."""
    weights: Weights = "float"
    """Weights of the matrices: bfloat16, or int8 with a scale for each output channel."""

    def __post_init__(self):
        super().__post_init__()
        given = bool(self.batch_size)
        check(given, "--decoding.batch-size is empty: give numbers of rows, such as 1 8 64")

    def exit_of(self, model: LlamaConfig) -> int:
        """The exit that drafts."""
        return self.exit_layer or max(1, model.num_layers // 4)
