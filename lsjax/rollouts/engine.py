"""Texts for reinforcement learning, from a policy whose weights change.

R: rows of a batch, P: tokens of the longest prompt, T: tokens of the longest text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int32

from lsjax.config import Sampling, check
from lsjax.data.tokenizer import Tokenizer
from lsjax.decoding.auto.adaptive import Adaptive
from lsjax.decoding.completion import Completion
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import Request
from lsjax.decoding.strategy import Strategy
from lsjax.model.protocol import DecoderModel

AT_ONE = Sampling(temperature=1.0)


@dataclass(frozen=True)
class RolloutBatch:
    """G texts of each prompt: text g of prompt p is row p G + g.

    prompts_RP: token ids, padded on the left. tokens_RT: new tokens with the end token, padded on
    the right. masks: whether a token is no padding. log_probs_RT: of the new tokens; 0 in padding.
    """

    prompts_RP: Int32[np.ndarray, "R P"]
    prompt_mask_RP: Bool[np.ndarray, "R P"]
    tokens_RT: Int32[np.ndarray, "R T"]
    mask_RT: Bool[np.ndarray, "R T"]
    log_probs_RT: Float32[np.ndarray, "R T"]
    completions: list[Completion]

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """Prompts, new tokens and both masks, as `token_log_probs` and other losses take them."""
        return self.prompts_RP, self.prompt_mask_RP, self.tokens_RT, self.mask_RT

    @property
    def texts(self) -> list[str]:
        """New text of each row, without the end token."""
        return [one.text for one in self.completions]


class Rollouts:
    """Decodes groups of texts with a policy.

    strategy: by default `Adaptive` without exits; name exits that the policy was trained with. All
    keep the policy's distribution. batch_size: rows that decode side by side. pad_id: token of
    padding. options: others of `Engine`, such as mesh. Raises ConfigError as `Engine` does.
    """

    def __init__(
        self,
        policy: DecoderModel,
        tokenizer: Tokenizer,
        strategy: Strategy | None = None,
        *,
        batch_size: int = 8,
        pad_id: int = 0,
        **options: Any,
    ):
        # The compiler's own layouts would cost a copy of the weights at every change.
        options = {"lay_out": False, "long_lived": True, **options}
        given = policy, tokenizer, strategy or Adaptive(())
        self.engine = Engine(*given, batch_size=batch_size, **options)
        self.pad_id = pad_id

    def use(self, policy: DecoderModel) -> None:
        """Decodes with these weights from now on. Compiles nothing, and copies no array that is a
        layer's own and in place. Raises ConfigError if the form differs."""
        self.engine.use_model(policy)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        group_size: int = 1,
        max_new_tokens: int = 128,
        sampling: Sampling = AT_ONE,
        sampled_log_probs: bool = True,
        **options: Any,
    ) -> RolloutBatch:
        """G = `group_size` texts of each prompt, as text or token ids.

        sampling: row r has its seed + r. sampled_log_probs: log-probabilities of the distributions
        that tokens are drawn from, after temperature and filters, or else of the model's own.
        options: other fields of `Request`. Raises ConfigError as `Engine.generate` does.
        """
        check(group_size >= 1, f"group_size {group_size} is below 1: ask for at least one text")
        check(bool(prompts), "there are no prompts: give at least one")
        ids = [
            self.engine.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
            for prompt in prompts
        ]
        settings = dict(max_new_tokens=max_new_tokens, sampled_log_probs=sampled_log_probs)
        # Rows of a group follow each other: they share the cache of their prompt.
        requests = [
            Request(
                prompt=prompt,
                sampling=replace(sampling, seed=(sampling.seed + row) % 2**32),
                log_probs=True,
                **settings,
                **options,
            )
            for row, prompt in enumerate(one for one in ids for _ in range(group_size))
        ]
        completions = self.engine.generate(requests)
        prompts_RP, prompt_mask_RP = padded(
            [request.prompt for request in requests], self.pad_id, left=True
        )
        tokens_RT, mask_RT = padded([one.token_ids for one in completions], self.pad_id)
        log_probs_RT = np.zeros(tokens_RT.shape, np.float32)
        log_probs_RT[mask_RT] = np.concatenate([one.log_probs for one in completions])
        return RolloutBatch(
            prompts_RP, prompt_mask_RP, tokens_RT, mask_RT, log_probs_RT, completions
        )


def padded(
    rows: Sequence[Sequence[int]], pad_id: int, *, left: bool = False
) -> tuple[Int32[np.ndarray, "R n"], Bool[np.ndarray, "R n"]]:
    """Rows of one length, and where they are no padding."""
    lengths_R1 = np.array([len(row) for row in rows])[:, None]
    longest = int(lengths_R1.max())
    at_n = np.arange(longest)
    mask_Rn = at_n >= longest - lengths_R1 if left else at_n < lengths_R1
    found_Rn = np.full(mask_Rn.shape, pad_id, np.int32)
    found_Rn[mask_Rn] = np.concatenate([np.asarray(row, np.int32) for row in rows])
    return found_Rn, mask_Rn
