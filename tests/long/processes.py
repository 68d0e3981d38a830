"""What long tests ask of the processes that they start."""

import subprocess
import time


def assert_group_ends(number: int) -> None:
    """All processes of this group end within ten seconds."""
    for _ in range(100):
        group = subprocess.run(["pgrep", "-g", str(number)], capture_output=True, check=False)
        if not group.stdout:
            return
        time.sleep(0.1)
    raise AssertionError(f"processes go on: {group.stdout.decode().split()}")
