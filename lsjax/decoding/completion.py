"""Results of a row of the decode loop: its text and its statistics."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from lsjax.data.tokenizer import StreamDecoder, Tokenizer
from lsjax.decoding.exit_outputs import ExitOutputs
from lsjax.decoding.state import EOS, LENGTH, RUNNING, STOP, DecodeState
from lsjax.decoding.strategy import Strategy

Origin = Literal["accepted", "looked-up", "corrected", "added"]
FINISH_REASONS = {RUNNING: None, EOS: "eos", LENGTH: "length", STOP: "stop"}


@dataclass(frozen=True)
class Trace:
    """The n new tokens of a row and where each came from.

    The fields are the buffers of DecodeState; log_probs_n and source_n may be None. round_n is 1 +
    drafted tokens at a round's last token, else 0. The first token comes from the prefill, which
    does not count as a round of decoding.
    """

    tokens_n: Int[np.ndarray, " n"]
    accepted_n: Bool[np.ndarray, " n"]
    replaced_n: Int[np.ndarray, " n"]
    round_n: Int[np.ndarray, " n"]
    log_probs_n: Float[np.ndarray, " n"] | None = None
    source_n: Int[np.ndarray, " n"] | None = None

    @classmethod
    def of(cls, state: DecodeState, row: int, start: int) -> "Trace":
        """The tokens of a row from position `start` on."""
        new = slice(start, int(state.length_B[row]))
        buffers = (state.tokens_BS, state.accepted_BS, state.replaced_BS, state.round_BS)
        buffers += (state.log_probs_BS, state.source_BS)
        # Copies: a view would keep the whole batch's buffers.
        copies = [b if b is None else np.asarray(b)[row, new].copy() for b in buffers]
        return cls(*copies)

    def __len__(self) -> int:
        return len(self.tokens_n)

    def cut(self, count: int) -> "Trace":
        """The first `count` tokens. Tokens after the cut count neither as drafted nor as accepted.
        If the cut is inside a round, only its kept tokens count as drafted."""
        kept = {name: b if b is None else b[:count] for name, b in vars(self).items()}
        cut = Trace(**kept)
        if count and not cut.round_n[-1]:
            round_n = cut.round_n.copy()
            round_n[-1] = count - np.flatnonzero(round_n)[-1]
            return replace(cut, round_n=round_n)
        return cut

    def origin(self, index: int) -> Origin:
        """Who wrote a token: an accepted draft of an exit or of a lookup, the correction of a
        rejected draft, or the full model after a draft that was all right."""
        if self.accepted_n[index]:
            looked_up = self.source_n is not None and self.source_n[index] == 0
            return "looked-up" if looked_up else "accepted"
        return "corrected" if self.replaced_n[index] >= 0 else "added"

    @property
    def rounds(self) -> int:
        """Rounds of decoding."""
        return int((self.round_n[1:] > 0).sum())

    def by_source(self) -> dict[str, dict[str, int]] | None:
        """Rounds and tokens of each source of drafts ("exit 8", "lookup" or "none"); None if the
        strategy does not choose them."""
        if self.source_n is None:
            return None
        found: dict[str, dict[str, int]] = {}
        for before, end in pairwise(np.flatnonzero(self.round_n)):
            exit_layer, drafted = self.source_n[end], self.round_n[end] > 1
            name = f"exit {exit_layer}" if exit_layer else "lookup" if drafted else "none"
            one = found.setdefault(name, dict(rounds=0, tokens=0))
            one["rounds"] += 1
            one["tokens"] += int(end - before)
        return found

    def by_position(self) -> tuple[list[int], list[int]]:
        """Tokens drafted and accepted at each position of a draft, first position first."""
        ends = np.flatnonzero(self.round_n)
        drafted = self.round_n[ends[1:]] - 1
        accepted = np.add.reduceat(self.accepted_n, ends[:-1] + 1) if len(ends) > 1 else drafted
        positions = range(max(drafted, default=0))
        return tuple([int((n > at).sum()) for at in positions] for n in (drafted, accepted))


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One prompt's result; the fields of decode.py's JSON lines. Undefined figures are None.

    token_ids: new tokens, including the end token. text excludes the end token and stop strings.
    decode_seconds: from the first new token to the last; in a batch it includes reading other
    prompts. compile_seconds: in neither prefill_seconds nor decode_seconds. tokens_per_second,
    tokens_per_round: without the first new token, so the latter is Spec-Bench's mean acceptance
    length. sources: rounds and tokens of each source of drafts, if the strategy chooses them. seed:
    None if greedy. log_probs: if requested, before penalties, temperature and filters, from the
    layers that ran for a token. trace and exits (those of the request) are not in JSON lines.
    """

    prompt: str
    text: str
    token_ids: list[int]
    num_prompt_tokens: int
    num_new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    tokens_per_second: float | None
    compile_seconds: float
    strategy: str
    exit_layer: int | None
    num_draft_tokens: int | None
    draft_vocab: int | None
    draft_confidence: float | None
    seed: int | None
    rounds: int
    drafted: int
    accepted: int
    acceptance_rate: float | None
    tokens_per_round: float | None
    drafted_by_position: list[int]
    accepted_by_position: list[int]
    sources: dict[str, dict[str, int]] | None
    log_probs: list[float] | None
    finish_reason: str
    trace: Trace
    exits: dict[int, ExitOutputs] = field(default_factory=dict)

    @classmethod
    def of(cls, trace: Trace, *, strategy: Strategy, decode_seconds: float, **rest) -> "Completion":
        """Derives every figure from the trace."""
        drafted, accepted = trace.by_position()
        later = len(trace) - 1
        settings = ("exit_layer", "num_draft_tokens", "draft_vocab", "draft_confidence")
        return cls(
            token_ids=trace.tokens_n.tolist(),
            num_new_tokens=len(trace),
            decode_seconds=decode_seconds,
            tokens_per_second=later / decode_seconds if later > 0 and decode_seconds > 0 else None,
            strategy=strategy.name,
            **{name: getattr(strategy, name) for name in settings},
            rounds=trace.rounds,
            drafted=sum(drafted),
            accepted=sum(accepted),
            acceptance_rate=sum(accepted) / sum(drafted) if drafted else None,
            tokens_per_round=later / trace.rounds if trace.rounds else None,
            drafted_by_position=drafted,
            accepted_by_position=accepted,
            sources=trace.by_source(),
            log_probs=None if trace.log_probs_n is None else trace.log_probs_n.tolist(),
            trace=trace,
            **rest,
        )

    def to_json(self) -> dict:
        """The fields of a JSON line."""
        return {key: value for key, value in vars(self).items() if key not in ("trace", "exits")}


@dataclass(frozen=True)
class Update:
    """What was read of a row: new text, the trace so far, and at the end the completion. Text
    that may be the beginning of a stop string is held back."""

    index: int  # of the request
    text: str
    trace: Trace
    completion: Completion | None


class RowText:
    """Turns a row's tokens into text as they arrive, and finds stop strings in it."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str]):
        self._decoder = StreamDecoder(tokenizer, prompt_ids)
        self._stop = stop
        self._num_read = 0  # tokens of the trace that are in the text
        self._shown = 0  # characters that `read` has returned
        self.text = ""

    def read(self, trace: Trace, finish: int) -> tuple[str, Trace, str | None]:
        """Reads new tokens. Returns the text that is safe to show now, and the trace, which is cut
        after a stop string. Also returns why the row has ended, or None."""
        end = len(trace) - (finish == EOS)  # without the end token
        while self._num_read < end and finish != STOP:
            finish = self._add(self._decoder.push([int(trace.tokens_n[self._num_read])]), finish)
            self._num_read += 1
            if finish == STOP:
                trace = trace.cut(self._num_read)
        held_back = 0
        if finish == RUNNING:  # the end of the text may be the beginning of a stop string
            unseen = self.text[self._shown :]
            sizes = [(stop, size) for stop in self._stop for size in range(1, len(stop))]
            held_back = max([0, *(n for stop, n in sizes if unseen.endswith(stop[:n]))])
        elif finish != STOP:
            # May add U+FFFD, which a stop string may contain.
            finish = self._add(self._decoder.finish(), finish)
        begin, self._shown = self._shown, len(self.text) - held_back
        return self.text[begin : self._shown], trace, FINISH_REASONS[finish]

    def _add(self, piece: str, finish: int) -> int:
        """Adds text, and cuts it at the first stop string. Returns why the row has ended."""
        self.text += piece
        found = [self.text.find(stop, self._shown) for stop in self._stop]
        found = [at for at in found if at >= 0]
        if found:
            self.text = self.text[: min(found)]
        return STOP if found else finish
