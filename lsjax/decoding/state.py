"""State of a decoding batch, and the single function (`commit`) that appends tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Shaped

from lsjax.config import check
from lsjax.decoding.request import Request
from lsjax.decoding.sampling import Penalties, Purpose, RowSampling, argmax
from lsjax.kernels.cache_writes import write
from lsjax.model.parameters import placed
from lsjax.model.protocol import Cache
from lsjax.sharding import on_each_device

RUNNING, EOS, LENGTH, STOP = range(4)  # why a row ended; the host sets STOP
STOP_IDS = 4  # the stop-id capacity of a row is a multiple of this


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DecodeState:
    """Carry of the decode loop: B rows with S slots each.

    A row has `length_B` tokens, prompt and new ones. The last one is pending: only earlier tokens
    are cached. completion.py derives text and statistics from the buffers. Names of fields end in
    their axes, which decide their sharding (model/parameters.py), and what grows with the slots.
    """

    cache: Cache
    length_B: Int[Array, " B"]
    end_B: Int[Array, " B"]  # no token at this position or beyond
    finish_B: Int[Array, " B"]  # RUNNING, EOS, LENGTH or STOP
    stop_Bn: Int[Array, "B n"]  # tokens that end a row; -1 means empty
    tokens_BS: Int[Array, "B S"]
    accepted_BS: Bool[Array, "B S"]  # this token was an accepted draft token
    replaced_BS: Int[Array, "B S"]  # the draft token that was rejected here, or -1
    round_BS: Int[Array, "B S"]  # 1 + drafted tokens, at a round's last token; else 0
    log_probs_BS: Float[Array, "B S"] | None  # of the tokens, if requested
    source_BS: Int[Array, "B S"] | None  # layers that drafted, if the strategy chooses them
    sampling: RowSampling | None  # how tokens are sampled; None means argmax
    penalties: Penalties | None
    learned: Any  # what the strategy has learned of each row; None for most
    # Whether log_probs_BS are after penalties, temperature and filters.
    sampled_log_probs: bool = field(default=False, metadata=dict(static=True))

    @classmethod
    def create(
        cls,
        requests: Sequence[Request],
        *,
        cache: Cache,
        capacity: int,
        ends: Sequence[int] = (),
        all_requests: Sequence[Request] | None = None,
        learned: Any = None,
        mesh: Mesh | None = None,
    ) -> "DecodeState":
        """Rows of requests, whose prompts are token ids, sharded over a mesh (lsjax/sharding.py).

        A request of 0 new tokens is a filler. cache: of `capacity` slots per row. ends: tokens that
        end every row. all_requests: those that this program serves; sets optional buffers. learned:
        by `first_guess`.
        """
        all_requests, batch = all_requests or requests, len(requests)
        length_B = np.array([len(request.prompt) for request in requests], np.int32)
        new_B = np.array([request.max_new_tokens for request in requests], np.int32)
        most_stops = max(len({*ends, *request.stop_ids}) for request in all_requests)
        room = max(1, most_stops)
        stop_Bn = np.full((batch, -(-room // STOP_IDS) * STOP_IDS), -1, np.int32)
        tokens_BS = np.zeros((batch, capacity), np.int32)
        for row, request in enumerate(requests):
            tokens_BS[row, : len(request.prompt)] = request.prompt
            stop = [*{*ends, *request.stop_ids}]
            stop_Bn[row, : len(stop)] = stop
        log_probs = any(request.log_probs for request in all_requests)
        sampled = {request.sampled_log_probs for request in all_requests}
        check(len(sampled) == 1, "requests of a batch must agree on sampled_log_probs")
        samplings = [[one.sampling for one in rows] for rows in (requests, all_requests)]

        def filled(value, dtype=np.int32):
            return np.full((batch, capacity), value, dtype)

        # NumPy's arrays: JAX would compile a small program for each.
        state = cls(
            cache=cache,
            length_B=length_B,
            end_B=length_B + new_B,
            finish_B=np.where(new_B > 0, RUNNING, LENGTH).astype(np.int32),
            stop_Bn=stop_Bn,
            tokens_BS=tokens_BS,
            accepted_BS=filled(False, bool),
            replaced_BS=filled(-1),
            round_BS=filled(0),
            log_probs_BS=filled(0, np.float32) if log_probs else None,
            source_BS=None if learned is None else filled(0),
            sampling=RowSampling.create(*samplings),
            penalties=Penalties.create(*samplings),
            learned=learned,
            sampled_log_probs=sampled.pop(),
        )
        return placed(state, mesh)

    @property
    def capacity(self) -> int:
        """Slots of each row."""
        return self.tokens_BS.shape[1]

    def grown(self, capacity: int, cache: Cache) -> "DecodeState":
        """The same rows with `capacity` slots, and a cache of as many. New slots are never read
        before a write."""
        buffers = {name: value for name, value in vars(self).items() if name.endswith("_BS")}
        more = ((0, 0), (0, capacity - self.capacity))
        longer = jax.tree.map(lambda buffer_BS: jnp.pad(buffer_BS, more), buffers)
        return replace(self, cache=cache, **longer)

    @property
    def running_B(self) -> Bool[Array, " B"]:
        """Rows still decoding."""
        return self.finish_B == RUNNING

    def same_rows_and_room(self, running_B: Bool[Array, " B"], slack: int) -> Bool[Array, ""]:
        """Whether the rows `running_B` all still run, and have `slack` free slots."""
        has_room_B = ~self.running_B | (self.length_B + slack <= self.capacity)
        return ((self.running_B == running_B) & has_room_B).all()

    @property
    def pending_B(self) -> Int[Array, " B"]:
        """The last token of each row."""
        return jnp.take_along_axis(self.tokens_BS, self.length_B[:, None] - 1, axis=1)[:, 0]

    def is_stop(self, tokens: Int[Array, "B *T"]) -> Bool[Array, "B *T"]:
        """Whether a token ends its row."""
        stop = jnp.expand_dims(self.stop_Bn, tuple(range(1, tokens.ndim)))
        return (tokens[..., None] == stop).any(-1)

    def with_cache(self, cache: Cache) -> "DecodeState":
        """The same rows with an updated cache."""
        return replace(self, cache=cache)

    def penalised(
        self,
        logits_BTW: Float[Array, "B T W"],
        first: Int[Array, ""] | int = 0,
        draft_Bn: Int[Array, "B n"] | None = None,
        places_V: Int[Array, " V"] | None = None,
    ) -> Float[Array, "B T W"]:
        """Applies penalties to logits of T new positions, starting at offset `first`. draft_Bn:
        hypothetical new tokens. places_V: as in DraftHead."""
        if self.penalties is None:
            return logits_BTW
        history_BS = self.tokens_BS
        if draft_Bn is not None:
            history_BS = self._written(history_BS, draft_Bn)
        position_BT = self.length_B[:, None] + first + jnp.arange(logits_BTW.shape[1])
        arguments = (self.penalties, logits_BTW, history_BS, position_BT, places_V)
        rows = P("data")
        return on_each_device(Penalties.apply, arguments, (*[rows] * 4, P()), rows)

    def log_probs(
        self,
        logits_BTV: Float[Array, "B T V"],
        changed_BTV: Float[Array, "B T V"],
        tokens_BT: Int[Array, "B T"],
    ) -> Float[Array, "B T"] | None:
        """Log-probabilities of the tokens; None if not requested. changed_BTV: the logits after
        penalties."""
        if self.log_probs_BS is None:
            return None
        if self.sampled_log_probs and self.sampling is not None:
            logits_BTV = self.sampling.log_distribution(changed_BTV)
        elif self.sampled_log_probs:
            logits_BTV = changed_BTV
        chosen_BT = jnp.take_along_axis(logits_BTV, tokens_BT[..., None], axis=2)[..., 0]
        return chosen_BT - jax.nn.logsumexp(logits_BTV, axis=-1)

    def append(self, logits_BV: Float[Array, "B V"]) -> "DecodeState":
        """Appends one token to every running row, chosen by these logits."""
        logits_BTV = logits_BV[:, None]
        changed_BTV = self.penalised(logits_BTV)
        if self.sampling is None:
            token_B = argmax(changed_BTV[:, 0])
        else:
            p_BV = jnp.exp(self.sampling.log_distribution(changed_BTV)[:, 0])
            token_B = self.sampling.token(p_BV, self.length_B, Purpose.TOKEN)
        new_BT = token_B[:, None]
        found_BT = self.log_probs(logits_BTV, changed_BTV, new_BT)
        return self.commit(new_BT, log_probs_BT=found_BT)

    def commit(
        self,
        new_BT: Int[Array, "B T"],
        accepted_B: Int[Array, " B"] | int = 0,
        *,
        drafted_B: Int[Array, " B"] | int = 0,
        draft_BT: Int[Array, "B T"] | None = None,
        log_probs_BT: Float[Array, "B T"] | None = None,
        source: Int[Array, ""] | int = 0,
    ) -> "DecodeState":
        """Appends the first `accepted_B` + 1 of T tokens to every running row and ends rows.

        Tokens after a stop token or past the row's limit are dropped. All but the last came from a
        draft, draft_BT, of `drafted_B` tokens, by `source` layers. log_probs_BT: if they are kept.
        """
        count_B, steps = accepted_B + 1, new_BT.shape[1]
        index_T, stop_BT = jnp.arange(steps), self.is_stop(new_BT)
        to_stop_B = jnp.where(stop_BT.any(1), stop_BT.argmax(1) + 1, steps)
        room_B = self.end_B - self.length_B
        count_B = jnp.minimum(jnp.minimum(count_B, to_stop_B), room_B)
        count_B = jnp.where(self.running_B, count_B, 0)
        last_BT = index_T == count_B[:, None] - 1
        is_accepted_BT = jnp.broadcast_to(index_T < jnp.reshape(accepted_B, (-1, 1)), new_BT.shape)
        rejected_BT = jnp.full_like(new_BT, -1)
        if draft_BT is not None:
            was_drafted_BT = index_T < jnp.reshape(drafted_B, (-1, 1))
            rejected_BT = jnp.where(was_drafted_BT & ~is_accepted_BT, draft_BT, -1)
        ends_B = self.running_B & (count_B == room_B)
        stops_B = (last_BT & stop_BT).any(1)
        finish_B = jnp.where(ends_B, LENGTH, self.finish_B)

        put, kept, sources_BS = self._written, self.log_probs_BS, self.source_BS
        if sources_BS is not None:
            sources_BS = put(sources_BS, jnp.full_like(new_BT, source))
        return replace(
            self,
            log_probs_BS=None if kept is None else put(kept, log_probs_BT),
            source_BS=sources_BS,
            length_B=self.length_B + count_B,
            finish_B=jnp.where(stops_B, EOS, finish_B),
            tokens_BS=put(self.tokens_BS, new_BT),
            accepted_BS=put(self.accepted_BS, is_accepted_BT),
            replaced_BS=put(self.replaced_BS, rejected_BT),
            round_BS=put(self.round_BS, jnp.where(last_BT, 1 + jnp.reshape(drafted_B, (-1, 1)), 0)),
        )

    def _written(
        self, buffer_BS: Shaped[Array, "B S"], new_BT: Shaped[Array, "B T"]
    ) -> Shaped[Array, "B S"]:
        """The buffer with these values after the tokens of each row."""
        rows = P("data")
        return on_each_device(write, (buffer_BS, new_BT, self.length_B), (rows,) * 3, rows)
