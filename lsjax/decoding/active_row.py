"""A request that decodes in a row of a batch."""

from dataclasses import dataclass, replace
from typing import Any

from lsjax.data.tokenizer import Tokenizer
from lsjax.decoding.completion import Completion, RowText, Trace
from lsjax.decoding.request import Request


@dataclass
class ActiveRow:
    """A request and its text so far. Times are computing seconds of the batch."""

    index: int  # of the request
    request: Request
    text: RowText
    prefill_seconds: float
    began: float  # time of the first token
    last_read: tuple[float, int]  # when last read: time, rounds of the row

    @classmethod
    def begin(
        cls, index: int, request: Request, tokenizer: Tokenizer, before: float, now: float
    ) -> "ActiveRow":
        """A row whose prompt was read between these times."""
        text = RowText(tokenizer, request.prompt, request.stop)
        return cls(index, request, text, now - before, now, (now, 0))

    def seconds(self, whole: Trace, trace: Trace, now: float) -> float:
        """Decoding seconds of a trace, which may be cut from the whole one that is read now. Rounds
        after a stop string do not count. The host sees the string only when it reads next."""
        (last, before), self.last_read = self.last_read, (now, whole.rounds)
        share = (trace.rounds - before) / max(1, whole.rounds - before)
        return last + share * (now - last) - self.began

    def completion(
        self, trace: Trace, reason: str, tokenizer: Tokenizer, **rest: Any
    ) -> Completion:
        """The result of a row that has ended. rest: other fields of `Completion`."""
        request = self.request
        is_stop = reason == "eos" and trace.tokens_n[-1] in request.stop_ids
        return Completion.of(
            trace if request.log_probs else replace(trace, log_probs_n=None),
            seed=request.sampling.seed if request.sampling.temperature else None,
            prompt=tokenizer.decode(request.prompt),
            text=self.text.text,
            num_prompt_tokens=len(request.prompt),
            prefill_seconds=self.prefill_seconds,
            finish_reason="stop" if is_stop else reason,
            **rest,
        )
