"""Arguments of a batch's rounds. Those of an adaptive strategy have the seconds of its rounds."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lsjax.decoding.auto.measure import MEASURING
from lsjax.decoding.request import Request
from lsjax.decoding.runtime import Runtime
from lsjax.decoding.strategy import Strategy


class LoopArguments:
    """The arguments by slots of a row, known before the first text: none waits for timings.

    One size above those of the prompts is timed: each further one would compile another program.
    serves: the requests, with all ids that end them. capacity: slots for a length.
    """

    def __init__(
        self,
        runtime: Runtime,
        strategy: Strategy,
        requests: Sequence[Request],
        serves: Sequence[Request],
        capacity: Callable[[int], int],
    ):
        self._timed = partial(runtime.arguments, strategy, serves=serves)
        first = capacity(1 + max(len(request.prompt) for request in requests))
        total = max(len(request.prompt) + request.max_new_tokens for request in requests)
        sizes = {first, min(capacity(first + 1), capacity(total))}
        if runtime.batch_size == 1:
            sizes |= {capacity(1 + len(request.prompt)) for request in requests}
        budget = MEASURING / len(sizes)
        self._known = {size: self._timed(capacity=size, budget=budget) for size in sorted(sizes)}

    def of(self, capacity: int) -> Any:
        """The arguments of the largest size up to `capacity`, or of the smallest one."""
        sizes = [size for size in self._known if size <= capacity]
        return self._known[max(sizes, default=min(self._known))]

    def narrow(self, rows: int, capacity: int) -> None:
        """Times rounds of a batch of fewer rows, whose slots are now `capacity`."""
        self._known = {capacity: self._timed(capacity=capacity, budget=MEASURING, rows=rows)}
