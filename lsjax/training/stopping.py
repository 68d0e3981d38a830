"""When a run is asked to stop, by SIGTERM or Ctrl-C."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax.experimental.multihost_utils import reached_preemption_sync_point

# (steps done) -> number of the signal that stops the run after this step; to be asked at each step.
Stop = Callable[[int], int | None]


@contextmanager
def signals() -> Iterator[Stop]:
    """Catches the signals for a while; the second one of a kind ends the program at once.

    With several processes jax itself has SIGTERM: where one of them gets it, all are told to stop,
    and after the same step, which none of them has passed.
    """
    if jax.process_count() > 1:
        with _handled(lambda number: signal.raise_signal(signal.SIGTERM), signal.SIGINT):
            yield lambda step: signal.SIGTERM if reached_preemption_sync_point(step) else None
    else:
        received: list[int] = []
        with _handled(received.append, signal.SIGTERM, signal.SIGINT):
            yield lambda step: received[0] if received else None


@contextmanager
def _handled(handle: Callable[[int], None], *numbers: int) -> Iterator[None]:
    before = {}

    def once(number, frame):
        signal.signal(number, before[number])
        handle(number)

    for number in numbers:
        before[number] = signal.signal(number, once)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, before[number])
