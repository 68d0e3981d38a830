"""Programs that a model may write: good ones pass, bad ones are stopped and have failed."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from lsjax.evaluation import sandbox
from lsjax.evaluation.sandbox import run_program

run = partial(run_program, seconds=60.0)

# Of fork_exec, which starts `true`.
ARGUMENTS = "[b'true'], [b'/bin/true'], False, (), None, None, -1, -1, -1, -1, -1, -1, 0, 0, False"
CAUGHT = "try:\n    {}\nexcept BaseException:\n    pass\n"


@pytest.fixture(params=["isolated", "hook alone"])
def layers(request, monkeypatch):
    """With the namespaces that this machine has, and without."""
    if request.param == "hook alone":
        monkeypatch.setattr(sandbox, "isolation", lambda: ())
    elif not sandbox.isolation():
        pytest.skip("unshare does not work here")


def test_good_programs_pass(layers):
    assert run("import math, random, re, typing\nassert math.gcd(4, 6) == 2\nprint('é')") is None
    assert run("import asyncio, subprocess, posix, _posixsubprocess, typing, pickle") is None
    assert run("import threading\nt = threading.Thread(target=print); t.start(); t.join()") is None


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("assert 1 == 2, 'one'", "AssertionError: one"),
        ("def f(:\n", "SyntaxError"),
        ("import sys; sys.exit()", "exit code 0"),
        ("import os; os._exit(0)", "exit code 0"),
        ("raise SystemExit(0)", "exit code 0"),
        ("import numpy", "ModuleNotFoundError"),
        ("import os; assert os.environ.get('HOME')", "AssertionError"),
        ("input()", "EOFError"),
    ],
)
def test_a_program_that_fails_or_ends_before_its_end(source, what):
    assert what in run(source)


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import os; os.fork()", "os.fork"),
        ("import subprocess; subprocess.run(['true'])", "subprocess.Popen"),
        ("import os; os.system('true')", "os.system"),
        ("import socket; socket.socket()", "socket.__new__"),
        ("import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')", "socket"),
        ("open('file', 'w')", "open"),
        ("import os; os.open('file', os.O_CREAT | os.O_WRONLY)", "open"),
        ("import os; os.remove('program.py')", "os.remove"),
        ("import os; os.kill(os.getppid(), 9)", "os.kill"),
        ("import os; os.mkfifo('file')", "os.mkfifo"),
        ("from posix import mkfifo; mkfifo('file')", "os.mkfifo"),
        ("import os; os.mknod('file')", "os.mknod"),
        ("import sys; del sys.modules['posix']; import posix; posix.mkfifo('file')", "import"),
        ("import subprocess; subprocess._fork_exec(" + ARGUMENTS + ")", "os.fork_exec"),
        ("import _posixsubprocess as p; p.fork_exec(" + ARGUMENTS + ")", "os.fork_exec"),
        ("import ctypes", "ctypes.dlopen"),
        ("import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "resource.setrlimit"),
    ],
)
def test_what_is_forbidden_ends_a_program_even_if_it_catches_errors(layers, source, what):
    assert f"was stopped at {what}" in run(CAUGHT.format(source.replace("; ", "\n    ")))


# Programs that look for what tells a completed program from others: the exit code or the token.
# `claim` says with each thing found that the program has completed, and ends it.
CLAIM = """
import os, sys

def parts(found, deep=2):
    yield found
    inner = list(found.values()) if type(found) is dict else []
    inner += found if type(found) in (list, tuple) else ()
    if type(found) is type(parts):
        inner += (found.__globals__, found.__defaults__)
        inner += [cell.cell_contents for cell in found.__closure__ or ()]
    for one in inner if deep else ():
        yield from parts(one, deep - 1)

def claim(*places):
    for place in places:
        for found in parts(place):
            if type(found) is dict and type(found.get("PASSED")) is int:
                os._exit(found["PASSED"])
            if type(found) is bytes and len(found) == 16:
                os.write(0, found)
                os._exit(0)

def above(frame):
    while frame is not None:
        yield dict(frame.f_locals)
        yield dict(frame.f_globals)
        frame = frame.f_back

"""


@pytest.mark.parametrize("code", [0, 1, 57, 58, 255])
def test_no_exit_code_counts_as_passed(code):
    assert run(f"import os\nos._exit({code})") is not None


@pytest.mark.parametrize(
    "source",
    [
        "claim(vars(sys.modules['__main__']))",
        "claim(*above(sys._getframe()))",
        "try:\n    1 / 0\nexcept Exception as error:\n"
        "    claim(*above(error.__traceback__.tb_frame))",
        "try:\n    sys.audit('open')\nexcept Exception as error:\n"
        "    claim(*above(error.__traceback__.tb_next.tb_frame))",
        "import gc\nclaim(*[found for found in gc.get_objects() if type(found) is dict])",
        "import gc\nclaim(*gc.get_referrers(sys))",
        "claim(*[one for frame in sys._current_frames().values() for one in above(frame)])",
        "sys.excepthook = lambda kind, error, trace: claim(*above(trace.tb_frame))\n1 / 0",
        "claim(vars(__builtins__), sys.argv, os.environ, sys.modules)",
        "claim(os.read(0, 16))",
        "os.write(0, bytes(16))",
        "os.close(0)",
        "def trace(frame, *rest):\n    claim(*above(frame))\n    return trace\n"
        "sys._getframe(1).f_trace = trace\nsys.settrace(trace)",
    ],
)
def test_no_program_finds_what_tells_that_it_completed(source):
    assert run(CLAIM + source + "\nos._exit(0)") is not None


@pytest.mark.parametrize(
    "names", ["vars(sys.modules['__main__'])", "sys._getframe(1).f_globals", "vars(builtins)"]
)
def test_no_program_switches_the_guard_off(names):
    """By other values of names that the guard uses or might use."""
    change = f"import builtins, sys\n{names}.update(FORBIDDEN=('x',), WRITING=0, str=int)\n"
    assert "was stopped at open" in run(change + "open('file', 'w')")


def test_allocating():
    assert "MemoryError" in run("x = []\nwhile True:\n    x.append(bytearray(10**7))")


def test_printing_without_end():
    assert "took longer" not in run("while True: print('x' * 1000)")


@pytest.mark.long
@pytest.mark.parametrize(
    "source", ["while True: pass", "import time\ntime.sleep(60)", CAUGHT.format("while True: pass")]
)
def test_looping(source):
    assert run(source, seconds=1.0) == "took longer than 1 s"


def test_what_sleeps_on_without_anyone_to_stop_it(tmp_path):
    """A second later: the limit of -9 s, and the 10 behind it."""
    program = tmp_path / "program.py"
    program.write_text("import time\ntime.sleep(600)")
    command = [sys.executable, "-I", "-S", "-B", sandbox.GUARD, program, "-9"]
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, timeout=120)
    assert ended.returncode == -signal.SIGALRM


def test_namespaces_are_found_on_the_path_of_this_process(tmp_path, monkeypatch):
    """And used where programs have none."""
    tool = tmp_path / "unshare"
    tool.write_text('#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\nshift\nexec "$@"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(sandbox, "UNSHARE", ("unshare", "--all", "--"))
    monkeypatch.setattr(sandbox, "isolation", sandbox.isolation.__wrapped__)
    assert sandbox.isolation() == (str(tool), "--all", "--")
    assert run("pass") is None


@pytest.mark.long
def test_what_a_program_leaves_behind_is_killed_with_it(tmp_path):
    """Were a process started in spite of all."""
    cases = (("sleep 60 & echo $!", 30.0, 0), ("sleep 60 & echo $!; sleep 60", 5.0, None))
    for command, seconds, ended in cases:
        with (tmp_path / "printed").open("wb") as stream:
            streams = subprocess.DEVNULL, stream
            shell = ["/bin/sh", "-c", command]
            assert sandbox._run(shell, str(tmp_path), *streams, seconds) == ended
        child = int((tmp_path / "printed").read_text())
        for _ in range(1000):
            if not is_running(child):
                break
            time.sleep(0.01)
        assert not is_running(child)


def is_running(process: int) -> bool:
    """Whether it is there and no zombie."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
