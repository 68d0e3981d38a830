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
        ("import os; os.mkfifo('file')", "AttributeError"),
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
        ("import ctypes", "ctypes.dlopen"),
        ("import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "resource.setrlimit"),
    ],
)
def test_what_is_forbidden_ends_a_program_even_if_it_catches_errors(layers, source, what):
    assert f"was stopped at {what}" in run(CAUGHT.format(source.replace("; ", "\n    ")))


def test_allocating():
    assert "MemoryError" in run("x = []\nwhile True:\n    x.append(bytearray(10**7))")


def test_printing_without_end():
    assert "took longer" not in run("while True: print('x' * 1000)")


@pytest.mark.parametrize(
    "source", ["while True: pass", "import time\ntime.sleep(60)", CAUGHT.format("while True: pass")]
)
def test_looping(source):
    assert run(source, seconds=1.0) == "took longer than 1 s"


def test_what_sleeps_on_without_anyone_to_stop_it(tmp_path):
    """A second later: the limit of -9 s, and the 10 behind it."""
    program = tmp_path / "program.py"
    program.write_text("import time\ntime.sleep(600)")
    command = [sys.executable, "-I", "-S", "-B", sandbox.__file__, program, "-9"]
    ended = subprocess.run(command, timeout=120)
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


def test_what_a_program_leaves_behind_is_killed_with_it(tmp_path):
    """Were a process started in spite of all."""
    cases = (("sleep 60 & echo $!", 30.0, 0), ("sleep 60 & echo $!; sleep 60", 5.0, None))
    for command, seconds, ended in cases:
        with (tmp_path / "printed").open("wb") as stream:
            assert sandbox._run(["/bin/sh", "-c", command], str(tmp_path), stream, seconds) == ended
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
