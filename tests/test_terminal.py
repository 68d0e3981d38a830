"""What a terminal and a pipe get of untrusted text, and how output ends that nobody reads."""

import io
import logging
import subprocess
import sys

import pytest
from rich.console import Console
from rich.progress import Progress
from rich.segment import Segment, Segments
from rich.text import Text

from lsjax.cli.show import table
from lsjax.terminal import CONTROLS, SafeConsole, shown_warnings, verbatim, visible

EVIL = "a\x1b]52;c;eA==\x07b\r\b\x7f\x9b2J\x85c"
SHOWN = r"a\x1b]52;c;eA==\x07b\r\x08\x7f\x9b2J\x85c"


@pytest.fixture
def terminal():
    """A console that takes its file for a terminal; wide, and without colours."""
    return SafeConsole(file=io.StringIO(), force_terminal=True, width=200, color_system=None)


def test_each_control_but_tab_and_newline_is_spelled_out():
    assert visible(EVIL) == SHOWN
    every = "".join(map(chr, range(0x110)))
    assert not CONTROLS.search(visible(every))
    assert [c for c in every[:32] if c in visible(every)] == ["\t", "\n"]
    assert visible("\tnaïve 日本\n\\x1b") == "\tnaïve 日本\n\\x1b"


@pytest.mark.parametrize(
    "printed",
    [EVIL, Text(EVIL), verbatim(EVIL), Segments([Segment(EVIL[:2]), Segment(EVIL[2:])])],
    ids=["string", "text", "verbatim", "two pieces"],
)
def test_a_terminal_is_shown_controls(terminal, printed):
    terminal.print(printed)
    found = terminal.file.getvalue()
    assert not CONTROLS.search(found)
    if not isinstance(printed, Text):  # which lacks some of them by itself
        assert found.removesuffix("\n") == SHOWN


def test_tables_and_progress_are_shown_too(terminal):
    made = table(EVIL, ["name", EVIL], [[EVIL, "1"]])
    terminal.print(made)
    assert terminal.file.getvalue().count(SHOWN) == 3  # whole: they were measured like this
    with Progress(console=terminal, auto_refresh=False) as progress:
        progress.add_task(EVIL)
    found = terminal.file.getvalue()
    assert "a\x1b" not in found and r"a\x1b" in found and "\x9b" not in found


def test_markup_in_a_text_is_text(terminal):
    terminal.print("[link=file:///etc/passwd]a[/link] :smile:")
    assert terminal.file.getvalue() == "[link=file:///etc/passwd]a[/link] :smile:\n"


def test_files_and_pipes_get_the_text(monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    console = SafeConsole(file=io.StringIO(), soft_wrap=True)
    console.print(verbatim(f"{EVIL}\t\n"))
    assert console.file.getvalue() == f"{EVIL}\t\n"


def test_a_plain_console_would_send_them(monkeypatch):
    """So the tests above can fail."""
    monkeypatch.setenv("TERM", "dumb")
    console = Console(file=io.StringIO(), force_terminal=True)
    console.print(verbatim(EVIL))
    assert console.file.getvalue() == EVIL


def test_logged_warnings_are_shown(monkeypatch, capsys, caplog):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    log = logging.getLogger("lsjax.io.files")
    with shown_warnings():
        log.info("no warning")
        log.warning("key %s", EVIL)
    assert capsys.readouterr().err == f"key {SHOWN}\n"
    log.warning("later")
    assert caplog.messages == ["later"]


PRINTS = """
import sys
from lsjax.terminal import SafeConsole, written_output
with written_output():
    {}
"""
LINES = [
    "print('x' * 100_000)",
    "print('held back until the end')",
    "[print('x', flush=True) for _ in range(100_000)]",
    "[SafeConsole().print('x') for _ in range(100_000)]",
    "print('x'); sys.exit(0)",
]


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("options", [[], ["-u"]], ids=["buffered", "unbuffered"])
def test_a_reader_that_is_gone_ends_the_program_without_a_word(line, options):
    program = [sys.executable, "-X", "dev", *options, "-c", PRINTS.format(line)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141


@pytest.mark.parametrize("line", LINES[:2])
def test_an_output_that_is_full_is_named(line):
    program = [sys.executable, "-c", PRINTS.format(line)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True)
    (last,) = done.stderr.splitlines()[-1:]
    assert last.startswith("OSError: standard output can't be written (No space left on device)")
