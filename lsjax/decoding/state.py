"""What a batch of decoding rows is, and the one rule by which new tokens enter it."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from lsjax.config import LlamaConfig, check
from lsjax.decoding.sampling import Draws, Purpose, Sampling
from lsjax.model.cache import KVCache, write
from lsjax.model.llama import Llama

RUNNING, EOS, LENGTH, STOP = range(4)  # why a row ended, if it did; STOP is set by the host


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DecodeState:
    """A batch of B rows with S slots each; everything that the decode loop carries.

    A row has `length_B` tokens, prompt and new ones. The last of them is pending: its keys and
    values are not in the cache yet, those of all before it are. The last four buffers are a trace
    from which the host derives text, colours and statistics (completion.py).
    """

    cache: KVCache
    length_B: Int[Array, " B"]
    end_B: Int[Array, " B"]  # no token at this position or beyond
    finish_B: Int[Array, " B"]  # RUNNING, EOS, LENGTH or STOP
    stop_ids: Int[Array, " n"]  # tokens that end a row; -1 is none
    tokens_BS: Int[Array, "B S"]
    accepted_BS: Bool[Array, "B S"]  # a draft proposed this token and the verification agreed
    replaced_BS: Int[Array, "B S"]  # the draft's token that the verification refused here, or -1
    round_BS: Int[Array, "B S"]  # at the last token of a round 1 + tokens drafted in it, else 0
    draws: Draws | None = None  # how tokens are drawn; None takes the likeliest

    @classmethod
    def create(
        cls,
        config: LlamaConfig,
        prompts: list[list[int]],
        max_new_tokens: list[int],
        stop_ids: Int[np.ndarray, " n"],
        *,
        capacity: int,
        slack: int,
        num_layers: int,
        dtype: DTypeLike,
        stacked: bool = False,
        sampling: Sequence[Sampling] | None = None,
    ) -> "DecodeState":
        """Rows with their prompts and an empty cache for the first `num_layers` layers, stacked if
        the model's are.

        slack: slots that a round may write beyond a row's end. A row with max_new_tokens 0 is a
        filler that has ended from the start. sampling: of each row, greedy by default.

        Raises ConfigError where a row and the slack do not fit the capacity.
        """
        batch = len(prompts)
        length_B = np.array([len(prompt) for prompt in prompts], np.int32)
        end_B = length_B + np.array(max_new_tokens, np.int32)
        longest = int(end_B.max())
        check(
            longest + slack <= capacity,
            f"a row of {longest} tokens and {slack} slots of slack do not fit the cache of "
            f"{capacity} slots",
        )
        tokens_BS = np.zeros((batch, capacity), np.int32)
        for row, prompt in enumerate(prompts):
            tokens_BS[row, : len(prompt)] = prompt
        return cls(
            cache=KVCache.create(config, batch, capacity, dtype, num_layers, stacked=stacked),
            length_B=jnp.asarray(length_B),
            end_B=jnp.asarray(end_B),
            finish_B=jnp.asarray(np.where(end_B > length_B, RUNNING, LENGTH).astype(np.int32)),
            stop_ids=jnp.asarray(stop_ids, jnp.int32),
            tokens_BS=jnp.asarray(tokens_BS),
            accepted_BS=jnp.zeros((batch, capacity), bool),
            replaced_BS=jnp.full((batch, capacity), -1, jnp.int32),
            round_BS=jnp.zeros((batch, capacity), jnp.int32),
            draws=None if sampling is None else Draws.create(sampling),
        )

    @property
    def running_B(self) -> Bool[Array, " B"]:
        """Rows that want more tokens."""
        return self.finish_B == RUNNING

    @property
    def pending_B(self) -> Int[Array, " B"]:
        """The last token of each row."""
        return jnp.take_along_axis(self.tokens_BS, self.length_B[:, None] - 1, axis=1)[:, 0]

    def is_stop(self, tokens: Int[Array, "*any"]) -> Bool[Array, "*any"]:
        """Whether a token ends its row."""
        return (tokens[..., None] == self.stop_ids).any(-1)

    def with_cache(self, cache: KVCache) -> "DecodeState":
        """The same rows with a cache that has seen more tokens."""
        return dataclasses.replace(self, cache=cache)

    def choose(self, logits_BV: Float[Array, "B V"]) -> Int[Array, " B"]:
        """The next token of each row by the whole model's logits."""
        if self.draws is None:
            return logits_BV.argmax(-1).astype(self.tokens_BS.dtype)
        log_BV = self.draws.log_probs(logits_BV[:, None])[:, 0]
        return self.draws.token(log_BV, self.length_B, Purpose.TOKEN)

    def commit(
        self,
        new_BT: Int[Array, "B T"],
        count_B: Int[Array, " B"] | int,
        *,
        accepted_B: Int[Array, " B"] | int = 0,
        drafted_B: Int[Array, " B"] | int = 0,
        draft_BT: Int[Array, "B T"] | None = None,
    ) -> "DecodeState":
        """Appends the first `count_B` of T tokens to every running row and ends rows.

        Tokens behind a stop token or a row's end are dropped. The first `accepted_B` of the
        tokens came from a draft of `drafted_B`; `draft_BT` says what the draft had proposed.
        """
        steps = new_BT.shape[1]
        index_T = jnp.arange(steps)
        stop_BT = self.is_stop(new_BT)
        to_stop_B = jnp.where(stop_BT.any(1), stop_BT.argmax(1) + 1, steps)
        room_B = self.end_B - self.length_B
        count_B = jnp.minimum(jnp.minimum(count_B, to_stop_B), room_B)
        count_B = jnp.where(self.running_B, count_B, 0)
        last_BT = index_T == count_B[:, None] - 1
        is_accepted_BT = index_T < jnp.reshape(accepted_B, (-1, 1))
        refused_BT = jnp.full_like(new_BT, -1)
        if draft_BT is not None:
            was_drafted_BT = index_T < jnp.reshape(drafted_B, (-1, 1))
            refused_BT = jnp.where(was_drafted_BT & ~is_accepted_BT, draft_BT, -1)
        ends_B = self.running_B & (count_B == room_B)
        stops_B = (last_BT & stop_BT).any(1)
        finish_B = jnp.where(ends_B, LENGTH, self.finish_B)

        def put(buffer_BS, values_BT):
            return write(buffer_BS, values_BT, self.length_B)

        return dataclasses.replace(
            self,
            length_B=self.length_B + count_B,
            finish_B=jnp.where(stops_B, EOS, finish_B),
            tokens_BS=put(self.tokens_BS, new_BT),
            accepted_BS=put(self.accepted_BS, is_accepted_BT),
            replaced_BS=put(self.replaced_BS, refused_BT),
            round_BS=put(self.round_BS, jnp.where(last_BT, 1 + jnp.reshape(drafted_B, (-1, 1)), 0)),
        )


class Strategy(ABC):
    """How new tokens are found. Frozen and hashable.

    What is compiled depends on `program` only; `arguments` are handed to it at each call. So
    strategies that differ in nothing but their arguments share a compiled loop.
    """

    name: ClassVar[str]
    exit_layer: int | None = None
    num_draft_tokens: int | None = None
    draft_vocab: int | None = None

    @property
    def slack(self) -> int:
        """Slots that one round may write beyond the end of a row."""
        return 1

    @property
    def program(self) -> Hashable:
        """Strategies with equal ones share their programs."""
        return self

    @abstractmethod
    def validate(self, config: LlamaConfig) -> None:
        """Raises ConfigError where the strategy does not fit the model."""

    @abstractmethod
    def depth(self, config: LlamaConfig) -> int:
        """Layers that run for a token that counts: the exit layer, or all."""

    def arguments(self, model: Llama) -> Any:
        """A pytree of arrays: what `step` needs beside the model."""
        return ()

    @abstractmethod
    def step(self, model: Llama, state: DecodeState, arguments: Any) -> DecodeState:
        """One round: at least one token for every running row."""
