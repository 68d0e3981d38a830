"""Several processes of one run: how they find one another, take turns, and end together.

Each host runs the same program. After `start`, arrays are sharded over the devices of all hosts.
"""

import hashlib
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from lsjax.checkpoints.steps import orbax
from lsjax.checkpoints.tensors import CheckpointError
from lsjax.config import ConfigError, Hosts, check
from lsjax.interrupts import noted
from lsjax.io.files import one_line

# Matches errors caused by another process ending, whatever their class.
LOST = re.compile(r"Gloo|UNAVAILABLE|DEADLINE_EXCEEDED|[Hh]eartbeat|Connection (reset|closed)")
DECIDES = 600_000  # milliseconds that an action of the first process may take
SAID = 2400  # bytes of an error that is sent to all processes: the 600 characters of `one_line`


def start(hosts: Hosts) -> None:
    """Joins the other processes, if there are any. Must come before all other use of jax. Raises
    ConfigError if they do not connect in time."""
    flags, slurm = hosts.coordinator is not None, under_slurm()
    if not (flags or slurm or on_tpu_vm()):
        return
    try:
        jax.distributed.initialize(
            hosts.coordinator,
            hosts.num_processes,
            hosts.process_id,
            cluster_detection_method="deactivate" if flags else "slurm" if slurm else None,
            heartbeat_timeout_seconds=hosts.heartbeat_timeout,
            initialization_timeout=hosts.start_timeout,
        )
    except (RuntimeError, ValueError) as error:
        if isinstance(error, ValueError) and not (flags or slurm):
            return  # TPU chips, but a single host
        raise ConfigError(
            f"the processes could not connect ({error}): check the coordinator address, or raise "
            "--distributed.start-timeout"
        ) from error


def under_slurm() -> bool:
    """Whether srun started several processes of this program."""
    return "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1


def on_tpu_vm() -> bool:
    """Whether this machine has TPU chips that jax may use."""
    wanted = os.environ.get("JAX_PLATFORMS") or "tpu"
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return "tpu" in wanted and bool(chips) and find_spec("libtpu") is not None


def is_first() -> bool:
    """Whether this process is responsible for printing and writing."""
    return jax.process_index() == 0


@contextmanager
def in_turn(what: str) -> Iterator[None]:
    """Runs the block in the first process before the others, which then find its files."""
    if not is_first():
        multihost_utils.sync_global_devices(what)
    yield
    if is_first():
        multihost_utils.sync_global_devices(what)


def first_decides(action: Callable[[], None]) -> None:
    """Runs an action in the first process. Its CheckpointError or OSError is raised on all."""
    problem = ""
    if is_first():
        try:
            action()
        except (CheckpointError, OSError) as error:
            problem = one_line(error)
    if jax.process_count() > 1:
        # Unlike a collective, this barrier waits for as long as an action may take.
        orbax().multihost.get_barrier_sync_fn()(key="process 0 decides", timeout_ms=DECIDES)
        said = np.frombuffer(problem.encode().ljust(SAID), np.uint8)
        problem = bytes(multihost_utils.broadcast_one_to_all(said)).decode().rstrip()
    if problem:
        raise CheckpointError(problem)


def check_same(what: str, value: str) -> None:
    """Raises ConfigError on all processes unless they agree on a value."""
    digest = hashlib.sha256(value.encode()).digest()
    digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint32))
    different = np.flatnonzero((digests != digests[0]).any(1)).tolist()
    check(
        not different,
        f"{what} differ between process 0 and {different}: start all with the same command and a "
        "shared disk",
    )


def wait_to_see(condition: Callable[[], bool], what: str) -> None:
    """Waits until a file of the first process is visible; raises ConfigError after a minute."""
    end = time.monotonic() + 60
    while not condition():
        check(
            time.monotonic() < end,
            f"process {jax.process_index()} does not see {what}, which process 0 wrote: give a "
            "--workdir on a disk that all hosts share",
        )
        time.sleep(0.1)


@contextmanager
def ending_together() -> Iterator[None]:
    """A failing process exits at once; the others detect it and exit. An ordinary exit would wait
    for the others, which wait for this one."""
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        code = 1
        if isinstance(error, SystemExit) and isinstance(error.code, int):
            code = error.code
        elif isinstance(error, Exception) and LOST.search(str(error)):
            line = str(error).partition("\n")[0][:300]
            print(
                f"error: process {jax.process_index()} cannot continue, probably because another "
                f"process ended ({line}): restart all processes",
                file=sys.stderr,
            )
        else:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextmanager
def signals() -> Iterator[Callable[[int], int | None]]:
    """Notes SIGTERM and Ctrl-C from the first step on; a second signal of a type terminates at
    once. Yields a function to call after each step. It returns the number of the signal that stops
    the run now. Before the first step a program is compiled, and there is nothing new to save.
    With several processes jax handles SIGTERM, and all stop after the same later step."""
    several = jax.process_count() > 1
    caught = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    then = partial(signal.raise_signal, signal.SIGTERM) if several else lambda: None

    with ExitStack() as stack:
        received: list[int] | None = None

        def stop(step: int) -> int | None:
            nonlocal received
            if received is None:
                received = stack.enter_context(noted(*caught, then=then))
            if several:
                stopping = multihost_utils.reached_preemption_sync_point(step)
                return signal.SIGTERM if stopping else None
            return received[0] if received else None

        yield stop
