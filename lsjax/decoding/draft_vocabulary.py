"""Drafting from the most frequent tokens only.

The head is as dear as several layers (8 of SmolLM2's 30, 4.3 of Llama-3.2 1B's 16), and a draft
passes it for every token. A draft may come from any distribution, so it may as well come from the
N most frequent tokens of the domain: N rows of the head instead of V. The verification weighs the
whole vocabulary, so the text stays the same; a token outside costs a rejected draft.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lsjax.config import LlamaConfig, check
from lsjax.model.llama import Llama


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DraftHead:
    """The head's rows of the tokens that may be drafted. places_V: where a token stands among
    them, N if it does not."""

    ids_N: Int[Array, " N"]
    places_V: Int[Array, " V"]
    table_ND: Float[Array, "N D"]


@dataclass(frozen=True, eq=False)
class DraftVocabulary:
    """Token ids that may be drafted, in rising order: where two logits are equal, the lower id
    wins, as it does with the whole head."""

    ids_N: Int[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.ids_N)

    @classmethod
    def most_frequent(
        cls, counts: Mapping[int, int], size: int, vocab_size: int
    ) -> "DraftVocabulary":
        """The `size` tokens with the highest counts. Where fewer were seen, the lowest ids fill
        up: tokenizers give low ids to what they merged first.

        Raises ConfigError for a size that is not in 1..vocab_size - 1.
        """
        _check_size(size, vocab_size)
        ranked = sorted(counts, key=lambda token: (-counts[token], token))[:size]
        seen = set(ranked)
        fill = (token for token in range(size + len(seen)) if token not in seen)
        while len(ranked) < size:
            ranked.append(next(fill))
        return cls(np.sort(np.array(ranked, np.int32)))

    def validate(self, config: LlamaConfig) -> None:
        """Raises ConfigError where the model has no such tokens, or no others."""
        _check_size(len(self), config.vocab_size)
        check(bool((np.diff(self.ids_N) > 0).all()), "the draft vocabulary's ids do not rise")
        check(
            bool(0 <= self.ids_N[0] and self.ids_N[-1] < config.vocab_size),
            f"the draft vocabulary has ids {self.ids_N[0]}..{self.ids_N[-1]}, the model "
            f"0..{config.vocab_size - 1}: count the tokens with the model's own tokenizer",
        )

    def head(self, model: Llama) -> DraftHead:
        """Its rows of the model's head."""
        ids_N = jnp.asarray(self.ids_N)
        places_V = jnp.full(model.config.vocab_size, len(self), jnp.int32)
        places_V = places_V.at[ids_N].set(jnp.arange(len(self)))
        return DraftHead(ids_N, places_V, model.head_table[ids_N])


def _check_size(size: int, vocab_size: int) -> None:
    check(size >= 1, f"a draft vocabulary of {size} is empty: choose --draft-vocab 1 or more")
    check(
        size < vocab_size,
        f"a draft vocabulary of {size} does not make the head of {vocab_size} smaller: choose a "
        "smaller --draft-vocab, or none",
    )
