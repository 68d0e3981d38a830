"""Training, loading and decoding on eight devices. Long: a process of their own compiles it all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("file", sorted(file.stem for file in HERE.glob("eight_devices/*.py")))
def test_eight_devices(file):
    """The number of devices is fixed when jax starts."""
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"eight_devices/{file}.py",
        ],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "8"},
        cwd=HERE,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-10_000:] + result.stderr[-2_000:]
