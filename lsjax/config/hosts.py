"""Configuration of a run on several hosts."""

import re
from dataclasses import dataclass

from lsjax.config.checked import Checked, bounded, check


@dataclass(frozen=True, kw_only=True)
class Hosts(Checked, prefix="--distributed."):
    """The processes of the run. TPU VMs and SLURM need no flag; elsewhere give all three of
    coordinator, num_processes and process_id."""

    coordinator: str | None = None
    """host:port of process 0; the port must be free on that host."""
    num_processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Index of this process, from 0."""
    heartbeat_timeout: int = bounded(40, low=1)
    """Seconds without a heartbeat before a process counts as dead, and the others end."""
    start_timeout: int = bounded(300, low=1)
    """Seconds to wait for all processes to start."""

    def __post_init__(self):
        super().__post_init__()
        given = self.coordinator, self.num_processes, self.process_id
        if given == (None,) * 3:
            return
        check(
            None not in given,
            "--distributed.coordinator, --distributed.num-processes and --distributed.process-id "
            "must be given together: give all three, or none under SLURM and on TPU VMs",
        )
        check(
            re.fullmatch(r".+:[0-9]+", self.coordinator) is not None,
            f"--distributed.coordinator {self.coordinator!r} is not host:port, such as a:1234",
        )
        check(
            0 <= self.process_id < self.num_processes,
            f"--distributed.process-id {self.process_id} is not in 0..{self.num_processes - 1}",
        )
