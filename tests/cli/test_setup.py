"""Setup of programs: the memory that glibc keeps, and progress bars."""

import ctypes
import io
import subprocess
import sys
import time

import pytest

from lsjax.cli import setup
from lsjax.cli.setup import waiting
from lsjax.terminal import SafeConsole

# Each step allocates temporary memory for two devices, as XLA:CPU does: one aligned block each.
# Small blocks outlive them. No block is touched, so the program reserves memory but uses none.
STEPS = """
import ctypes, resource
from lsjax.cli.setup import keep_freed_memory

glibc = ctypes.CDLL(None)
glibc.malloc.restype = ctypes.c_void_p
glibc.free.argtypes = [ctypes.c_void_p]
LARGE, MEDIUM = 1 << 29, 1 << 26

def aligned(size):
    block = ctypes.c_void_p()
    assert glibc.posix_memalign(ctypes.byref(block), 64, ctypes.c_size_t(size)) == 0
    return block

def allocate_small_blocks():
    for size in range(24, 120, 16):
        assert all(glibc.malloc(size) for _ in range(20))

def reserved():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()

keep_freed_memory()
before = reserved()
for step in range(6):
    first = aligned(LARGE)
    allocate_small_blocks()
    second = aligned(LARGE)
    allocate_small_blocks()
    highest = reserved() - before
    glibc.free(first)
    allocate_small_blocks()
    glibc.free(second)
    allocate_small_blocks()
medium = aligned(MEDIUM)
allocate_small_blocks()
used = reserved()
glibc.free(medium)
print(highest / LARGE, (used - reserved()) / MEDIUM)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc"
)
def test_steps_reuse_memory():
    """Steps reserve no more memory than two blocks, and medium blocks are kept when freed."""
    done = subprocess.run([sys.executable, "-c", STEPS], check=True, stdout=subprocess.PIPE)
    highest, returned = map(float, done.stdout.split())
    assert highest < 2.5
    assert returned < 0.5


BROKEN_OFF = """
from rich.console import Console
from lsjax.cli.errors import one_line_errors
from lsjax.cli.setup import bar

with one_line_errors():
    counting = iter(bar(Console(), "counting")([1, 2, 3]))
    raise OSError(f"no {next(counting)}")
"""


def test_an_error_below_a_progress_bar_ends_the_program():
    """The bar is still there when the interpreter ends."""
    command = [sys.executable, "-c", BROKEN_OFF]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "error: no 1\n")


def test_a_terminal_shows_what_the_user_waits_for():
    """The line vanishes at the end."""
    console = SafeConsole(file=io.StringIO(), force_terminal=True)
    with waiting(console, "compiling rounds"):
        pass
    shown = console.file.getvalue()
    assert "compiling rounds" in shown and shown.endswith("\x1b[2K")


def test_a_log_names_only_long_waits(monkeypatch):
    monkeypatch.setattr(setup, "PATIENCE", 0.1)
    console = SafeConsole(file=io.StringIO())
    with waiting(console, "loading"):
        pass
    with waiting(console, "compiling rounds"):
        end = time.monotonic() + 60
        while not console.file.getvalue() and time.monotonic() < end:
            time.sleep(0.01)
    assert console.file.getvalue() == "compiling rounds ...\n"
