"""Programs that Ctrl-C or SIGTERM ends: one line, the exit code, and nothing else."""

import ast
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lsjax.interrupts import noted, raised
from scripts.proofs.interrupts import handles

ROOT = Path(__file__).parents[1]
# Where the tests run in the background Ctrl-C may be ignored, and a program inherits that.
COMMAND = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from lsjax import interrupts
{setup}
interrupts.run_program("program")
"""
HEAD = """
import atexit, ctypes, gc, os, signal, sys, time
from lsjax.interrupts import keeps, noted

def ready():
    print("ready", flush=True)

def native():
    # Does not return, and no signal ends it.
    lock = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(lock)

"""
SHORT, PATIENT = "interrupts.PATIENCE = 0.3", "interrupts.PATIENCE = 1000"
BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])

BUSY = pytest.mark.parametrize("busy", ["time.sleep(100)", "native()"])


@pytest.fixture
def start(tmp_path):
    """Starts a program from its source; yields the process once it has called `ready`."""

    @contextmanager
    def run(source: str, setup: str = "") -> Iterator[subprocess.Popen]:
        (tmp_path / "program.py").write_text(HEAD + source)
        command = [sys.executable, "-c", COMMAND.format(setup=setup)]
        place = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        with subprocess.Popen(command, env=place, cwd=tmp_path, **pipes) as program:
            try:
                assert program.stdout.readline() == "ready\n"
                yield program
            finally:
                program.kill()

    return run


def ended(program: subprocess.Popen) -> tuple[int, str]:
    """Exit code and stderr."""
    code = program.wait(timeout=120)
    return code, program.stderr.read()


@BOTH
def test_imports(start, number):
    with start("ready()\ntime.sleep(100)") as program:
        program.send_signal(number)
        assert ended(program) == (128 + number, "interrupted\n")


@BOTH
def test_python_code(start, number, tmp_path):
    """With-blocks close their files, and standard output is written."""
    main = f"""
def main():
    keeps("the file has the text")
    ready()
    with open("file", "w") as file:
        file.write("text")
        print("more")
        os.kill(os.getpid(), {int(number)})
        time.sleep(100)
"""
    with start(main) as program:
        assert ended(program) == (128 + number, "interrupted: the file has the text\n")
        assert program.stdout.read() == "more\n"
    assert (tmp_path / "file").read_text() == "text"


def test_native_code(start):
    main = """
def main():
    keeps("the rest is written", lambda: print("rest"))
    ready()
    native()
"""
    with start(main, SHORT) as program:
        program.send_signal(signal.SIGINT)
        assert ended(program) == (130, "interrupted: the rest is written\n")
        assert program.stdout.read() == "rest\n"


def test_compiling(start):
    """XLA goes on in its threads."""
    main = """
import jax
import jax.numpy as jnp

def main():
    def slow(x):
        for i in range(150):
            x = jnp.sin(x @ x.T @ x) + jnp.sort(x, 0) * i
        return x

    lowered = jax.jit(slow).lower(jnp.ones((37, 37)))
    jax.config.update("jax_enable_compilation_cache", False)
    ready()
    lowered.compile()
    time.sleep(100)
"""
    with start(main, SHORT) as program:
        time.sleep(0.5)
        program.send_signal(signal.SIGINT)
        assert ended(program) == (130, "interrupted\n")


def test_a_second_signal_in_native_code(start):
    """Ends the process at once, also where the first one is only noted."""
    main = "def main():\n    with noted(signal.SIGINT):\n        ready()\n        native()"
    with start(main, SHORT) as program:
        program.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            program.wait(timeout=1)
        program.send_signal(signal.SIGINT)
        assert ended(program) == (130, "interrupted\n")


@BUSY
def test_a_second_signal_while_the_first_one_is_handled(start, busy):
    main = f"""
def main():
    try:
        ready()
        time.sleep(100)
    finally:
        print("ending", flush=True)
        {busy}
"""
    with start(main, PATIENT) as program:
        program.send_signal(signal.SIGINT)
        assert program.stdout.readline() == "ending\n"
        program.send_signal(signal.SIGINT)
        assert ended(program) == (130, "interrupted\n")


@BUSY
def test_a_second_signal_after_one_that_was_noted(start, busy):
    main = f"""
def main():
    with noted(signal.SIGINT) as numbers:
        ready()
        while not numbers:
            time.sleep(0.01)
        print(numbers, flush=True)
        {busy}
"""
    with start(main, PATIENT) as program:
        program.send_signal(signal.SIGINT)
        assert program.stdout.readline() == "[2]\n"
        program.send_signal(signal.SIGINT)
        assert ended(program) == (130, "interrupted\n")


def test_a_callback_whose_exceptions_are_only_printed(start):
    """Such as those that jax adds to each garbage collection."""
    main = """
def main():
    gc.callbacks.append(lambda *rest: os.kill(os.getpid(), signal.SIGINT))
    ready()
    gc.collect()
    time.sleep(100)
"""
    with start(main) as program:
        assert ended(program) == (130, "interrupted\n")


def test_another_exception_after_a_signal(start):
    """Has no traceback, as the signal is its cause."""
    main = """
def main():
    try:
        ready()
        time.sleep(100)
    finally:
        raise ValueError
"""
    with start(main) as program:
        program.send_signal(signal.SIGINT)
        assert ended(program) == (130, "interrupted\n")


def test_exiting(start):
    main = """
def main():
    atexit.register(os.kill, os.getpid(), signal.SIGINT)
    ready()
"""
    with start(main) as program:
        assert ended(program) == (130, "interrupted\n")


def test_the_very_end(start):
    """A signal comes too late to change the exit code."""
    main = """
class Last:
    def __del__(self, kill=os.kill, process=os.getpid()):
        kill(process, 2)

last = Last()

def main():
    ready()
    return 3
"""
    with start(main) as program:
        assert ended(program) == (3, "")


def test_an_ignored_signal_stays_ignored(start):
    main = "def main():\n    ready()\n    os.kill(os.getpid(), signal.SIGINT)\n    return 3"
    with start(main, "signal.signal(signal.SIGINT, signal.SIG_IGN)") as program:
        assert ended(program) == (3, "")


def test_errors_keep_their_traceback(start):
    with start("def main():\n    ready()\n    1 / 0") as program:
        code, errors = ended(program)
        assert code == 1 and errors.endswith("ZeroDivisionError: division by zero\n")


def test_a_block_in_which_each_ctrl_c_is_raised():
    before = signal.getsignal(signal.SIGINT)
    with raised():
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        with noted(signal.SIGINT) as numbers:
            signal.raise_signal(signal.SIGINT)
            assert numbers == [signal.SIGINT]
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


EVALUATE = "-m lsjax evaluate --model nothing --task gsm8k --output nothing/answers.jsonl"


@pytest.mark.parametrize("delay", [0.0, 0.3])
@pytest.mark.parametrize(
    "program",
    [
        "train.py --config quickstart --workdir nothing/run",
        "decode.py --model nothing --prompt a",
        EVALUATE,
    ],
)
def test_imports_of_a_program(program, delay):
    command = ["env", "--default-signal=INT", sys.executable, *program.split()]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=ROOT, **pipes) as started:
        while not handles(started.pid):
            assert started.poll() is None
        time.sleep(delay)
        started.send_signal(signal.SIGINT)
        assert ended(started) == (130, "interrupted\n")


def test_every_program_begins_with_its_handlers():
    """All other imports come after them."""
    files = (ROOT / "train.py", ROOT / "decode.py", ROOT / "lsjax" / "__main__.py")
    for file in files:
        begin, *_ = ast.parse(file.read_text()).body[1:]
        assert ast.unparse(begin) == "from lsjax.interrupts import command"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"lsjax": "lsjax.interrupts:command"}
